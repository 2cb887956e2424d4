//! Frames made by etherparse, and any bytes.

use std::net::IpAddr;

use etherparse::{PacketBuilder, TcpOptionElement};
use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn tcp_frame(options: &[TcpOptionElement], payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(MAC, [2, 0, 0, 0, 0, 2])
        .single_vlan(etherparse::VlanId::try_new(7).unwrap())
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(80, 4000, 0xffff_fff0, 1000)
        .ack(77)
        .options(options)
        .unwrap();
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn segment(packet: &Packet) -> &Segment {
    match &packet.kind {
        Kind::Tcp { segment, .. } => segment,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tcp_segment_behind_a_tag_is_found_and_padding_is_not_data() {
    let mut frame = tcp_frame(&[], b"data");
    frame.extend([0; 10]);
    let packet = Packet::parse(&frame);
    let segment = segment(&packet);
    assert_eq!(&frame[segment.payload.clone()], b"data");
    assert_eq!((segment.seq, segment.ack, segment.window), (0xffff_fff0, 77, 1000));
    assert_eq!(segment.seq_end(), 0xffff_fff4);
    assert_eq!(packet.vlan.tags(), [7]);
    let flow = packet.flow_from_guest(&frame);
    assert_eq!(flow.to_string(), "tcp 10.0.0.1:80 -> 10.0.0.2:4000 vlan 7");
    assert!(flow.is_tcp());
}

#[test]
fn both_directions_have_one_name() {
    let frame = tcp_frame(&[], b"");
    let mut back = Vec::new();
    PacketBuilder::ethernet2(MAC, MAC)
        .single_vlan(etherparse::VlanId::try_new(7).unwrap())
        .ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64)
        .tcp(4000, 80, 5, 1000)
        .write(&mut back, b"")
        .unwrap();
    assert_eq!(Some(Packet::parse(&frame).flow_from_guest(&frame)), Packet::parse(&back).tcp_flow_to_guest());
}

#[test]
fn options_are_found_at_odd_places_too() {
    let options = [
        TcpOptionElement::MaximumSegmentSize(1460),
        TcpOptionElement::WindowScale(7),
        TcpOptionElement::SelectiveAcknowledgementPermitted,
        TcpOptionElement::Timestamp(0x0102_0304, 5),
    ];
    let frame = tcp_frame(&options, b"x");
    let packet = Packet::parse(&frame);
    let segment = segment(&packet);
    let expected =
        SynOptions { mss: Some(1460), window_scale: Some(7), sack_permitted: true, timestamps: true };
    assert_eq!(segment.syn_options(&frame), expected);
    let timestamps = segment.timestamps(&frame).unwrap();
    assert_eq!((timestamps.value, timestamps.echo), (0x0102_0304, 5));
    assert_eq!(frame[timestamps.at..timestamps.at + 4], [1, 2, 3, 4]);

    let sack = [
        TcpOptionElement::Noop,
        TcpOptionElement::SelectiveAcknowledgement((1, 2), [Some((3, 4)), None, None]),
    ];
    let frame = tcp_frame(&sack, b"x");
    let packet = Packet::parse(&frame);
    let edges: Vec<u32> = edge_positions(self::segment(&packet), &frame)
        .map(|at| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()))
        .collect();
    assert_eq!(edges, [1, 2, 3, 4]);
}

#[test]
fn udp_icmp_and_fragments_are_datagrams() {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MAC, MAC)
        .ipv6([1; 16], [2; 16], 64)
        .udp(53, 1024)
        .write(&mut frame, b"answer")
        .unwrap();
    let packet = Packet::parse(&frame);
    let Kind::Datagram { content, transport, place, .. } = &packet.kind else {
        panic!("{packet:?}");
    };
    assert_eq!((&frame[content.clone()], *place), (&b"answer"[..], 0));
    assert_eq!(*transport, Transport::Udp { guest_port: 53, remote_port: 1024 });

    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MAC, MAC)
        .ipv4([1; 4], [2; 4], 64)
        .icmpv4_echo_reply(9, 1)
        .write(&mut frame, b"ping")
        .unwrap();
    let packet = Packet::parse(&frame);
    let Kind::Datagram { transport, .. } = &packet.kind else {
        panic!("{packet:?}");
    };
    assert_eq!(*transport, Transport::Icmp { kind: [0, 0], identifier: 9, discovery: false });

    // make a first fragment of it
    frame[20] |= 0x20;
    let packet = Packet::parse(&frame);
    let Kind::Datagram { transport, place, .. } = &packet.kind else {
        panic!("{packet:?}");
    };
    assert_eq!((*transport, *place), (Transport::Fragment { protocol: 1 }, 0x2000));
}

