//! Ethernet frames that are nearly or quite sound, of few flows, so that packets meet packets of their own kind.

use std::net::IpAddr;

use vhost_net_backend::offload::FrameHeader;
use vhost_net_backend::packet::{Addresses, Flags, Kind, Packet, checksum};
use vhost_net_backend::proxy::Buffer;

use super::input::Input;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Flags of TCP segments: mostly those of a connection that goes on.
const FLAGS: [u16; 16] = [
    Flags::SYN,
    Flags::SYN | Flags::ACK,
    Flags::ACK,
    Flags::ACK | Flags::PSH,
    Flags::ACK,
    Flags::ACK | Flags::FIN,
    Flags::ACK | Flags::RST,
    Flags::RST,
    Flags::ACK | Flags::PSH | Flags::FIN,
    Flags::SYN | Flags::FIN,
    Flags::ACK | Flags::URG,
    Flags::SYN | Flags::ACK | Flags::ECE,
    0,
    Flags::FIN,
    Flags::ACK | Flags::CWR,
    Flags::ACK,
];

/// The two ends of a flow.
#[derive(Clone, Copy)]
struct Ends {
    from: IpAddr,
    to: IpAddr,
}

impl Ends {
    fn new(v6: bool, other: bool, to_guest: bool) -> Self {
        let address = |last: u8| -> IpAddr {
            let mut v6_octets = [0; 16];
            (v6_octets[0], v6_octets[15]) = (0xfd, last);
            if v6 { v6_octets.into() } else { [10, 0, 0, last].into() }
        };
        let (guest, remote) = (address(9), address(1 + u8::from(other)));
        if to_guest { Self { from: remote, to: guest } } else { Self { from: guest, to: remote } }
    }

    fn reversed(self) -> Self {
        Self { from: self.to, to: self.from }
    }

    fn octets(self) -> Vec<u8> {
        let octets = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        [octets(self.from), octets(self.to)].concat()
    }

    fn is_v6(self) -> bool {
        self.from.is_ipv6()
    }

    /// An IP packet without options.
    fn packet(self, protocol: u8, content: &[u8]) -> Vec<u8> {
        let mut packet = self.header(protocol, content.len(), &[], [0; 4]);
        packet.extend(content);
        packet
    }

