//! One half of a pair; the test is the other half and the controller.

use super::*;
use crate::packet::{FlowKey, Kind, Packet};
use crate::test_frames::{Tcp, read};
use crate::wire::{EPOCH, HEADED_MIRROR, ISN, Isn, KEY, MARKER, MIRROR, OUTPUT};

fn half(role: Role) -> (Bench, Peer) {
    let mut bench = Bench::start(true);
    let peer = bench.attach(role);
    bench.start_rings([0, 0]);
    (bench, peer)
}

#[test]
fn the_primary_mirrors_what_it_delivers_and_holds_what_it_sends() {
    let (mut bench, mut peer) = half(Role::Primary);
    bench.lan_sends(&frame("in"));
    assert!(peer.is_silent(), "what the guest has no buffer for is not mirrored");
    bench.offer_buffer();
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
    assert_eq!(peer.receive(), (MIRROR, 1, frame("in")));

    bench.guest_sends(&frame("out"));
    assert!(bench.queues[TX].used(LIMIT).is_some(), "taken from the guest all the same");
    assert_eq!(bench.lan_receives(MOMENT), None);
    peer.send(OUTPUT, 1, &frame("out"));
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("out")));
}

#[test]
fn a_bulk_transfer_takes_less_than_a_twentieth_of_the_link() {
    let (to_b, to_a) = UnixStream::pair().unwrap();
    let [mut primary, mut secondary] =
        [(Role::Primary, to_b), (Role::Secondary, to_a)].map(|(role, link)| {
            let mut bench = Bench::start_digesting();
            bench.attach_to(role, &link);
            bench.start_rings([0, 0]);
            bench
        });
    let mut bytes = 0;
    for batch in 0..50u32 {
        let frames: Vec<_> = (0..8)
            .map(|index| {
                let number = batch * 8 + index;
                let data = vec![number as u8; 1448];
                Tcp { seq: number * 1448, ack: Some(1), data: &data, ..Tcp::default() }.frame()
            })
            .collect();
        for bench in [&mut primary, &mut secondary] {
            for frame in &frames {
                bench.guest_sends(frame);
            }
            for _ in &frames {
                assert!(bench.queues[TX].used(LIMIT).is_some());
            }
        }
        for frame in frames {
            bytes += frame.len() as u64;
            assert_eq!(primary.lan_receives(LIMIT), Some(frame));
        }
    }
    let told = secondary.status("/pair/proxy/digest");
    assert_eq!(told["output_bytes"], bytes);
    let link_bytes = told["link_bytes"].as_u64().unwrap();
    assert!(link_bytes * 20 < bytes, "{link_bytes} for {bytes}");
    assert_eq!(primary.status("/pair/proxy/svm_link_bytes"), link_bytes);
    assert_eq!(primary.status("/pair/proxy/compare/digests"), 400);
}

#[test]
fn digests_are_for_a_network() {
    let mut bench = Bench::start(true);
    let mut peer = bench.attach(Role::Primary);
    assert!(peer.is_silent(), "on one host copying is cheaper");
    let mut bench = Bench::start_digesting();
    peer = bench.attach(Role::Primary);
    assert_eq!(peer.receive().0, KEY);
}

#[test]
fn a_checkpoint_on_the_primary() {
    let (mut bench, mut peer) = half(Role::Primary);
    bench.guest_sends(&frame("differs"));
    assert!(bench.queues[TX].used(LIMIT).is_some());
    assert!(matches!(bench.event(), Event::CheckpointWanted { .. }), "held too long");
    let refused = bench.call(&Command::Marker { epoch: 1 }).unwrap_err().to_string();
    assert!(refused.contains("still runs"), "{refused}");

    let next = bench.stop_rings();
    bench.lan_sends(&frame("during the pause"));
    bench.call(&Command::Marker { epoch: 1 }).unwrap();
    assert_eq!(peer.receive(), (MARKER, 1, vec![]));
    assert_eq!(bench.lan_receives(MOMENT), None, "nothing before the commit");
    assert!(bench.call(&Command::Commit { epoch: 7 }).is_err());
    bench.call(&Command::Commit { epoch: 1 }).unwrap();
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("differs")));

    bench.start_rings(next);
    bench.offer_buffer();
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("during the pause")));
    assert_eq!(peer.receive(), (MIRROR, 2, frame("during the pause")));
}

