//! One half of a pair; the test is the other half and the controller.

use super::*;
use crate::test_frames::Tcp;
use crate::wire::{EPOCH, KEY, MARKER, MIRROR, OUTPUT};

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