    /// An IP header with options or extensions. `place` are identification and offset of IPv4.
    fn header(self, protocol: u8, content_bytes: usize, extensions: &[u8], place: [u8; 4]) -> Vec<u8> {
        let content_bytes = content_bytes + extensions.len();
        if self.is_v6() {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend((content_bytes as u16).to_be_bytes());
            header.extend([protocol, 64]);
            header.extend(self.octets());
            header.extend(extensions);
            return header;
        }
        let mut header = vec![0x45 + (extensions.len() / 4) as u8, 0];
        header.extend((20 + content_bytes as u16).to_be_bytes());
        header.extend(place);
        header.extend([64, protocol, 0, 0]);
        header.extend(self.octets());
        header.extend(extensions);
        let sum = checksum::of(&[&header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        header
    }

    /// Puts the checksum of a transport over these addresses at its place.
    fn sum(self, protocol: u8, content: &mut [u8]) {
        let at = match protocol {
            TCP => 16,
            UDP => 6,
            ICMP | ICMPV6 => 2,
            _ => return,
        };
        content[at..at + 2].fill(0);
        let sum = if protocol == ICMP {
            checksum::of(&[content])
        } else {
            checksum::of_transport(&self.packet(protocol, &[]), protocol, &[content])
        };
        content[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Data of a stream: what stands at a position is nearly always the same.
fn data(input: &mut Input<'_>, seq: u32) -> Vec<u8> {
    let length = input.byte();
    let pattern = |bytes: usize| -> Vec<u8> {
        (0..bytes as u32).map(|at| (seq.wrapping_add(at) as u8).wrapping_mul(7)).collect()
    };
    match length {
        0..=127 => pattern(usize::from(length % 32)),
        128..=199 => input.bytes(usize::from(length % 16)).to_vec(),
        _ => pattern(256 + 8 * usize::from(length - 200)),
    }
}

fn ports(kind: u8, to_guest: bool) -> [u8; 4] {
    let (guest, remote) = (80, [1, 2, 9, 1][usize::from(kind >> 4 & 3)]);
    if to_guest { [4, remote, 0, guest] } else { [0, guest, 4, remote] }
}

fn tcp(kind: u8, to_guest: bool, input: &mut Input<'_>) -> Vec<u8> {
    let what = input.byte();
    let near_the_end = |byte: u8| 0xffff_ff80_u32.wrapping_add(u32::from(byte));
    let (seq, ack) = (near_the_end(input.byte()), near_the_end(input.byte()));
    let window = u16::from(input.byte()) << 4;
    let mut options = match what >> 4 {
        1 | 2 => vec![2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, input.byte(), 0, 0, 0, 0, 1, 3, 3, what >> 5],
        3..=5 => vec![1, 1, 8, 10, 0, 0, 0, input.byte(), 0, 0, 0, input.byte()],
        6 | 7 => {
            let (first, last) = (near_the_end(input.byte()).to_be_bytes(), near_the_end(input.byte()));
            [&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 5, 10], &first[..], &last.to_be_bytes()].concat()
        }
        8 => {
            let bytes = usize::from(input.byte() % 41);
            input.bytes(bytes).to_vec()
        }
        _ => Vec::new(),
    };
    options.resize(options.len().next_multiple_of(4), 0);
    let flags = FLAGS[usize::from(what % 16)];
    let mut segment = ports(kind, to_guest).to_vec();
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend((((5 + options.len() / 4) as u16) << 12 | flags).to_be_bytes());
    segment.extend(window.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend(options);
    segment.extend(data(input, seq));
    segment
}

/// A message and its protocol.
fn message(kind: u8, ends: Ends, to_guest: bool, input: &mut Input<'_>) -> (u8, Vec<u8>) {
    let icmp = if ends.is_v6() { ICMPV6 } else { ICMP };
    match kind % 16 {
        2 | 3 => {
            let mut datagram = [&ports(kind, to_guest)[..], &[0; 4]].concat();
            datagram.extend(data(input, 0));
            let bytes = datagram.len() as u16;
            datagram[4..6].copy_from_slice(&bytes.to_be_bytes());
            (UDP, datagram)
        }
        4 => {
            let of_type = if ends.is_v6() { [128, 135, 136, 143] } else { [8, 0, 13, 9] };
            let mut message = vec![of_type[usize::from(kind >> 4 & 3)], 0, 0, 0, 0, 1, 0, 2];
            message.extend(data(input, 0));
            (icmp, message)
        }
        5 => {
            // what the other end has sent
            let ends = ends.reversed();
            let mut segment = tcp(kind, !to_guest, input);
            ends.sum(TCP, &mut segment);
            segment.truncate(if kind & 0x40 == 0 { 8 + usize::from(input.byte() % 32) } else { 200 });
            let mut error = vec![if ends.is_v6() { 1 } else { 3 }, 1, 0, 0, 0, 0, 0, 0];
            error.extend(ends.packet(TCP, &segment));
            (icmp, error)
        }
        6 => {
            let protocol = [2, 50, 51, 132][usize::from(kind >> 4 & 3)];
            (protocol, [&[0x22, 0, 0, 0, 0, 0, 0, 7], &data(input, 0)[..]].concat())
        }
        _ => (TCP, tcp(kind, to_guest, input)),
    }
}

/// Headers between that of IPv6 and what is in it, the first one's kind, and where a route leads in the end.
fn extensions(which: u8, protocol: u8, ends: Ends) -> (u8, Vec<u8>) {
    match which {
        1 => (0, vec![protocol, 0, 1, 4, 0, 0, 0, 0]),
        2 => {
            let route = [&[protocol, 2, 4, 1, 0, 0, 0, 0][..], &ends.octets()[16..]].concat();
            (60, [&[43, 0, 1, 4, 0, 0, 0, 0], &route[..]].concat())
        }
        3 => (44, vec![protocol, 0, 0, 0, 0, 0, 0, 5]),
        _ => (protocol, Vec::new()),
    }
}

/// One frame, or the fragments of one, from the guest or to it.
pub(super) fn frames(input: &mut Input<'_>, to_guest: bool) -> Vec<Vec<u8>> {
    let (kind, how) = (input.byte(), input.byte());
    let mut ethernet = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9];
    if to_guest {
        ethernet.rotate_left(6);
    }
    match how & 3 {
        1 => ethernet.extend([0x81, 0, 0, 5]),
        2 => ethernet.extend([0x88, 0xa8, 0, 6, 0x81, 0, 0, 5]),
        3 if kind & 0x80 != 0 => ethernet.extend([0x81, 0, 0x20, 0]),
        _ => {}
    }
    let payload_at = ethernet.len() + 2;
    match kind % 16 {
        0 => {
            ethernet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + (kind >> 4 & 1), 2, 0, 0, 0, 0, 9, 10, 0, 0, 9]);
            ethernet.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, input.byte()]);
            return vec![ethernet];
        }
        1 => {
            let bytes = usize::from(input.byte());
            if kind & 0x40 == 0 {
                ethernet.extend([[8, 0], [0x86, 0xdd], [8, 6], [0x88, 0xb5]][usize::from(kind >> 4 & 3)]);
            } else if kind & 0x20 == 0 {
                ethernet.extend([0, 20, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0]);
            } else {
                ethernet.clear();
            }
            ethernet.extend(input.bytes(bytes));
            return vec![ethernet];
        }
        _ => {}
    }
    let v6 = how & 4 != 0;
    let ends = Ends::new(v6, kind & 0x80 != 0, to_guest);
    let (protocol, mut content) = message(kind, ends, to_guest, input);
    ends.sum(protocol, &mut content);
    if how & 0x80 != 0 {
        let at = usize::from(input.byte()) % content.len();
        content[at] ^= input.byte();
    }
    ethernet.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    let mut frames = match how >> 5 & 3 {
        1 if kind % 16 < 12 => fragments(&ethernet, ends, protocol, &content, input),
        _ => {
            let which = how >> 3 & 3;
            let (protocol, extensions) = if v6 {
                extensions(which, protocol, ends)
            } else {
                (protocol, vec![1; [0, 0, 4, 40][usize::from(which)]])
            };
            let header = ends.header(protocol, content.len(), &extensions, [0, 1, 0x40, 0]);
            vec![[&ethernet[..], &header, &content].concat()]
        }
    };
    if how & 0x60 == 0x60 {
        // padding, a lie in a header, or an end
        let frame = &mut frames[0];
        match input.byte() {
            0..=63 => frame.resize(frame.len() + 8, 0),
            64..=127 => frame.truncate(usize::from(input.byte())),
            at => {
                let at = (payload_at + usize::from(at % 64)).min(frame.len() - 1);
                frame[at] = input.byte();
            }
        }
    }
    frames
}

