//! Names of flows: what belongs together, and is compared in order, seen from the guest.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use super::Packet;

/// The VLAN identifiers of a frame, outermost first. Priority bits are no part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vlan {
    tags: [u16; 2],
    count: u8,
}

impl Vlan {
    /// Most tags that are looked behind.
    pub const TAGS_MAX: usize = 2;

    /// Adds an inner tag.
    ///
    /// # Panics
    /// When there are [`Self::TAGS_MAX`] already.
    pub fn push(&mut self, identifier: u16) {
        self.tags[usize::from(self.count)] = identifier;
        self.count += 1;
    }

    /// The identifiers, outermost first.
    pub fn tags(&self) -> &[u16] {
        &self.tags[..usize::from(self.count)]
    }

    /// All that it says, in the bits that [`Transport::word`] leaves, but for the highest two.
    fn word(&self) -> u64 {
        u64::from(self.count) << 60 | u64::from(self.tags[0]) << 48 | u64::from(self.tags[1]) << 36
    }
}

/// What tells messages between the same two addresses apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// One TCP connection and its successors on the same ports.
    Tcp {
        /// The guest's port.
        guest_port: u16,
        /// The other end's port.
        remote_port: u16,
    },
    /// UDP between two ports.
    Udp {
        /// The guest's port.
        guest_port: u16,
        /// The other end's port.
        remote_port: u16,
    },
    /// ICMP or ICMPv6 messages of one type, and of one identifier where the type has one.
    Icmp {
        /// Type and code.
        kind: [u8; 2],
        /// The identifier of an echo, else 0.
        identifier: u16,
        /// Whether it is neighbour or multicast listener discovery (RFC 4861, RFC 3810), which is repeated without meaning
        /// anything new.
        discovery: bool,
    },
    /// IPsec: what it protects cannot be looked at, or not be changed.
    Security {
        /// ESP (RFC 4303) or AH (RFC 4302).
        protocol: u8,
        /// Security parameters index.
        spi: u32,
    },
    /// Fragments of any protocol.
    Fragment {
        /// The protocol of the whole.
        protocol: u8,
    },
    /// Another protocol over IP.
    Other {
        /// Its number.
        protocol: u8,
    },
}

/// The name of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowKey {
    /// Over IP.
    Ip {
        /// Where.
        vlan: Vlan,
        /// The guest's address.
        guest: IpAddr,
        /// The other end's address.
        remote: IpAddr,
        /// What.
        transport: Transport,
    },
    /// Directly over Ethernet, and everything that cannot be understood.
    Frame {
        /// Where.
        vlan: Vlan,
        /// The type behind the tags.
        ethertype: u16,
        /// The sender's hardware address.
        source: [u8; 6],
    },
}

impl FlowKey {
    /// Whether it is a TCP flow.
    pub fn is_tcp(&self) -> bool {
        matches!(self, Self::Ip { transport: Transport::Tcp { .. }, .. })
    }
}

impl Transport {
    /// All that it says, in 36 bits.
    fn word(self) -> u64 {
        let word = |kind: u64, a: u16, b: u16| kind << 32 | u64::from(a) << 16 | u64::from(b);
        match self {
            Self::Tcp { guest_port, remote_port } => word(0, guest_port, remote_port),
            Self::Udp { guest_port, remote_port } => word(1, guest_port, remote_port),
            Self::Icmp { kind, identifier, discovery } => {
                word(2 + u64::from(discovery), u16::from_be_bytes(kind), identifier)
            }
            Self::Fragment { protocol } => word(4, protocol.into(), 0),
            Self::Other { protocol } => word(5, protocol.into(), 0),
            Self::Security { protocol, spi } => {
                word(6 + u64::from(protocol == super::PROTOCOL_AH), (spi >> 16) as u16, spi as u16)
            }
        }
    }
}

/// A [`FlowKey`] in five words, which are quickly hashed and compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedKey([u64; 5]);

/// Without a branch, and without a call as a derived one makes.
impl PartialEq for PackedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
    }
}

impl Eq for PackedKey {}

/// What the last word says the first ones are.
const FRAME: u64 = 0;
const WITH_V4: u64 = 1 << 62;
const WITH_V6: u64 = 2 << 62;

impl PackedKey {
    /// The key of [`Packet::flow_from_guest`], without the detour.
    #[inline]
    pub(crate) fn from_guest(packet: &Packet, frame: &[u8]) -> Self {
        match packet.over_ip() {
            Some((addresses, transport)) => {
                Self::over_ip(&packet.vlan, &addresses.source, &addresses.destination, transport)
            }
            None => Self::from(&packet.flow_from_guest(frame)),
        }
    }

