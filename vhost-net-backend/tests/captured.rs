//! Packets that real stacks sent (captured/README.md): the parser knows what they are, and what the rewriter makes of them
//! is right to the last checksum, as etherparse sees it.

use std::collections::{BTreeMap, HashMap};

use etherparse::{IpFragOffset, NetSlice, SlicedPacket, TransportSlice};
use vhost_net_backend::offload::FrameHeader;
use vhost_net_backend::packet::checksum;
use vhost_net_backend::packet::{Flags, FlowKey, Kind, Packet, Quoted, edge_positions};
use vhost_net_backend::proxy::{Action, Actions};
use vhost_net_backend::rewrite::{Exit, Limits, Rewriter};
use vhost_net_backend::wire::Isn;

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const EXIT: Exit = Exit::Peer { epoch: 1 };
/// How far the numbers of the SVM, which is the guest of the capture, are ahead of the PVM's.
const SEQ_SHIFT: u32 = 0xcafe_0123;
const TIMESTAMP_SHIFT: u32 = 1_000_000;

const TCP: [&str; 5] = ["tcp-sack", "tcp-simultaneous", "tcp6", "quoted", "quoted6"];

/// The frames of a capture.
fn frames(name: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/tests/captured/{name}.pcap", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(path).unwrap();
    const FILE_HEADER_BYTES: usize = 24;
    const HEADER_BYTES: usize = 16;
    assert_eq!(bytes[..4], 0xa1b2_c3d4_u32.to_le_bytes());
    let mut rest = &bytes[FILE_HEADER_BYTES..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        frames.push(rest[HEADER_BYTES..][..length].to_vec());
        rest = &rest[HEADER_BYTES + length..];
    }
    frames
}

fn is_from_guest(frame: &[u8]) -> bool {
    frame[6..12] == GUEST_MAC
}

/// How often each kind of flow occurs, by the first word of its name.
fn kinds(name: &str) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for frame in frames(name) {
        let flow = Packet::parse(&frame).flow_from_guest(&frame).to_string();
        let kind = flow.split(" 10.").next().unwrap().split(" fd").next().unwrap();
        let kind = kind.split(" fe").next().unwrap().split(" [").next().unwrap();
        *kinds.entry(kind.to_owned()).or_default() += 1;
    }
    kinds
}

#[test]
fn each_frame_is_what_it_is() {
    for (name, expected) in [
        ("tcp-sack", vec![("tcp", 26)]),
        ("tcp-simultaneous", vec![("tcp", 14)]),
        ("tcp6", vec![("tcp", 11)]),
        ("fragments", vec![("fragments of protocol 1", 4), ("fragments of protocol 17", 4)]),
        ("groups", vec![("icmp type 143 code 0", 4), ("protocol 2", 4)]),
        ("quoted", vec![("icmp type 3 code 4", 1), ("tcp", 12)]),
        ("quoted6", vec![("icmp type 2 code 0", 1), ("tcp", 12)]),
    ] {
        let expected: BTreeMap<_, _> = expected.into_iter().map(|(kind, n)| (kind.to_owned(), n)).collect();
        assert_eq!(kinds(name), expected, "{name}");
    }
}

/// etherparse finds all checksums right.
fn checked(frame: &[u8]) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (from, to) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.to_header().calc_header_checksum(), header.header_checksum());
            (header.source().to_vec(), header.destination().to_vec())
        }
        NetSlice::Ipv6(ip) => (ip.header().source().to_vec(), ip.header().destination().to_vec()),
        NetSlice::Arp(_) => unreachable!(),
    };
    match sliced.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => {
            let sum = match from.len() {
                4 => tcp.calc_checksum_ipv4(from.try_into().unwrap(), to.try_into().unwrap()),
                _ => tcp.calc_checksum_ipv6(from.try_into().unwrap(), to.try_into().unwrap()),
            };
            assert_eq!(tcp.checksum(), sum.unwrap());
        }
        TransportSlice::Icmpv4(icmp) => {
            assert_eq!(icmp.icmp_type().calc_checksum(icmp.payload()), icmp.checksum());
        }
        TransportSlice::Icmpv6(icmp) => {
            assert!(icmp.is_checksum_valid(from.try_into().unwrap(), to.try_into().unwrap()));
        }
        other => unreachable!("{other:?}"),
    }
}

