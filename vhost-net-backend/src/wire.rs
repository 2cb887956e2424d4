//! What the two net back ends say to each other: frame kinds of the network channel and the layout of their payloads.
//!
//! The epoch in a frame's header is the one that the frame belongs to. The payload of [`MIRROR`] and [`OUTPUT`] is an
//! Ethernet frame as it is.

use std::net::IpAddr;

use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use crate::offload::FrameHeader;
use crate::packet::{FlowKey, Transport, Vlan};

/// Primary to secondary: a packet from the LAN for the guest.
pub const MIRROR: u16 = 1;
/// Primary to secondary: the initial sequence number that the PVM chose for a connection ([`Isn`]).
pub const ISN: u16 = 2;
/// Primary to secondary: everything of this epoch has been sent. No payload.
pub const MARKER: u16 = 3;
/// Secondary to primary: a packet that the SVM sent.
pub const OUTPUT: u16 = 4;
/// Secondary to primary: the SVM is in this epoch now. No payload.
pub const EPOCH: u16 = 5;
/// Primary to secondary: from now on digests may stand for bytes ([`crate::digest::Key`]).
pub const KEY: u16 = 6;
/// Secondary to primary: digests of what the SVM sent ([`crate::digest::Runs`]).
pub const DIGEST: u16 = 7;
/// Primary to secondary: the bytes of a range are needed ([`crate::digest::Ask`]).
pub const ASK: u16 = 8;
/// Secondary to primary: a packet of which a digest was sent before.
pub const ANSWER: u16 = 9;

/// Primary to secondary: as [`MIRROR`], behind a virtio-net header that says what the packet leaves to the guest.
pub const HEADED_MIRROR: u16 = 16;

/// Bytes of an [`Isn`] on the wire.
pub const ISN_BYTES: usize = FLOW_BYTES + 12;
/// Bytes of the name of a TCP flow on the wire.
pub(crate) const FLOW_BYTES: usize = 44;

const WITH_TIMESTAMP: u8 = 1;
const IPV6: u8 = 2;
/// In place of a tag that is not there.
const NO_TAG: u16 = 0xffff;

/// The initial sequence number of the PVM's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isn {
    /// Which connection; always a TCP flow.
    pub flow: FlowKey,
    /// Sequence number of the PVM's SYN.
    pub isn: u32,
    /// TSval of the PVM's SYN, if it has one.
    pub timestamp: Option<u32>,
}

/// What makes a peer's message worthless. The link that carried it is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No such kind is sent in this direction.
    #[error("The peer sent a message of kind {0}, which does not belong here")]
    Kind(u16),
    /// The payload has another length than its kind demands.
    #[error("The peer sent {bytes} bytes in a message of kind {kind}")]
    Length {
        /// The message's kind.
        kind: u16,
        /// Bytes of its payload.
        bytes: usize,
    },
    /// The payload's fields contradict each other.
    #[error("The peer sent an initial sequence number for no TCP connection")]
    Isn,
    /// The payload is not what its kind demands.
    #[error("The peer sent a malformed message of kind {kind}")]
    Malformed {
        /// The message's kind.
        kind: u16,
    },
    /// A packet's header names what is not in the packet.
    #[error("The peer sent a packet whose header names what is not in it")]
    Header,
    /// The message belongs to an epoch that cannot be.
    #[error("The peer sent a message of kind {kind} for epoch {epoch} while epoch {running} is running")]
    Epoch {
        /// The message's kind.
        kind: u16,
        /// Its epoch.
        epoch: u64,
        /// The epoch that is running here.
        running: u64,
    },
}

