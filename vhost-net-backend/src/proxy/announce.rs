//! The guest's addresses, learnt from what it says, and the frames that tell the LAN where it is now.
//!
//! Only what the guest claims by ARP or neighbour discovery is announced as its own: a guest that routes sends packets
//! with other hosts' addresses too. Of these at most the one that it uses itself is believed when it has claimed none.

use std::net::{IpAddr, Ipv6Addr};

use super::Actions;
use crate::offload::FrameHeader;
use crate::packet::{
    ETHERNET_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV6, ETHERTYPE_RARP, Kind, PROTOCOL_ICMPV6, Packet, Transport,
    Vlan, checksum,
};

/// Interfaces (hardware address and VLAN) of a guest that are remembered, and addresses of each.
const INTERFACES_MAX: usize = 16;
const ADDRESSES_MAX: usize = 16;

const BROADCAST: [u8; 6] = [0xff; 6];
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// RFC 4861 §4.4: override what is cached.
const OVERRIDE: u8 = 0x20;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

#[derive(Clone, Debug, PartialEq, Eq)]
struct Interface {
    vlan: Vlan,
    mac: [u8; 6],
    claimed: Vec<IpAddr>,
    /// A source of packets, in case none is claimed.
    used: Option<IpAddr>,
}

/// What is known of the guest's addresses.
#[derive(Clone, Debug, Default)]
pub struct GuestAddresses {
    interfaces: Vec<Interface>,
}

fn mac_at(frame: &[u8], at: usize) -> Option<[u8; 6]> {
    frame.get(at..)?.first_chunk().copied()
}

fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

impl GuestAddresses {
    /// Looks at a frame that the guest sent.
    pub fn learn_from_guest(&mut self, frame: &[u8]) {
        let Some(mac) = mac_at(frame, 6).filter(|mac| is_unicast(*mac)) else {
            return;
        };
        let packet = Packet::parse(frame);
        let claimed = claimed_address(&packet, frame, mac);
        let used = match packet.kind {
            Kind::Tcp { addresses, .. } | Kind::Datagram { addresses, .. } => Some(addresses.source),
            Kind::Arp | Kind::Opaque => None,
        };
        let Some(interface) = self.interface(packet.vlan, mac) else {
            return;
        };
        if let Some(address) = claimed {
            interface.claim(address);
        }
        if let Some(address) = used.filter(|address| is_own(*address)) {
            interface.used.get_or_insert(address);
        }
    }

    /// Looks at a frame that came for the guest: an answer to it names its address as well. Only hardware addresses
    /// that the guest has used are believed.
    pub fn learn_from_lan(&mut self, frame: &[u8]) {
        let packet = Packet::parse(frame);
        if packet.kind != Kind::Arp {
            return;
        }
        let at = packet.network_at;
        let (Some(target), Some(address)) = (mac_at(frame, at + 18), frame.get(at + 24..at + 28)) else {
            return;
        };
        let address = IpAddr::from([address[0], address[1], address[2], address[3]]);
        let known = |interface: &&mut Interface| interface.mac == target && interface.vlan == packet.vlan;
        if let Some(interface) = self.interfaces.iter_mut().find(known)
            && is_own(address)
        {
            interface.claim(address);
        }
    }

    fn interface(&mut self, vlan: Vlan, mac: [u8; 6]) -> Option<&mut Interface> {
        let index =
            self.interfaces.iter().position(|interface| interface.mac == mac && interface.vlan == vlan);
        if index.is_none() && self.interfaces.len() < INTERFACES_MAX {
            self.interfaces.push(Interface { vlan, mac, claimed: Vec::new(), used: None });
        }
        match index {
            Some(index) => self.interfaces.get_mut(index),
            None => self.interfaces.iter_mut().rev().find(|new| new.mac == mac && new.vlan == vlan),
        }
    }

    /// Puts frames for the LAN into `actions` from which switches and neighbours learn where the guest is.
    pub fn announce(&self, actions: &mut Actions) {
        for interface in &self.interfaces {
            // whatever the guest speaks, switches learn from this
            actions.push_copy_to_lan(FrameHeader::default(), &interface.rarp_request());
            let used = interface.used.filter(|_| interface.claimed.is_empty());
            for address in interface.claimed.iter().copied().chain(used) {
                match address {
                    IpAddr::V4(address) => {
                        actions.push_copy_to_lan(
                            FrameHeader::default(),
                            &interface.arp(ETHERTYPE_ARP, 1, address.octets()),
                        );
                    }
                    IpAddr::V6(address) => {
                        actions.push_copy_to_lan(
                            FrameHeader::default(),
                            &interface.neighbour_advertisement(address),
                        );
                    }
                }
            }
        }
    }
}

fn is_own(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast()
        }
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    }
}

/// The address that the guest says is its own.
fn claimed_address(packet: &Packet, frame: &[u8], mac: [u8; 6]) -> Option<IpAddr> {
    let address = match &packet.kind {
        Kind::Arp => {
            let sender = mac_at(frame, packet.network_at + 8)?;
            let address: [u8; 4] = *frame.get(packet.network_at + 14..)?.first_chunk()?;
            IpAddr::from((sender == mac).then_some(address)?)
        }
        Kind::Datagram {
            addresses,
            transport: Transport::Icmp { kind: [kind, _], discovery: true, .. },
            content,
            ..
        } => match *kind {
            NEIGHBOUR_SOLICITATION => addresses.source,
            NEIGHBOUR_ADVERTISEMENT => {
                let target: [u8; 16] = *frame.get(content.clone())?.get(8..)?.first_chunk()?;
                IpAddr::from(target)
            }
            _ => return None,
        },
        _ => return None,
    };
    is_own(address).then_some(address)
}