#[test]
fn the_secondary_gets_what_is_mirrored_and_nothing_from_the_lan() {
    let (mut bench, mut peer) = half(Role::Secondary);
    bench.offer_buffer();
    bench.lan_sends(&frame("not for the SVM"));
    assert_eq!(bench.guest_receives(MOMENT), None);
    peer.send(MIRROR, 1, &frame("in"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
    bench.guest_sends(&frame("out"));
    assert_eq!(peer.receive(), (OUTPUT, 1, frame("out")));
    assert_eq!(bench.lan_receives(MOMENT), None);
    assert_eq!(bench.status("/frames/lan_ignored"), 1);
}

#[test]
fn a_checkpoint_on_the_secondary() {
    let (mut bench, mut peer) = half(Role::Secondary);
    peer.send(MIRROR, 1, &frame("the PVM has it"));
    peer.send(MARKER, 1, &[]);
    peer.send(MIRROR, 2, &frame("of the next epoch"));
    assert_eq!(bench.event(), Event::Marker { epoch: 1 });
    let next = bench.stop_rings();
    bench.offer_buffer();
    assert_eq!(bench.guest_receives(MOMENT), None);
    bench.call(&Command::Commit { epoch: 1 }).unwrap();
    assert_eq!(peer.receive(), (EPOCH, 2, vec![]));
    bench.start_rings(next);
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("of the next epoch")));
    bench.guest_sends(&frame("out"));
    assert_eq!(peer.receive(), (OUTPUT, 2, frame("out")));
}

#[test]
fn the_secondary_takes_over() {
    let (mut bench, mut peer) = half(Role::Secondary);
    peer.send(MIRROR, 1, &frame("last words"));
    drop(peer);
    assert!(matches!(bench.event(), Event::LinkLost { .. }));
    bench.guest_sends(&frame("undecided"));
    assert!(bench.queues[TX].used(MOMENT).is_none());
    bench.lan_sends(&frame("for whoever wins"));
    bench.call(&Command::Detach).unwrap();
    assert_eq!(bench.status("/pair/phase"), "undecided");
    bench.call(&Command::TakeOver).unwrap();
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("undecided")));
    for text in ["last words", "for whoever wins"] {
        bench.offer_buffer();
        assert_eq!(bench.guest_receives(LIMIT), Some(frame(text)));
    }
    // alone it needs no controller
    bench.client = None;
    bench.guest_sends(&frame("alone"));
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("alone")));
}

#[test]
fn the_primary_goes_on_alone() {
    let (mut bench, peer) = half(Role::Primary);
    for text in ["one", "two"] {
        bench.guest_sends(&frame(text));
        assert!(bench.queues[TX].used(LIMIT).is_some());
    }
    drop(peer);
    while !matches!(bench.event(), Event::LinkLost { .. }) {}
    bench.guest_sends(&frame("three"));
    assert_eq!(bench.lan_receives(MOMENT), None);
    bench.call(&Command::TakeOver).unwrap();
    for text in ["one", "two", "three"] {
        assert_eq!(bench.lan_receives(LIMIT), Some(frame(text)));
    }
    bench.offer_buffer();
    bench.lan_sends(&frame("in"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
}

#[test]
fn a_marker_that_is_wanted_after_the_link_is_lost_is_no_fault_of_this_side() {
    let (mut bench, peer) = half(Role::Primary);
    bench.guest_sends(&frame("held"));
    assert!(bench.queues[TX].used(LIMIT).is_some());
    bench.stop_rings();
    drop(peer);
    while !matches!(bench.event(), Event::LinkLost { .. }) {}
    bench.call(&Command::Marker { epoch: 1 }).unwrap();
    assert_eq!(bench.lan_receives(MOMENT), None);
    bench.call(&Command::TakeOver).unwrap();
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("held")));
    assert!(bench.call(&Command::Marker { epoch: 1 }).is_err());
}

#[test]
fn a_commit_that_is_told_after_the_link_is_lost_releases_nothing_yet() {
    let (mut bench, mut peer) = half(Role::Primary);
    bench.guest_sends(&frame("held"));
    assert!(bench.queues[TX].used(LIMIT).is_some());
    bench.stop_rings();
    bench.call(&Command::Marker { epoch: 1 }).unwrap();
    assert_eq!(peer.receive(), (MARKER, 1, vec![]));
    drop(peer);
    while !matches!(bench.event(), Event::LinkLost { .. }) {}
    bench.call(&Command::Commit { epoch: 1 }).unwrap();
    assert_eq!(bench.lan_receives(MOMENT), None, "the other side may have won");
    bench.call(&Command::TakeOver).unwrap();
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("held")));
}

