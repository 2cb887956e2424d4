//! What a sender has left to the one behind it, done: a checksum completed, and a large frame cut into the segments that
//! it stands for (virtio 1.2 §5.1.6; for UDP as Linux's UDP_SEGMENT does it).

use std::ops::Range;

use super::{Kind, PROTOCOL_TCP, PROTOCOL_UDP, Packet, Transport, checksum};
use crate::packet::tcp::Flags;

const UDP_HEADER_BYTES: usize = 8;

/// Puts the checksum over `frame[start..]` where it belongs, `offset` bytes behind `start`. The sum over the pseudo header
/// stands there already. Returns false, and changes nothing, when that is outside of the frame.
pub fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) -> bool {
    let at = start + offset;
    if at + 2 > frame.len() {
        return false;
    }
    let sum = never_zero(checksum::of(&[&frame[start..]]));
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// 0 says that there is no checksum where UDP has a choice, and is the same number as 0xffff everywhere (RFC 768).
fn never_zero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

/// What a large frame is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Large {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over either.
    Udp,
}

/// The segments of a large frame, one after the other. The frame itself stays with the caller.
#[derive(Clone, Debug)]
pub struct Segments {
    network_at: usize,
    transport_at: usize,
    payload: Range<usize>,
    protocol: u8,
    is_v4: bool,
    /// Bytes of payload in each but the last.
    size: usize,
    /// How many have been made.
    made: usize,
}

impl Segments {
    /// Of a frame with `size` bytes of payload in each segment. `None` when it is not what it is said to be.
    pub fn new(frame: &[u8], large: Large, size: usize) -> Option<Self> {
        let packet = Packet::parse(frame);
        let is_v4 = frame.get(packet.network_at)? >> 4 == 4;
        let (protocol, transport_at, payload) = match packet.kind {
            Kind::Tcp { segment, .. } => (PROTOCOL_TCP, segment.at, segment.payload),
            Kind::Datagram { transport: Transport::Udp { .. }, content, .. } => {
                (PROTOCOL_UDP, content.start - UDP_HEADER_BYTES, content)
            }
            _ => return None,
        };
        let as_said = match large {
            Large::TcpV4 => protocol == PROTOCOL_TCP && is_v4,
            Large::TcpV6 => protocol == PROTOCOL_TCP && !is_v4,
            Large::Udp => protocol == PROTOCOL_UDP,
        };
        (as_said && size > 0).then_some(Self {
            network_at: packet.network_at,
            transport_at,
            payload,
            protocol,
            is_v4,
            size,
            made: 0,
        })
    }

    /// Whether there is a next one.
    pub fn has_more(&self) -> bool {
        // one without payload is one segment
        self.made == 0 || self.payload.start + self.made * self.size < self.payload.end
    }

    /// Makes the next one: its headers, and where in the frame its payload lies. `None` when there are no more.
    pub fn next(&mut self, frame: &[u8], headers: &mut Vec<u8>) -> Option<Range<usize>> {
        if !self.has_more() {
            return None;
        }
        let start = self.payload.start + self.made * self.size;
        let end = self.payload.end.min(start + self.size);
        headers.clear();
        headers.extend_from_slice(&frame[..self.payload.start]);
        self.set_network(headers, end - start);
        let udp_without_checksum =
            self.protocol == PROTOCOL_UDP && frame[self.transport_at + 6..][..2] == [0, 0];
        if self.protocol == PROTOCOL_TCP {
            self.set_tcp(headers, end == self.payload.end);
        } else {
            let bytes = (UDP_HEADER_BYTES + end - start) as u16;
            headers[self.transport_at + 4..][..2].copy_from_slice(&bytes.to_be_bytes());
        }
        if !udp_without_checksum {
            self.set_checksum(headers, &frame[start..end]);
        }
        self.made += 1;
        Some(start..end)
    }