fn fragments(
    ethernet: &[u8],
    ends: Ends,
    protocol: u8,
    content: &[u8],
    input: &mut Input<'_>,
) -> Vec<Vec<u8>> {
    let (identification, how) = (input.byte() % 4, input.byte());
    let piece_bytes = 8 * (1 + usize::from(how % 8) * 5);
    let pieces = content.chunks(piece_bytes).count();
    let fragment = |(index, piece): (usize, &[u8])| {
        let (offset, more) = ((index * piece_bytes / 8) as u16, index + 1 < pieces);
        let header = if ends.is_v6() {
            let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
            ends.header(44, piece.len(), &[protocol, 0, high, low, 0, 0, 0, identification], [0; 4])
        } else {
            let [high, low] = (offset | u16::from(more) << 13).to_be_bytes();
            ends.header(protocol, piece.len(), &[], [0, identification, high, low])
        };
        [ethernet, &header, piece].concat()
    };
    let mut all: Vec<_> = content.chunks(piece_bytes).enumerate().map(fragment).collect();
    match how >> 3 & 7 {
        1 => all.reverse(),
        2 => drop(all.remove(0)),
        3 if all.len() > 1 => drop(all.pop()),
        4 => all.push(all[0].clone()),
        _ => {}
    }
    if all.is_empty() { vec![ethernet.to_vec()] } else { all }
}

/// The frame with its TCP sequence number, and what of the peer's it acknowledges left alone, moved on.
pub(super) fn renumbered(frame: &[u8], by: u32) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if let Kind::Tcp { segment, .. } = Packet::parse(&frame).kind {
        let seq = segment.seq.wrapping_add(by).to_be_bytes();
        segment.change(&mut frame, checksum::Checksum::Complete, segment.at + 4, &seq);
    }
    frame
}

/// A header that may be in front of this frame: often none.
pub(super) fn header(input: &mut Input<'_>, frame: &[u8]) -> FrameHeader {
    let how = input.byte();
    let mut bytes = [0; FrameHeader::BYTES];
    match how % 8 {
        0 => {
            if let Kind::Tcp { segment, addresses } = Packet::parse(frame).kind {
                let of = if addresses.source.is_ipv4() { 1 } else { 4 };
                let gso = if how & 8 != 0 { of } else { 0 };
                let [low, high] = (segment.at as u16).to_le_bytes();
                bytes = [1, gso, 0, 0, if gso > 0 { 100 } else { 0 }, 0, low, high, 16, 0];
            }
        }
        1 => {
            let from = input.bytes(FrameHeader::BYTES);
            bytes[..from.len()].copy_from_slice(from);
        }
        _ => {}
    }
    FrameHeader::read(&bytes).filter(|header| header.is_within(frame.len())).unwrap_or_default()
}

pub(super) fn buffer(header: FrameHeader, frame: &[u8]) -> Buffer {
    let mut buffer = Buffer::from(frame);
    buffer.set_header(header);
    buffer
}

/// Whether the checksum of a segment is the right one.
pub(super) fn is_right(addresses: &Addresses, segment: &[u8]) -> bool {
    checksum::of_tcp(addresses, segment) == 0
}