#[test]
fn the_loser_and_the_orphan_are_silent() {
    for orphan in [false, true] {
        let (mut bench, mut peer) = half(Role::Primary);
        bench.guest_sends(&frame("held"));
        assert!(bench.queues[TX].used(LIMIT).is_some());
        if orphan {
            bench.client = None;
        } else {
            bench.call(&Command::Silence).unwrap();
            assert!(bench.call(&Command::TakeOver).unwrap_err().to_string().contains("lost already"));
            assert!(bench.call(&Command::Commit { epoch: 1 }).is_err());
        }
        let mut end = Vec::new();
        std::io::Read::read_to_end(&mut peer.0, &mut end).unwrap();
        bench.guest_sends(&frame("more"));
        bench.offer_buffer();
        bench.lan_sends(&frame("in"));
        assert_eq!(bench.lan_receives(MOMENT), None);
        assert_eq!(bench.guest_receives(MOMENT), None);
    }
}

#[test]
fn nonsense_on_the_link_ends_it() {
    let (bench, mut peer) = half(Role::Secondary);
    peer.0.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").unwrap();
    let Event::LinkLost { reason } = bench.event() else { panic!("another event") };
    assert!(reason.contains("COLO link"), "{reason}");
    let (bench, mut peer) = half(Role::Primary);
    peer.send(MIRROR, 1, &frame("the wrong way"));
    assert!(matches!(bench.event(), Event::LinkLost { .. }));
}

#[test]
fn a_peer_that_does_not_read_slows_the_lan_down_and_loses_nothing() {
    let (mut bench, mut peer) = half(Role::Primary);
    let long = |n: u32| {
        let mut long = frame("");
        long.resize(1500, 0);
        long[20..24].copy_from_slice(&n.to_be_bytes());
        long
    };
    let mut delivered = 0;
    loop {
        bench.offer_buffer();
        bench.lan_sends(&long(delivered));
        // it comes in its time, or when the link has room again
        let came = loop {
            if bench.guest_receives(MOMENT).is_some() {
                break true;
            }
            if bench.status("/pair/link_outgoing_bytes").as_u64().unwrap() > 4 << 20 {
                break false;
            }
        };
        if !came {
            break;
        }
        delivered += 1;
        assert!(delivered < 10_000, "no backpressure");
    }
    assert!(delivered > 1000, "{delivered}");
    for n in 0..delivered {
        assert_eq!(peer.receive(), (MIRROR, 1, long(n)));
    }
    assert_eq!(bench.guest_receives(LIMIT), Some(long(delivered)));
    assert_eq!(peer.receive(), (MIRROR, 1, long(delivered)));
}