    #[inline]
    fn over_ip(vlan: &Vlan, guest: &IpAddr, remote: &IpAddr, transport: Transport) -> Self {
        let word = vlan.word() | transport.word();
        if let (IpAddr::V4(guest), IpAddr::V4(remote)) = (guest, remote) {
            let addresses = u64::from(guest.to_bits()) << 32 | u64::from(remote.to_bits());
            return Self([addresses, 0, 0, 0, word | WITH_V4]);
        }
        let bits = |address: &IpAddr| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
        let halves = |bits: u128| [(bits >> 64) as u64, bits as u64];
        let ([a, b], [c, d]) = (halves(bits(guest)), halves(bits(remote)));
        Self([a, b, c, d, word | WITH_V6])
    }
}

impl From<&FlowKey> for PackedKey {
    fn from(key: &FlowKey) -> Self {
        match key {
            FlowKey::Ip { vlan, guest, remote, transport } => Self::over_ip(vlan, guest, remote, *transport),
            FlowKey::Frame { vlan, ethertype, source } => {
                let [a, b, c, d, e, f] = *source;
                let mac = u64::from_be_bytes([a, b, c, d, e, f, 0, 0]);
                Self([mac | u64::from(*ethertype), 0, 0, 0, vlan.word() | FRAME])
            }
        }
    }
}

/// What names a flow. To find it takes the packed key only; the other is made when it is new.
pub(crate) trait FlowName {
    fn packed(&self) -> PackedKey;
    fn key(&self) -> FlowKey;
}

impl FlowName for FlowKey {
    fn packed(&self) -> PackedKey {
        PackedKey::from(self)
    }

    fn key(&self) -> FlowKey {
        *self
    }
}

/// The flow of a packet that the guest sent, and of its frame.
pub(crate) struct FromGuest<'a>(pub(crate) &'a Packet, pub(crate) &'a [u8]);

impl FlowName for FromGuest<'_> {
    #[inline]
    fn packed(&self) -> PackedKey {
        PackedKey::from_guest(self.0, self.1)
    }

    fn key(&self) -> FlowKey {
        self.0.flow_from_guest(self.1)
    }
}

impl Hash for PackedKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [a, b, c, d, kind] = self.0;
        state.write_u64(a);
        state.write_u64(kind);
        if kind & WITH_V6 != 0 {
            for word in [b, c, d] {
                state.write_u64(word);
            }
        }
    }
}

impl fmt::Display for Vlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for tag in self.tags() {
            write!(f, " vlan {tag}")?;
        }
        Ok(())
    }
}

/// An address with a port, an IPv6 one in brackets.
struct Endpoint(IpAddr, u16);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(f, "{address}:{}", self.1),
            IpAddr::V6(address) => write!(f, "[{address}]:{}", self.1),
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip { vlan, guest, remote, transport } => match transport {
                Transport::Tcp { guest_port, remote_port } => {
                    write!(
                        f,
                        "tcp {} -> {}{vlan}",
                        Endpoint(*guest, *guest_port),
                        Endpoint(*remote, *remote_port)
                    )
                }
                Transport::Udp { guest_port, remote_port } => {
                    write!(
                        f,
                        "udp {} -> {}{vlan}",
                        Endpoint(*guest, *guest_port),
                        Endpoint(*remote, *remote_port)
                    )
                }
                Transport::Icmp { kind: [kind, code], .. } => {
                    write!(f, "icmp type {kind} code {code} {guest} -> {remote}{vlan}")
                }
                Transport::Fragment { protocol } => {
                    write!(f, "fragments of protocol {protocol} {guest} -> {remote}{vlan}")
                }
                Transport::Security { protocol, spi } => {
                    let name = if *protocol == super::PROTOCOL_AH { "ah" } else { "esp" };
                    write!(f, "{name} spi {spi:#x} {guest} -> {remote}{vlan}")
                }
                Transport::Other { protocol } => {
                    write!(f, "protocol {protocol} {guest} -> {remote}{vlan}")
                }
            },
            Self::Frame { vlan, ethertype, source: [a, b, c, d, e, g] } => {
                write!(
                    f,
                    "ethertype {ethertype:#06x} from {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}{vlan}"
                )
            }
        }
    }
}