/// A reverse ARP request (RFC 903) from and about `mac`, by which switches learn where it is.
pub(crate) fn rarp_request(mac: [u8; 6]) -> Vec<u8> {
    Interface { vlan: Vlan::default(), mac, claimed: Vec::new(), used: None }.rarp_request()
}

impl Interface {
    fn claim(&mut self, address: IpAddr) {
        if !self.claimed.contains(&address) && self.claimed.len() < ADDRESSES_MAX {
            self.claimed.push(address);
        }
    }

    fn ethernet(&self, destination: [u8; 6], ethertype: u16) -> Vec<u8> {
        let mut frame = Vec::with_capacity(ETHERNET_BYTES + 80);
        frame.extend(destination);
        frame.extend(self.mac);
        let tags = self.vlan.tags();
        for (index, tag) in tags.iter().enumerate() {
            // IEEE 802.1Q: the outer one of two is a service tag
            let kind: u16 = if index + 1 < tags.len() { 0x88a8 } else { 0x8100 };
            frame.extend(kind.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    /// An ARP announcement (RFC 5227 §3), or with other numbers a reverse ARP request, which names no address.
    fn arp(&self, ethertype: u16, operation: u16, address: [u8; 4]) -> Vec<u8> {
        let mut frame = self.ethernet(BROADCAST, ethertype);
        frame.extend([0, 1, 8, 0, 6, 4]);
        frame.extend(operation.to_be_bytes());
        frame.extend(self.mac);
        frame.extend(address);
        frame.extend(if ethertype == ETHERTYPE_RARP { self.mac } else { [0; 6] });
        frame.extend(address);
        frame
    }

    fn rarp_request(&self) -> Vec<u8> {
        self.arp(ETHERTYPE_RARP, 3, [0; 4])
    }

    /// RFC 4861 §7.2.6.
    fn neighbour_advertisement(&self, address: Ipv6Addr) -> Vec<u8> {
        let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
        message.extend(address.octets());
        message.extend([OPTION_TARGET_LINK_ADDRESS, 1]);
        message.extend(self.mac);
        let bytes = message.len() as u32;
        let sum = checksum::of(&[
            &address.octets(),
            &ALL_NODES.octets(),
            &bytes.to_be_bytes(),
            &[0, 0, 0, PROTOCOL_ICMPV6],
            &message,
        ]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut frame = self.ethernet(ALL_NODES_MAC, ETHERTYPE_IPV6);
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((bytes as u16).to_be_bytes());
        // RFC 4861 §7.1.2: one that was not sent with 255 is ignored
        frame.extend([PROTOCOL_ICMPV6, 255]);
        frame.extend(address.octets());
        frame.extend(ALL_NODES.octets());
        frame.extend(message);
        frame
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket};

    use super::super::Action;
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn announced(addresses: &GuestAddresses) -> Vec<Vec<u8>> {
        let mut actions = Actions::new();
        addresses.announce(&mut actions);
        actions
            .iter()
            .map(|action| match action {
                Action::ToLan(frame) => frame.to_vec(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn arp_reply(sender: [u8; 4]) -> Vec<u8> {
        let mut frame = [[2, 0, 0, 0, 0, 1], MAC].concat();
        frame.extend([0x81, 0, 0, 5, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        frame.extend(MAC);
        frame.extend(sender);
        frame.extend([2, 0, 0, 0, 0, 1, 10, 0, 0, 1]);
        frame
    }

    #[test]
    fn what_the_guest_claims_is_announced_in_its_vlan() {
        let mut addresses = GuestAddresses::default();
        addresses.learn_from_guest(&arp_reply([10, 0, 0, 9]));
        addresses.learn_from_guest(&arp_reply([10, 0, 0, 9]));
        addresses.learn_from_guest(&arp_reply([0, 0, 0, 0]));
        let frames = announced(&addresses);
        assert_eq!(frames.len(), 2);
        assert!(frames.iter().all(|frame| frame[6..12] == MAC && frame[12..16] == [0x81, 0, 0, 5]));
        assert_eq!(frames[0][16..18], [0x80, 0x35]);
        let arp = &frames[1][18..];
        assert_eq!(arp[..8], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&arp[14..18], &arp[24..28]), (&[10, 0, 0, 9][..], &[10, 0, 0, 9][..]));
    }

    #[test]
    fn a_source_is_announced_only_while_nothing_is_claimed() {
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2(MAC, [2; 6])
            .ipv4([10, 0, 0, 7], [10, 0, 0, 2], 64)
            .udp(1, 2)
            .write(&mut frame, b"")
            .unwrap();
        let mut addresses = GuestAddresses::default();
        addresses.learn_from_guest(&frame);
        assert_eq!(announced(&addresses).len(), 2);
        let mut reply = arp_reply([10, 0, 0, 9]);
        // the same interface: no tag
        reply.drain(12..16);
        addresses.learn_from_guest(&reply);
        let frames = announced(&addresses);
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[1][28..32], [10, 0, 0, 9]);
    }

    #[test]
    fn an_ipv6_address_is_advertised_with_a_right_checksum() {
        let own = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
        let interface = Interface { vlan: Vlan::default(), mac: MAC, claimed: Vec::new(), used: None };
        let frame = interface.neighbour_advertisement(own);
        // the guest's own advertisement is what it is learnt from
        let mut addresses = GuestAddresses::default();
        addresses.learn_from_guest(&frame);
        let frames = announced(&addresses);
        assert_eq!(frames[1], frame);
        let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(NetSlice::Ipv6(ip)) = sliced.net else { panic!() };
        let Some(etherparse::TransportSlice::Icmpv6(message)) = sliced.transport else { panic!() };
        assert!(message.is_checksum_valid(ip.header().source(), ip.header().destination()));
    }
}