#[test]
fn an_svm_that_does_not_receive_slows_the_link_down() {
    let (mut bench, mut peer) = half(Role::Secondary);
    peer.0.set_write_timeout(Some(MOMENT)).unwrap();
    let mut bytes = Vec::new();
    colo::link::encode(MIRROR, 1, &[&[7; 1500]], &mut bytes);
    let mut sent = 0;
    let waiting = loop {
        match peer.0.write(&bytes[sent % bytes.len()..]) {
            Ok(count) => sent += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(sent < 20_000 * bytes.len(), "no backpressure");
        let waiting = bench.status("/pair/undelivered_bytes").as_u64().unwrap();
        if waiting >= 4 << 20 {
            break waiting;
        }
    };
    assert!(waiting < 5 << 20, "{waiting}");
    // and nothing more is taken: what the socket holds is all that it will
    while let Ok(count) = peer.0.write(&bytes[sent % bytes.len()..]) {
        sent += count;
        assert!(sent < 20_000 * bytes.len(), "no backpressure");
    }
    assert_eq!(bench.status("/pair/undelivered_bytes").as_u64(), Some(waiting));
}

/// Bytes of payload in each segment of a large frame.
const SEGMENT_BYTES: u16 = 900;

/// The header of a TCP frame whose checksum, and if it is large whose segmentation, is left to the receiver.
fn header_of(frame: &[u8]) -> [u8; HEADER_BYTES] {
    let Kind::Tcp { segment, .. } = Packet::parse(frame).kind else { panic!("no TCP") };
    let is_large = segment.payload.len() > usize::from(SEGMENT_BYTES);
    let large = if is_large { [segment.payload.start as u16, SEGMENT_BYTES] } else { [0, 0] };
    let mut header = [0; HEADER_BYTES];
    (header[0], header[1]) = (1, u8::from(is_large));
    for (at, word) in large.into_iter().chain([segment.at as u16, 16]).enumerate() {
        header[2 + 2 * at..4 + 2 * at].copy_from_slice(&word.to_le_bytes());
    }
    header
}

/// A TCP frame whose checksum is that of the pseudo header only.
fn open_frame(tcp: &Tcp<'_>) -> Vec<u8> {
    let mut frame = tcp.frame();
    let Kind::Tcp { addresses, segment } = Packet::parse(&frame).kind else { panic!("no TCP") };
    let sum = !crate::packet::checksum::of_tcp(&addresses, &vec![0; frame.len() - segment.at]);
    frame[segment.at + 16..segment.at + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// What `read` finds when the checksum has been completed.
fn completed(frame: &[u8]) -> crate::test_frames::Seen {
    let Kind::Tcp { segment, .. } = Packet::parse(frame).kind else { panic!("no TCP") };
    let mut frame = frame.to_vec();
    assert!(crate::packet::segment::complete_checksum(&mut frame, segment.at, 16));
    read(&frame)
}

fn with_offloads(role: Role) -> (Bench, Peer) {
    let mut bench = Bench::start(true);
    bench.features(Offloads::of_pair(u64::MAX) | 1 << VIRTIO_F_VERSION_1);
    let peer = bench.attach(role);
    bench.start_rings([0, 0]);
    (bench, peer)
}

/// The next frame that the guest receives, in as many buffers as its header says, and the header without their number.
fn receives_headed(bench: &mut Bench) -> (Vec<u8>, Vec<u8>) {
    let mut buffer = bench.guest_buffer(LIMIT).unwrap();
    let mut frame = buffer.split_off(HEADER_BYTES);
    for _ in 1..u16::from_le_bytes([buffer[10], buffer[11]]) {
        frame.extend(bench.guest_buffer(LIMIT).unwrap());
    }
    buffer.truncate(10);
    (buffer, frame)
}

#[test]
fn on_the_primary_frames_keep_what_they_leave_to_others() {
    let (mut bench, mut peer) = with_offloads(Role::Primary);
    let large =
        open_frame(&Tcp { from_client: true, seq: 7, ack: Some(1), data: &[5; 1800], ..Tcp::default() });
    let header = header_of(&large);
    bench.lan_sends_with(&header, &large);
    // it may be 64 KiB long
    bench.offer_buffer();
    assert!(peer.is_silent());
    (0..8).for_each(|_| bench.offer_buffer());
    assert_eq!(receives_headed(&mut bench), (header[..10].to_vec(), large.clone()));
    assert_eq!(peer.receive(), (HEADED_MIRROR, 1, [&header[..10], &large].concat()));
    (0..2).for_each(|_| bench.offer_buffer());
    bench.lan_sends(&frame("small"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("small")));
    assert_eq!(peer.receive(), (MIRROR, 1, frame("small")));

    let tcp = Tcp { seq: 100, ack: Some(1), window: 9, ..Tcp::default() };
    let large = open_frame(&Tcp { data: &[6; 1800], ..tcp.clone() });
    bench.guest_sends_with(&header_of(&large), &large);
    assert!(bench.queues[TX].used(LIMIT).is_some());
    // the SVM says the same in segments of its own
    peer.send(OUTPUT, 1, &Tcp { data: &[6; 700], ..tcp.clone() }.frame());
    assert_eq!(bench.lan_receives(MOMENT), None);
    peer.send(OUTPUT, 1, &Tcp { seq: 800, data: &[6; 1100], ..tcp }.frame());
    assert_eq!(bench.lan_receives_with(LIMIT), Some([&header_of(&large)[..], &large].concat()));
}

#[test]
fn on_the_primary_a_narrowed_window_leaves_an_open_checksum_open() {
    let (mut bench, mut peer) = with_offloads(Role::Primary);
    let tcp = Tcp { seq: 100, ack: Some(1), syn: true, window: 1000, ..Tcp::default() };
    let syn = open_frame(&tcp);
    bench.guest_sends_with(&header_of(&syn), &syn);
    assert_eq!(peer.receive().0, ISN);
    peer.send(OUTPUT, 1, &tcp.frame());
    assert_eq!(bench.lan_receives_with(LIMIT).map(|frame| frame[HEADER_BYTES..].to_vec()), Some(syn));
    let data = |window| Tcp { seq: 101, syn: false, window, data: b"abc", ..tcp.clone() };
    peer.send(OUTPUT, 1, &data(2000).frame());
    let sent = open_frame(&data(5000));
    bench.guest_sends_with(&header_of(&sent), &sent);
    let left = bench.lan_receives_with(LIMIT).unwrap();
    assert_eq!(left, [&header_of(&sent)[..], &open_frame(&data(2000))].concat());
    assert_eq!(completed(&left[HEADER_BYTES..]).window, 2000);
}

#[test]
fn on_the_secondary_frames_keep_what_they_leave_to_others_and_go_on_doing_so_alone() {
    let (mut bench, mut peer) = with_offloads(Role::Secondary);
    let tcp = Tcp { seq: 5000, ack: Some(1), ..Tcp::default() };
    let syn = open_frame(&Tcp { syn: true, ..tcp.clone() });
    let flow: FlowKey = Packet::parse(&syn).flow_from_guest(&syn);
    peer.send(ISN, 1, &Isn { flow, isn: 100, timestamp: None }.to_bytes().unwrap());
    bench.guest_sends_with(&header_of(&syn), &syn);
    let (kind, _, frame) = peer.receive();
    assert_eq!((kind, frame), (OUTPUT, open_frame(&Tcp { seq: 100, syn: true, ..tcp.clone() })));

    let client =
        |ack, data| open_frame(&Tcp { from_client: true, seq: 1, ack: Some(ack), data, ..Tcp::default() });
    let (mirrored, expected) = (client(101, &[3; 1900]), client(5001, &[3; 1900]));
    let header = header_of(&mirrored);
    (0..2).for_each(|_| bench.offer_buffer());
    peer.send(HEADED_MIRROR, 1, &[&header[..10], &mirrored].concat());
    assert_eq!(receives_headed(&mut bench), (header[..10].to_vec(), expected));

    bench.call(&Command::TakeOver).unwrap();
    let sent = |seq| open_frame(&Tcp { seq, data: &[4; 1800], ..tcp.clone() });
    bench.guest_sends_with(&header_of(&sent(5001)), &sent(5001));
    let left = std::iter::from_fn(|| bench.lan_receives_with(LIMIT)).find(|frame| frame[0] != 0).unwrap();
    assert_eq!(left, [&header_of(&sent(101))[..], &sent(101)].concat());
    (0..8).for_each(|_| bench.offer_buffer());
    let answer = client(1901, b"");
    bench.lan_sends_with(&header_of(&answer), &answer);
    assert_eq!(receives_headed(&mut bench), (header_of(&answer)[..10].to_vec(), client(6801, b"")));
}

#[test]
fn what_a_frame_leaves_must_be_in_it_and_must_have_been_negotiated() {
    let (mut bench, mut peer) = half(Role::Secondary);
    let frame = open_frame(&Tcp { from_client: true, ack: Some(1), data: b"abc", ..Tcp::default() });
    let header = header_of(&frame);
    bench.offer_buffer();
    peer.send(HEADED_MIRROR, 1, &[&header[..10], &frame].concat());
    peer.send(MIRROR, 1, &super::frame("in"));
    assert_eq!(bench.guest_receives(LIMIT), Some(super::frame("in")));
    assert_eq!(bench.status("/frames/guest_unusable"), 1);
    // and the guest is held to it as well
    bench.guest_sends_with(&header, &frame);
    assert!(bench.queues[TX].used(LIMIT).is_some());
    assert_eq!(bench.status("/frames/guest_malformed"), 1);
    peer.send(HEADED_MIRROR, 1, &[&header[..10], &frame[..40]].concat());
    let Event::LinkLost { reason } = bench.event() else { panic!("another event") };
    assert!(reason.contains("header"), "{reason}");
}