/// The capture's frame as the client and the PVM have it, whose numbers are behind the SVM's.
fn of_pvm(captured: &[u8]) -> Vec<u8> {
    let mut frame = captured.to_vec();
    let packet = Packet::parse(captured);
    let mut set_back = |at: usize, by: u32| {
        let place = &mut frame[at..at + 4];
        let number = u32::from_be_bytes(place.try_into().unwrap()).wrapping_sub(by);
        place.copy_from_slice(&number.to_be_bytes());
    };
    match &packet.kind {
        Kind::Tcp { addresses, segment } => {
            let timestamps = segment.timestamps(captured);
            if is_from_guest(captured) {
                set_back(segment.at + 4, SEQ_SHIFT);
                timestamps.iter().for_each(|timestamps| set_back(timestamps.at, TIMESTAMP_SHIFT));
            } else if segment.flags.has(Flags::ACK) {
                set_back(segment.at + 8, SEQ_SHIFT);
                edge_positions(segment, captured).for_each(|at| set_back(at, SEQ_SHIFT));
                timestamps.iter().for_each(|timestamps| set_back(timestamps.at + 4, TIMESTAMP_SHIFT));
            }
            let field = segment.at + 16..segment.at + 18;
            frame[field.clone()].fill(0);
            let sum = checksum::of_tcp(addresses, &frame[segment.at..]);
            frame[field].copy_from_slice(&sum.to_be_bytes());
        }
        Kind::Datagram { addresses, content, .. } => {
            let quoted = Quoted::find(&packet, captured).unwrap();
            set_back(quoted.tcp.start + 4, SEQ_SHIFT);
            // the segment's own checksum, as if it had been sent with this number
            let seq = frame[quoted.tcp.start + 4..][..4].to_vec();
            let mut header = captured[quoted.tcp.start..][..20].to_vec();
            checksum::replace(&mut header, 16, 0, 4, &seq);
            frame[quoted.tcp.start..][..20].copy_from_slice(&header);
            frame[content.start + 2..content.start + 4].fill(0);
            let icmp = &frame[content.clone()];
            let sum = match (addresses.source.is_ipv4(), packet.network_at) {
                (true, _) => checksum::of(&[icmp]),
                (false, ip_at) => checksum::of_transport(&frame[ip_at..], 58, &[icmp]),
            };
            frame[content.start + 2..content.start + 4].copy_from_slice(&sum.to_be_bytes());
        }
        other => panic!("{other:?}"),
    }
    checked(&frame);
    frame
}

/// The one frame that comes of another.
fn rewritten(actions: &mut Actions) -> Vec<u8> {
    let mut frames: Vec<Vec<u8>> = actions
        .iter()
        .map(|action| match action {
            Action::ToPeer { payload, .. } => payload.to_vec(),
            Action::ToGuest(frame) => frame.to_vec(),
            other => panic!("{other:?}"),
        })
        .collect();
    actions.clear();
    assert_eq!(frames.len(), 1);
    frames.remove(0)
}

fn tagged(frame: &[u8], tags: &[u8]) -> Vec<u8> {
    [&frame[..12], tags, &frame[12..]].concat()
}

/// The checksum field as a stack leaves it to its card.
fn open_checksum(frame: &mut [u8]) -> bool {
    let Kind::Tcp { addresses, segment } = Packet::parse(frame).kind else {
        return false;
    };
    let pseudo = !checksum::of_tcp(&addresses, &vec![0; frame.len() - segment.at]);
    frame[segment.at + 16..segment.at + 18].copy_from_slice(&pseudo.to_be_bytes());
    true
}