#[test]
fn ipv6_extension_headers_are_looked_behind() {
    let mut frame = Vec::new();
    frame.extend([0; 12]);
    frame.extend(ETHERTYPE_IPV6.to_be_bytes());
    let tcp = [0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0, b'!'];
    frame.extend([0x60, 0, 0, 0, 0, 8 + tcp.len() as u8, EXTENSION, 64]);
    frame.extend([1; 16]);
    frame.extend([2; 16]);
    frame.extend([PROTOCOL_TCP, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend(tcp);
    const EXTENSION: u8 = 60;
    let packet = Packet::parse(&frame);
    assert_eq!(&frame[segment(&packet).payload.clone()], b"!");
    let Kind::Tcp { addresses, .. } = packet.kind else { unreachable!() };
    assert_eq!(addresses.destination, IpAddr::from([2; 16]));
}

#[test]
fn what_lies_about_its_length_is_opaque() {
    let frame = tcp_frame(&[], b"data");
    for bytes in 0..frame.len() {
        assert_eq!(Packet::parse(&frame[..bytes]).kind, Kind::Opaque, "{bytes} bytes");
    }
}

/// Bytes that look like a frame far enough to reach deep into the parser.
pub(crate) fn frame_like() -> impl Strategy<Value = Vec<u8>> {
    let ethertype = prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100, 0x88a8, 0x1234]);
    let bytes = prop::collection::vec(any::<u8>(), 0..160);
    (bytes, ethertype.clone(), ethertype, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(mut bytes, outer, inner, protocol, honest)| {
            if bytes.len() < 60 {
                return bytes;
            }
            bytes[12..14].copy_from_slice(&outer.to_be_bytes());
            let mut at = 14;
            if outer == 0x8100 || outer == 0x88a8 {
                bytes[16..18].copy_from_slice(&inner.to_be_bytes());
                at = 18;
            }
            let protocol = [6, 17, 1, 58, 44, 0][protocol.index(6)];
            if honest {
                let left = bytes.len() - at;
                if bytes[at - 2..at] == [0x08, 0x00] {
                    bytes[at] = 0x45;
                    bytes[at + 2..at + 4].copy_from_slice(&(left as u16).to_be_bytes());
                    bytes[at + 6..at + 8].copy_from_slice(&[0, 0]);
                    bytes[at + 9] = protocol;
                } else if bytes[at - 2..at] == [0x86, 0xdd] && left >= 40 {
                    bytes[at] = 0x60;
                    bytes[at + 4..at + 6].copy_from_slice(&(left as u16 - 40).to_be_bytes());
                    bytes[at + 6] = protocol;
                }
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(frame in frame_like()) {
        let packet = Packet::parse(&frame);
        let _ = packet.flow_from_guest(&frame).to_string();
        let _ = packet.tcp_flow_to_guest();
        match packet.kind {
            Kind::Tcp { segment, .. } => {
                prop_assert!(segment.payload.end <= frame.len());
                let _ = segment.syn_options(&frame);
                let _ = segment.timestamps(&frame);
                for at in edge_positions(&segment, &frame) {
                    prop_assert!(at + 4 <= frame.len());
                }
            }
            Kind::Datagram { content, .. } => prop_assert!(frame.get(content).is_some()),
            Kind::Arp | Kind::Opaque => {}
        }
    }
}
