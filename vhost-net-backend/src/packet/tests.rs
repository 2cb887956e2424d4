//! Frames made by etherparse, and any bytes.

use std::net::IpAddr;

use etherparse::{
    IpAuthHeader, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, PacketBuilder, TcpOptionElement,
};
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

/// An Ethernet frame with these tags, of a payload in an Ethernet II or a SNAP frame.
fn framed(tags: &[(u16, u16)], snap: bool, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [MAC, MAC].concat();
    for (protocol, control) in tags {
        frame.extend(protocol.to_be_bytes());
        frame.extend(control.to_be_bytes());
    }
    if snap {
        frame.extend((payload.len() as u16 + 8).to_be_bytes());
        frame.extend(SNAP);
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

fn v6_header() -> Ipv6Header {
    Ipv6Header { source: [1; 16], destination: [2; 16], hop_limit: 64, ..Ipv6Header::default() }
}

fn tag() -> impl Strategy<Value = (u16, u16)> {
    (prop::sample::select(vec![0x8100, 0x88a8, 0x9100]), prop_oneof![Just(0xa000), any::<u16>()])
}

proptest! {
    #[test]
    fn a_segment_is_found_behind_all_headers(
        tags in prop::collection::vec(tag(), 0..=2),
        snap: bool,
        v6: bool,
        [hop_by_hop, options, routing, fragment] in any::<[bool; 4]>(),
        units in 0usize..4,
        data in prop_oneof![prop::collection::vec(any::<u8>(), 0..100), Just(vec![7; 8900])],
    ) {
        // SNAP frames have no more than 1500 bytes
        let snap = snap && data.len() < 1000;
        let raw = || Ipv6RawExtHeader::new_raw(IpNumber::TCP, &vec![0; 6 + 8 * units]).unwrap();
        let extensions = Ipv6Extensions {
            hop_by_hop_options: hop_by_hop.then(raw),
            destination_options: options.then(raw),
            routing: routing.then(|| Ipv6RoutingExtensions { routing: raw(), final_destination_options: Some(raw()) }),
            // the only one of its datagram
            fragment: fragment.then(|| Ipv6FragmentHeader::new(IpNumber::TCP, IpFragOffset::ZERO, false, 77)),
            auth: None,
        };
        let ip = if v6 {
            IpHeaders::Ipv6(v6_header(), extensions)
        } else {
            let options = Ipv4Options::try_from(&vec![1; 4 * units][..]).unwrap();
            let header = Ipv4Header { source: [1; 4], destination: [2; 4], time_to_live: 64, options, ..Ipv4Header::default() };
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        };
        let mut payload = Vec::new();
        PacketBuilder::ip(ip).tcp(80, 4000, 5, 1000).write(&mut payload, &data).unwrap();
        let frame = framed(&tags, snap, if v6 { 0x86dd } else { 0x0800 }, &payload);
        let packet = Packet::parse(&frame);
        let segment = segment(&packet);
        prop_assert_eq!(&frame[segment.payload.clone()], &data[..]);
        prop_assert_eq!((segment.source_port, segment.seq), (80, 5));
        prop_assert_eq!(packet.network_at, frame.len() - payload.len());
        let vlan: Vec<u16> = tags.iter().map(|tag| tag.1 & 0xfff).filter(|id| *id != 0).collect();
        prop_assert_eq!(packet.vlan.tags(), vlan);
    }
}

#[test]
fn what_has_no_type_is_compared_whole() {
    // a bridge's hello, and what claims to be SNAP
    let hello = [&[0x42, 0x42, 3][..], &[0; 40]].concat();
    let mut frame = [MAC, MAC].concat();
    frame.extend((hello.len() as u16).to_be_bytes());
    frame.extend(&hello);
    let short = framed(&[], true, 0x0800, &[]);
    let odd = framed(&[], true, 0x05ff, &[1; 40]);
    let foreign = {
        let mut frame = framed(&[], true, 0x0800, &[0x45; 40]);
        frame[19] = 1;
        frame
    };
    for frame in [&frame, &odd, &foreign, &short[..short.len() - 1], &frame[..14]] {
        let packet = Packet::parse(frame);
        assert_eq!((packet.ethertype, packet.network_at, packet.kind), (0, 14, Kind::Opaque), "{frame:02x?}");
    }
    // three tags are one too many
    let tags = [(0x9100, 1), (0x88a8, 2), (0x8100, 3)];
    let packet = Packet::parse(&framed(&tags, false, 0x0800, &[0x45; 40]));
    assert_eq!((packet.ethertype, packet.vlan.tags(), packet.kind), (0x8100, &[1, 2][..], Kind::Opaque));
}

#[test]
fn a_source_route_belongs_to_the_flow_of_its_end() {
    let tcp = [0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0, b'!'];
    for (kind, left, flow_end) in [(2, 1, [9; 16]), (4, 1, [9; 16]), (4, 0, [2; 16]), (0, 1, [2; 16])] {
        let route = [&[PROTOCOL_TCP, 2, kind, left, 0, 0, 0, 0][..], &[9; 16]].concat();
        let mut payload = vec![0x60, 0, 0, 0, 0, (route.len() + tcp.len()) as u8, 43, 64];
        payload.extend([[1; 16], [2; 16]].concat());
        payload.extend(route);
        payload.extend(tcp);
        let frame = framed(&[], false, ETHERTYPE_IPV6, &payload);
        let packet = Packet::parse(&frame);
        assert_eq!(&frame[segment(&packet).payload.clone()], b"!");
        let Kind::Tcp { addresses, .. } = packet.kind else { unreachable!() };
        assert_eq!(addresses.destination, IpAddr::from(flow_end));
    }
}

#[test]
fn ipsec_is_told_apart_by_association() {
    let ah = IpAuthHeader::new(IpNumber::TCP, 0x0102_0304, 7, &[5; 12]).unwrap();
    let mut payload = Vec::new();
    let extensions = Ipv6Extensions { auth: Some(ah), ..Ipv6Extensions::default() };
    PacketBuilder::ip(IpHeaders::Ipv6(v6_header(), extensions))
        .tcp(80, 81, 1, 1)
        .write(&mut payload, &[])
        .unwrap();
    let ah = framed(&[], false, ETHERTYPE_IPV6, &payload);
    let mut esp = Vec::new();
    PacketBuilder::ethernet2(MAC, MAC).ipv4([1; 4], [2; 4], 64).write(&mut esp, 50.into(), &[9; 40]).unwrap();
    let flow = |frame: &[u8]| Packet::parse(frame).flow_from_guest(frame);
    assert_eq!(
        flow(&ah).to_string(),
        "ah spi 0x1020304 101:101:101:101:101:101:101:101 -> 202:202:202:202:202:202:202:202"
    );
    assert_eq!(flow(&esp).to_string(), "esp spi 0x9090909 1.1.1.1 -> 2.2.2.2");
    for (frame, spi_at) in [(&ah, 14 + 40 + 4), (&esp, 34)] {
        let mut other = frame.clone();
        other[spi_at] ^= 0x80;
        assert_ne!(PackedKey::from(&flow(&other)), PackedKey::from(&flow(frame)));
    }
    assert_eq!(Packet::parse(&esp[..37]).kind, Kind::Opaque);
}

#[test]
fn group_reports_are_repeated_without_meaning_anything_new() {
    let report = |kind: u8| {
        let mut payload = Vec::new();
        let router_alert = Ipv6RawExtHeader::new_raw(IpNumber::IPV6_ICMP, &[5, 2, 0, 0, 1, 0]).unwrap();
        let extensions =
            Ipv6Extensions { hop_by_hop_options: Some(router_alert), ..Ipv6Extensions::default() };
        PacketBuilder::ip(IpHeaders::Ipv6(v6_header(), extensions))
            .icmpv6_raw(kind, 0, [0, 0, 0, 1])
            .write(&mut payload, &[0; 20])
            .unwrap();
        Packet::parse(&framed(&[], false, ETHERTYPE_IPV6, &payload)).kind
    };
    for (kind, expected) in [(129, false), (130, true), (131, true), (143, true), (137, true), (138, false)] {
        let Kind::Datagram { transport: Transport::Icmp { discovery, .. }, .. } = report(kind) else {
            panic!("type {kind}");
        };
        assert_eq!(discovery, expected, "type {kind}");
    }
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
    let ethertype =
        prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x1234, 0x0080]);
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
                    // whole, or one of the fragments of very few datagrams
                    let place = if bytes[0] < 128 { [0, 0] } else { [bytes[1] & 0x20, bytes[2] & 7] };
                    bytes[at + 6..at + 8].copy_from_slice(&place);
                    bytes[at + 4..at + 6].copy_from_slice(&[0, 7]);
                    bytes[at + 9] = protocol;
                    if place != [0, 0] {
                        bytes[at + 12..at + 20].fill(1);
                    }
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
        if let Some(quoted) = Quoted::find(&packet, &frame) {
            prop_assert!(quoted.tcp.len() >= 8 && quoted.tcp.end <= frame.len());
        }
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