    fn set_network(&self, headers: &mut [u8], payload_bytes: usize) {
        let ip = &mut headers[self.network_at..];
        let bytes = self.payload.start - self.network_at + payload_bytes;
        if !self.is_v4 {
            const FIXED_BYTES: usize = 40;
            ip[4..6].copy_from_slice(&((bytes - FIXED_BYTES) as u16).to_be_bytes());
            return;
        }
        ip[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
        let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(self.made as u16);
        ip[4..6].copy_from_slice(&id.to_be_bytes());
        ip[10..12].fill(0);
        let sum = checksum::of(&[&ip[..usize::from(ip[0] & 0x0f) * 4]]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }

    fn set_tcp(&self, headers: &mut [u8], last: bool) {
        let tcp = &mut headers[self.transport_at..];
        let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let seq = seq.wrapping_add((self.made * self.size) as u32);
        tcp[4..8].copy_from_slice(&seq.to_be_bytes());
        if !last {
            tcp[13] &= !((Flags::FIN | Flags::PSH) as u8);
        }
        // RFC 3168 §6.1.2: said once
        if self.made > 0 {
            tcp[13] &= !(Flags::CWR as u8);
        }
    }

    fn set_checksum(&self, headers: &mut [u8], payload: &[u8]) {
        let at = self.transport_at + if self.protocol == PROTOCOL_TCP { 16 } else { 6 };
        headers[at..at + 2].fill(0);
        let pieces = [&headers[self.transport_at..], payload];
        let sum = checksum::of_transport(&headers[self.network_at..], self.protocol, &pieces);
        headers[at..at + 2].copy_from_slice(&never_zero(sum).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]);
    const SEQ: u32 = 0xffff_fc00;
    const ID_AT: usize = 4;

    /// A large frame, with or without a VLAN tag.
    fn large(large: Large, v6: bool, tagged: bool, flags: u16, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(MACS.0, MACS.1);
        let ip = if v6 {
            builder.ipv6([0xfd; 16], [0xfe; 16], 64)
        } else {
            builder.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 64)
        };
        let mut frame = Vec::new();
        if large == Large::Udp {
            ip.udp(53, 1024).write(&mut frame, payload).unwrap();
        } else {
            let tcp = ip.tcp(80, 1024, SEQ, 512).ack(7).options(&[TcpOptionElement::Timestamp(3, 4)]);
            tcp.unwrap().write(&mut frame, payload).unwrap();
            let at = if v6 { 54 } else { 34 };
            frame[at + 13] |= flags as u8;
        }
        if !v6 {
            frame[14 + ID_AT..14 + ID_AT + 2].copy_from_slice(&[0xff, 0xff]);
        }
        if tagged {
            frame.splice(12..12, [0x81, 0, 0x20, 7]);
        }
        frame
    }

    fn segments(frame: &[u8], large: Large, size: usize) -> Vec<Vec<u8>> {
        let mut segments = Segments::new(frame, large, size).unwrap();
        let mut headers = Vec::new();
        let next = || {
            let payload = segments.next(frame, &mut headers)?;
            Some([&headers[..], &frame[payload]].concat())
        };
        std::iter::from_fn(next).collect()
    }

    /// Checks lengths and checksums as etherparse reads them. Returns the payload.
    fn checked(frame: &[u8]) -> Vec<u8> {
        let sliced = SlicedPacket::from_ethernet(frame).unwrap();
        let (v4, v6) = match sliced.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                assert_eq!(header.to_header().calc_header_checksum(), header.header_checksum());
                assert_eq!(usize::from(header.total_len()) + (frame.len() - ip_bytes(frame)), frame.len());
                (Some((header.source(), header.destination())), None)
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                assert_eq!(usize::from(header.payload_length()) + 40, ip_bytes(frame));
                (None, Some((header.source(), header.destination())))
            }
            NetSlice::Arp(_) => unreachable!(),
        };
        match sliced.transport.unwrap() {
            TransportSlice::Tcp(tcp) => {
                let sum = match (v4, v6) {
                    (Some((from, to)), _) => tcp.calc_checksum_ipv4(from, to).unwrap(),
                    (_, Some((from, to))) => tcp.calc_checksum_ipv6(from, to).unwrap(),
                    _ => unreachable!(),
                };
                assert!(tcp.checksum() == sum || tcp.checksum() == !sum && sum == 0);
                tcp.payload().to_vec()
            }
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
                let sum = match (v4, v6) {
                    (Some((from, to)), _) => header.calc_checksum_ipv4_raw(from, to, udp.payload()).unwrap(),
                    (_, Some((from, to))) => header.calc_checksum_ipv6_raw(from, to, udp.payload()).unwrap(),
                    _ => unreachable!(),
                };
                assert_eq!(udp.checksum(), sum);
                udp.payload().to_vec()
            }
            other => unreachable!("{other:?}"),
        }
    }

    /// What the frame has behind its Ethernet header.
    fn ip_bytes(frame: &[u8]) -> usize {
        frame.len() - Packet::parse(frame).network_at
    }

    fn tcp(frame: &[u8]) -> crate::packet::Segment {
        let Kind::Tcp { segment, .. } = Packet::parse(frame).kind else { panic!("no TCP") };
        segment
    }

    fn kinds() -> impl Strategy<Value = (Large, bool)> {
        prop_oneof![
            Just((Large::TcpV4, false)),
            Just((Large::TcpV6, true)),
            Just((Large::Udp, false)),
            Just((Large::Udp, true)),
        ]
    }

    proptest! {
        #[test]
        fn the_segments_are_the_frame(
            (kind, v6) in kinds(),
            tagged: bool,
            flags in 0u16..0x100,
            payload in prop::collection::vec(any::<u8>(), 0..9000),
            size in 1usize..3000,
        ) {
            // without SYN and RST, which no large frame has
            let flags = flags & !0x26;
            let frame = large(kind, v6, tagged, flags, &payload);
            let parts = segments(&frame, kind, size);
            prop_assert_eq!(parts.len(), payload.len().div_ceil(size).max(1));
            let mut whole = Vec::new();
            for (number, part) in parts.iter().enumerate() {
                let (first, last) = (number == 0, number + 1 == parts.len());
                let data = checked(part);
                prop_assert!(last || data.len() == size);
                // addresses, tag, types
                let network_at = Packet::parse(&frame).network_at;
                prop_assert_eq!(&part[..network_at], &frame[..network_at]);
                if !v6 {
                    let at = network_at + ID_AT;
                    let id = u16::from_be_bytes([part[at], part[at + 1]]);
                    prop_assert_eq!(id, 0xffff_u16.wrapping_add(number as u16));
                }
                if kind != Large::Udp {
                    let (asked, seen) = (tcp(&frame), tcp(part));
                    prop_assert_eq!(seen.seq, SEQ.wrapping_add(whole.len() as u32));
                    let once = |at: bool, bits: u16| if at { 0 } else { bits };
                    let without = once(last, Flags::FIN | Flags::PSH) | once(first, Flags::CWR);
                    prop_assert_eq!(seen.flags.0, asked.flags.0 & !without);
                    prop_assert_eq!((seen.ack, seen.window), (asked.ack, asked.window));
                    prop_assert_eq!(seen.timestamps(part), asked.timestamps(&frame));
                }
                whole.extend(data);
            }
            prop_assert_eq!(whole, payload);
        }

        /// Whatever a frame and its header claim, nothing is read outside of it.
        #[test]
        fn any_bytes_are_allowed(
            (kind, v6) in kinds(),
            changes in prop::collection::vec((0usize..80, any::<u8>()), 0..8),
            keep in 0usize..200,
            size in 0usize..100,
            (start, offset) in (0usize..0x1_0000, 0usize..0x1_0000),
        ) {
            let mut frame = large(kind, v6, false, 0, &[7; 100]);
            for (at, byte) in changes {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            frame.truncate(keep);
            if let Some(mut segments) = Segments::new(&frame, kind, size) {
                let mut headers = Vec::new();
                while let Some(payload) = segments.next(&frame, &mut headers) {
                    prop_assert!(payload.end <= frame.len());
                }
            }
            let before = frame.clone();
            if !complete_checksum(&mut frame, start, offset) {
                prop_assert_eq!(frame, before);
            }
        }

        #[test]
        fn a_checksum_that_was_left_to_us_is_right((kind, v6) in kinds(), payload in prop::collection::vec(any::<u8>(), 0..1400)) {
            let mut frame = large(kind, v6, false, 0, &payload);
            let start = if v6 { 54 } else { 34 };
            let offset = if kind == Large::Udp { 6 } else { 16 };
            let protocol = if kind == Large::Udp { PROTOCOL_UDP } else { PROTOCOL_TCP };
            let addresses = if v6 { 22..54 } else { 26..34 };
            let bytes = (frame.len() - start) as u32;
            let pseudo = !checksum::of(&[&frame[addresses], &bytes.to_be_bytes(), &[0, protocol]]);
            frame[start + offset..][..2].copy_from_slice(&pseudo.to_be_bytes());
            prop_assert!(complete_checksum(&mut frame, start, offset));
            prop_assert_eq!(checked(&frame), payload);
        }
    }

    #[test]
    fn udp_without_a_checksum_stays_without() {
        let mut frame = large(Large::Udp, false, false, 0, &[1; 10]);
        frame[40..42].fill(0);
        let parts = segments(&frame, Large::Udp, 4);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [46, 46, 44]);
        assert!(parts.iter().all(|part| part[40..42] == [0, 0]));
    }

    #[test]
    fn what_it_is_not_it_is_not() {
        let tcp = large(Large::TcpV4, false, false, 0, &[1; 100]);
        let udp = large(Large::Udp, true, false, 0, &[1; 100]);
        for (frame, large, size) in [
            (&tcp[..], Large::TcpV6, 10),
            (&tcp, Large::Udp, 10),
            (&tcp, Large::TcpV4, 0),
            (&tcp[..60], Large::TcpV4, 10),
            (&udp, Large::TcpV6, 10),
            (&[], Large::Udp, 10),
        ] {
            assert!(Segments::new(frame, large, size).is_none(), "{large:?}");
        }
    }
}