/// The name of a TCP flow for the wire; `None` for that of another.
pub(crate) fn flow_to_bytes(flow: &FlowKey) -> Option<[u8; FLOW_BYTES]> {
    let FlowKey::Ip { vlan, guest, remote, transport: Transport::Tcp { guest_port, remote_port } } = flow
    else {
        return None;
    };
    let mut bytes = [0; FLOW_BYTES];
    if guest.is_ipv6() {
        bytes[0] |= IPV6;
    }
    // bytes 1..4 are reserved and zero
    for tag in 0..Vlan::TAGS_MAX {
        let identifier = vlan.tags().get(tag).copied().unwrap_or(NO_TAG);
        bytes[4 + 2 * tag..6 + 2 * tag].copy_from_slice(&identifier.to_be_bytes());
    }
    for (at, address) in [(8, guest), (24, remote)] {
        match address {
            IpAddr::V4(address) => bytes[at..at + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => bytes[at..at + 16].copy_from_slice(&address.octets()),
        }
    }
    bytes[40..42].copy_from_slice(&guest_port.to_be_bytes());
    bytes[42..44].copy_from_slice(&remote_port.to_be_bytes());
    Some(bytes)
}

/// Reads what [`flow_to_bytes`] wrote; `None` for anything else.
pub(crate) fn flow_from_bytes(bytes: &[u8; FLOW_BYTES]) -> Option<FlowKey> {
    let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    if bytes[0] & !IPV6 != 0 || bytes[1..4] != [0; 3] {
        return None;
    }
    let mut vlan = Vlan::default();
    for tag in 0..Vlan::TAGS_MAX {
        match u16_at(4 + 2 * tag) {
            NO_TAG => {}
            identifier if identifier < 0x1000 && vlan.tags().len() == tag => vlan.push(identifier),
            _ => return None,
        }
    }
    let address = |at: usize| -> IpAddr {
        let mut octets = [0; 16];
        octets.copy_from_slice(&bytes[at..at + 16]);
        match octets.first_chunk::<4>() {
            Some(short) if bytes[0] & IPV6 == 0 => IpAddr::from(*short),
            _ => IpAddr::from(octets),
        }
    };
    let transport = Transport::Tcp { guest_port: u16_at(40), remote_port: u16_at(42) };
    Some(FlowKey::Ip { vlan, guest: address(8), remote: address(24), transport })
}

/// The packet in a message of a kind that is nothing else: [`MIRROR`], [`OUTPUT`] or [`ANSWER`].
///
/// # Errors
/// It has a length that no frame has. Of shorter ones any number could wait within a limit of bytes.
pub(crate) fn frame(kind: u16, payload: &[u8]) -> Result<&[u8], WireError> {
    if (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&payload.len()) {
        Ok(payload)
    } else {
        Err(WireError::Length { kind, bytes: payload.len() })
    }
}

/// The packet in a [`MIRROR`] or a [`HEADED_MIRROR`], and what it leaves to the guest.
///
/// # Errors
/// The peer sent something else.
pub fn mirrored(kind: u16, payload: &[u8]) -> Result<(FrameHeader, &[u8]), WireError> {
    if kind == MIRROR {
        return Ok((FrameHeader::default(), frame(kind, payload)?));
    }
    let header = FrameHeader::read(payload).ok_or(WireError::Length { kind, bytes: payload.len() })?;
    let frame = frame(kind, &payload[FrameHeader::BYTES..])?;
    if header.is_within(frame.len()) { Ok((header, frame)) } else { Err(WireError::Header) }
}

impl Isn {
    /// Bytes for the wire; `None` when the flow is not a TCP flow.
    pub fn to_bytes(&self) -> Option<[u8; ISN_BYTES]> {
        let mut bytes = [0; ISN_BYTES];
        bytes[..FLOW_BYTES].copy_from_slice(&flow_to_bytes(&self.flow)?);
        if self.timestamp.is_some() {
            bytes[0] |= WITH_TIMESTAMP;
        }
        bytes[44..48].copy_from_slice(&self.isn.to_be_bytes());
        bytes[48..52].copy_from_slice(&self.timestamp.unwrap_or(0).to_be_bytes());
        // bytes 52..56 are reserved and zero
        Some(bytes)
    }

    /// Reads what [`Isn::to_bytes`] wrote.
    ///
    /// # Errors
    /// The peer sent something else.
    pub fn from_bytes(payload: &[u8]) -> Result<Self, WireError> {
        let Ok(bytes) = <&[u8; ISN_BYTES]>::try_from(payload) else {
            return Err(WireError::Length { kind: ISN, bytes: payload.len() });
        };
        let u32_at = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut flow = [0; FLOW_BYTES];
        flow.copy_from_slice(&bytes[..FLOW_BYTES]);
        flow[0] &= !WITH_TIMESTAMP;
        let Some(flow) = flow_from_bytes(&flow).filter(|_| bytes[52..] == [0; 4]) else {
            return Err(WireError::Isn);
        };
        let timestamp = (bytes[0] & WITH_TIMESTAMP != 0).then(|| u32_at(48));
        Ok(Self { flow, isn: u32_at(44), timestamp })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_isn_survives_the_wire(
            tags in prop::collection::vec(0u16..0x1000, 0..=2),
            v6 in any::<bool>(),
            guest in any::<[u8; 16]>(),
            remote in any::<[u8; 16]>(),
            ports in any::<(u16, u16)>(),
            isn in any::<u32>(),
            timestamp in any::<Option<u32>>(),
        ) {
            let mut vlan = Vlan::default();
            for tag in tags {
                vlan.push(tag);
            }
            let address = |octets: [u8; 16]| -> IpAddr {
                if v6 { octets.into() } else { [octets[0], octets[1], octets[2], octets[3]].into() }
            };
            let transport = Transport::Tcp { guest_port: ports.0, remote_port: ports.1 };
            let flow = FlowKey::Ip { vlan, guest: address(guest), remote: address(remote), transport };
            let isn = Isn { flow, isn, timestamp };
            prop_assert_eq!(Isn::from_bytes(&isn.to_bytes().unwrap()), Ok(isn));
        }

        #[test]
        fn what_is_mirrored_is_a_frame(
            bytes in prop_oneof![0usize..40, FRAME_BYTES_MAX - 20..FRAME_BYTES_MAX + 20],
        ) {
            let is_frame = |bytes| (14..=65_557).contains(&bytes);
            let payload = vec![0; bytes];
            prop_assert_eq!(mirrored(MIRROR, &payload).is_ok(), is_frame(bytes));
            let is_headed_frame = bytes >= 10 && is_frame(bytes - 10);
            prop_assert_eq!(mirrored(HEADED_MIRROR, &payload).is_ok(), is_headed_frame);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), ISN_BYTES)) {
            let _ = Isn::from_bytes(&bytes);
            let _ = Isn::from_bytes(&bytes[1..]);
        }
    }
}