fn complete_checksum(frame: &mut [u8]) {
    if let Kind::Tcp { segment, .. } = Packet::parse(frame).kind {
        let sum = checksum::of(&[&frame[segment.at..]]);
        frame[segment.at + 16..segment.at + 18].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Plays a capture, whose guest is the SVM, through a rewriter that has heard of a PVM with other numbers.
fn is_rewritten_right(name: &str, tags: &[u8], partial: bool) {
    let mut rewriter = Rewriter::new(Limits::default());
    let mut actions = Actions::new();
    let mut begun: HashMap<FlowKey, u32> = HashMap::new();
    let mut changed = 0;
    for captured in frames(name) {
        let captured = tagged(&captured, tags);
        checked(&captured);
        let from_guest = is_from_guest(&captured);
        let of_pvm = of_pvm(&captured);
        let packet = Packet::parse(&of_pvm);
        if let (Kind::Tcp { segment, .. }, true) = (&packet.kind, from_guest) {
            let flow = packet.flow_from_guest(&of_pvm);
            if segment.flags.has(Flags::SYN) && begun.insert(flow, segment.seq) != Some(segment.seq) {
                let timestamp = segment.timestamps(&of_pvm).map(|timestamps| timestamps.value);
                let isn = Isn { flow, isn: segment.seq, timestamp };
                rewriter.pvm_begins(&isn, 1, EXIT, &mut actions);
            }
        }
        let (mut given, expected) = if from_guest { (captured, of_pvm) } else { (of_pvm, captured) };
        let is_open = partial && open_checksum(&mut given);
        let header = FrameHeader::read(&[u8::from(is_open), 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        if from_guest {
            rewriter.outbound(header, &given, 1, EXIT, &mut actions);
        } else {
            rewriter.inbound(header, &given, 1, &mut actions);
        }
        let mut result = rewritten(&mut actions);
        if is_open {
            complete_checksum(&mut result);
        }
        checked(&result);
        assert_eq!(result, expected, "{name}");
        changed += usize::from(result != given);
    }
    assert!(changed > 5);
}

#[test]
fn what_the_rewriter_changes_is_right_to_the_last_checksum() {
    for name in TCP {
        for tags in [&[][..], &[0x81, 0, 0, 7], &[0x88, 0xa8, 0, 100, 0x81, 0, 0, 7], &[0x91, 0, 0xa0, 9]] {
            for partial in [false, true] {
                is_rewritten_right(name, tags, partial);
            }
        }
    }
}

#[test]
fn real_fragments_have_all_of_their_datagrams() {
    let mut bytes: BTreeMap<u8, usize> = BTreeMap::new();
    for frame in frames("fragments") {
        let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
        let packet = Packet::parse(&frame);
        let Kind::Datagram { place, content, .. } = &packet.kind else { panic!("{packet:?}") };
        let (offset, more, version) = match sliced.net.unwrap() {
            NetSlice::Ipv4(ip) => (ip.header().fragments_offset(), ip.header().more_fragments(), 4),
            NetSlice::Ipv6(ip) => {
                let extension = ip.extensions().clone().into_iter().find_map(|extension| match extension {
                    etherparse::Ipv6ExtensionSlice::Fragment(fragment) => Some(fragment.to_header()),
                    _ => None,
                });
                let extension = extension.unwrap();
                (extension.fragment_offset, extension.more_fragments, 6)
            }
            NetSlice::Arp(_) => unreachable!(),
        };
        let said = if version == 4 { place & 0x1fff } else { place >> 3 };
        assert_eq!(IpFragOffset::try_new(said).unwrap(), offset);
        assert_eq!(if version == 4 { place & 0x2000 != 0 } else { place & 1 != 0 }, more);
        *bytes.entry(version).or_default() += content.len();
    }
    // UDP header and data; over IPv4 the echo and its answer too
    assert_eq!(bytes, BTreeMap::from([(4, 2008 + 2 * 1508), (6, 2008)]));
}
