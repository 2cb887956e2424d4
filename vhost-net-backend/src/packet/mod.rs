//! What a frame is: where its parts lie, without copying them.
//!
//! Nothing here trusts the bytes: a frame that does not hold what its headers claim is [`Kind::Opaque`].

pub mod checksum;
mod flow;
pub mod fragments;
mod ip;
mod quoted;
pub mod segment;
mod tcp;

use std::ops::Range;

pub use flow::{FlowKey, Transport, Vlan};
pub(crate) use flow::{FlowName, FromGuest, PackedKey};
pub use quoted::Quoted;
pub use tcp::{Flags, Segment, SynOptions, Timestamps, edge_positions};

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_RARP: u16 = 0x8035;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
/// An outer tag as switches wrote it before IEEE 802.1ad.
const ETHERTYPE_QINQ_OLD: u16 = 0x9100;
/// Below this the field is a length, and an LLC header follows (IEEE 802.3 §3.2.6).
const ETHERTYPE_MIN: u16 = 0x0600;
/// The LLC and SNAP headers before an EtherType (RFC 1042).
const SNAP: [u8; 6] = [0xaa, 0xaa, 3, 0, 0, 0];

pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_IGMP: u8 = 2;
pub(crate) const PROTOCOL_ICMPV6: u8 = 58;
pub(crate) const PROTOCOL_ESP: u8 = 50;
pub(crate) const PROTOCOL_AH: u8 = 51;

/// Bytes of an Ethernet header without tags.
pub(crate) const ETHERNET_BYTES: usize = 14;

/// A frame taken apart. Positions count from the first byte of the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The tags it carries.
    pub vlan: Vlan,
    /// The type behind the tags, or in a SNAP header; 0 in a frame that has none.
    pub ethertype: u16,
    /// Where the Ethernet payload begins.
    pub network_at: usize,
    /// What it carries.
    pub kind: Kind,
}

/// What a frame carries, as far as the proxy cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole TCP segment.
    Tcp {
        /// From and to.
        addresses: Addresses,
        /// The segment's header.
        segment: Segment,
    },
    /// A message of UDP, ICMP, ICMPv6 or another protocol over IP, or a fragment of anything.
    Datagram {
        /// From and to.
        addresses: Addresses,
        /// Which messages belong together.
        transport: Transport,
        /// A fragment's offset and flag, 0 for what is whole: two fragments are the same only if this is too.
        place: u16,
        /// The bytes that the receiver will see.
        content: Range<usize>,
    },
    /// ARP for IPv4 over Ethernet, well formed.
    Arp,
    /// Anything else, and anything malformed.
    Opaque,
}

/// Source and destination of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Addresses {
    /// Who sends.
    pub source: std::net::IpAddr,
    /// Who receives.
    pub destination: std::net::IpAddr,
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl Packet {
    /// Takes a frame (without a virtio-net header) apart. Any bytes are allowed.
    #[inline]
    pub fn parse(frame: &[u8]) -> Self {
        let mut packet =
            Self { vlan: Vlan::default(), ethertype: 0, network_at: ETHERNET_BYTES, kind: Kind::Opaque };
        let mut at = ETHERNET_BYTES - 2;
        for tag in 0..3 {
            let Some(ethertype) = be16(frame, at) else {
                return packet;
            };
            packet.ethertype = ethertype;
            packet.network_at = at + 2;
            if !matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ | ETHERTYPE_QINQ_OLD) || tag == 2 {
                break;
            }
            let Some(control) = be16(frame, at + 2) else {
                return packet;
            };
            // a tag with the identifier 0 gives a priority and no VLAN (IEEE 802.1Q §6.9.1)
            if control & 0x0fff != 0 {
                packet.vlan.push(control & 0x0fff);
            }
            at += 4;
        }
        if packet.ethertype < ETHERTYPE_MIN {
            packet.ethertype = snap_ethertype(&frame[packet.network_at..]).unwrap_or(0);
            if packet.ethertype != 0 {
                packet.network_at += SNAP.len() + 2;
            }
        }
        let Self { vlan, ethertype, network_at, .. } = packet;
        // in each arm, so that what was found is written where it stays and is not copied on the way
        let of = |kind| Self { vlan, ethertype, network_at, kind };
        match ethertype {
            ETHERTYPE_IPV4 => ip::parse_v4(frame, network_at).map_or(packet, of),
            ETHERTYPE_IPV6 => ip::parse_v6(frame, network_at).map_or(packet, of),
            ETHERTYPE_ARP => parse_arp(frame, network_at).map_or(packet, of),
            _ => packet,
        }
    }

    /// Takes a frame apart, and where it carries the first fragment of a TCP segment takes that for all of it: its header
    /// is there, as long as it is not cut itself.
    pub fn parse_first_fragment(frame: &[u8]) -> Self {
        let mut packet = Self::parse(frame);
        if let Kind::Datagram { addresses, transport, place, content } = &packet.kind
            && *transport == (Transport::Fragment { protocol: PROTOCOL_TCP })
            && place & if addresses.source.is_ipv4() { 0x1fff } else { 0xfff8 } == 0
            && let Some(segment) = Segment::parse(frame, content.clone())
        {
            packet.kind = Kind::Tcp { addresses: *addresses, segment };
        }
        packet
    }

    /// From where to where, and what tells its messages from others between the two, as its sender sees that.
    #[inline]
    fn over_ip(&self) -> Option<(&Addresses, Transport)> {
        match &self.kind {
            Kind::Tcp { addresses, segment } => {
                let (guest_port, remote_port) = (segment.source_port, segment.destination_port);
                Some((addresses, Transport::Tcp { guest_port, remote_port }))
            }
            Kind::Datagram { addresses, transport, .. } => Some((addresses, *transport)),
            Kind::Arp | Kind::Opaque => None,
        }
    }

    /// The flow of a frame that the guest sent.
    pub fn flow_from_guest(&self, frame: &[u8]) -> FlowKey {
        match self.over_ip() {
            Some((addresses, transport)) => FlowKey::Ip {
                vlan: self.vlan,
                guest: addresses.source,
                remote: addresses.destination,
                transport,
            },
            None => FlowKey::Frame {
                vlan: self.vlan,
                ethertype: self.ethertype,
                source: frame.get(6..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default(),
            },
        }
    }

    /// The TCP flow of a frame that is on its way to the guest, in the form of [`Packet::flow_from_guest`].
    pub fn tcp_flow_to_guest(&self) -> Option<FlowKey> {
        let Kind::Tcp { addresses, segment } = &self.kind else {
            return None;
        };
        Some(FlowKey::Ip {
            vlan: self.vlan,
            guest: addresses.destination,
            remote: addresses.source,
            transport: Transport::Tcp {
                guest_port: segment.destination_port,
                remote_port: segment.source_port,
            },
        })
    }
}

/// The EtherType in the SNAP header at the beginning of `payload`, if that is what it begins with.
fn snap_ethertype(payload: &[u8]) -> Option<u16> {
    let ethertype = be16(payload.strip_prefix(&SNAP)?, 0)?;
    (ethertype >= ETHERTYPE_MIN).then_some(ethertype)
}

fn parse_arp(frame: &[u8], at: usize) -> Option<Kind> {
    let arp = frame.get(at..at + 28)?;
    // hardware Ethernet, protocol IPv4, address lengths 6 and 4
    (arp[..6] == [0, 1, 8, 0, 6, 4]).then_some(Kind::Arp)
}

#[cfg(test)]
pub(crate) mod tests;
