//! The two halves, one at a time: epochs, orders that come late or not at all, and what must never get out.

use proptest::prelude::*;

use super::*;
use crate::offload::FrameHeader;
use crate::test_frames::{Done, Tcp, arp, carry_out, other};
use crate::wire::{EPOCH, HEADED_MIRROR, ISN, Isn, MARKER, MIRROR, OUTPUT, WireError};

fn frame(text: &str) -> Vec<u8> {
    other(0x88b5, text.as_bytes())
}

/// Calls a method that takes actions, and carries them out.
macro_rules! done {
    ($half:ident . $method:ident ( $($argument:expr),* )) => {{
        let mut actions = Actions::new();
        let _ = $half.$method($($argument,)* &mut actions);
        carry_out(&mut actions)
    }};
}

fn to_lan(frames: &[Vec<u8>]) -> Done {
    Done { to_lan: frames.to_vec(), ..Done::default() }
}

fn primary() -> Primary {
    Primary::new(&Config::default(), 1, 0)
}

fn secondary() -> Secondary {
    Secondary::new(&Config::default(), 1, 0)
}

#[test]
fn the_primary_tells_where_a_connection_begins_before_it_releases_it_and_once() {
    let mut primary = primary();
    let syn = Tcp { seq: 77, ack: Some(5), syn: true, ..Tcp::default() }.frame();
    let done = done!(primary.guest_output(Buffer::from(&syn[..]), 0));
    let [(kind, epoch, payload)] = &done.to_peer[..] else { panic!("{done:?}") };
    assert_eq!((*kind, *epoch, Isn::from_bytes(payload).unwrap().isn), (ISN, 1, 77));
    assert!(done.to_lan.is_empty());
    assert_eq!(done!(primary.guest_output(Buffer::from(&syn[..]), 0)), Done::default());
    let done = done!(primary.peer_frame(OUTPUT, 1, &syn, 0));
    assert_eq!(done, to_lan(&[syn.clone(), syn.clone()]));
    assert_eq!(done!(primary.guest_output(Buffer::from(&syn[..]), 0)), to_lan(std::slice::from_ref(&syn)));
    // after a commit the SVM has the same number: to tell it again would make it wait for a SYN that never comes
    done!(primary.commit(1, 0));
    assert_eq!(done!(primary.guest_output(Buffer::from(&syn[..]), 0)), to_lan(&[syn]));
}

#[test]
fn what_the_svm_says_counts_for_its_epoch_only() {
    let mut primary = primary();
    done!(primary.guest_output(Buffer::from(&frame("one")[..]), 0));
    done!(primary.guest_output(Buffer::from(&frame("two")[..]), 0));
    // the secondary has heard of the commit first
    assert_eq!(done!(primary.peer_frame(EPOCH, 2, &[], 0)), Done::default());
    assert_eq!(done!(primary.peer_frame(OUTPUT, 2, &frame("three"), 0)), Done::default());
    assert_eq!(done!(primary.commit(1, 0)), to_lan(&[frame("one"), frame("two")]));
    assert_eq!(done!(primary.peer_frame(OUTPUT, 1, &frame("four"), 0)), Done::default());
    assert_eq!(done!(primary.guest_output(Buffer::from(&frame("three")[..]), 0)), to_lan(&[frame("three")]));
    assert_eq!(done!(primary.guest_output(Buffer::from(&frame("four")[..]), 0)), Done::default());
    assert_eq!(primary.stats().stale_packets, 1);
}

#[test]
fn packets_after_the_marker_belong_to_the_next_epoch() {
    let mut primary = primary();
    let mirrored = |epoch| Done {
        to_peer: vec![(MIRROR, epoch, frame("in"))],
        to_guest: vec![frame("in")],
        ..Done::default()
    };
    assert_eq!(done!(primary.lan_input(&frame("in"), 0)), mirrored(1));
    assert_eq!(done!(primary.marker(1)).to_peer, [(MARKER, 1, vec![])]);
    assert_eq!(done!(primary.lan_input(&frame("in"), 0)), mirrored(2));
    done!(primary.commit(1, 0));
    assert_eq!(done!(primary.lan_input(&frame("in"), 0)), mirrored(2));
}

#[test]
fn no_checkpoint_is_asked_for_during_one() {
    let mut primary = primary();
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), 0));
    done!(primary.marker(1));
    assert_eq!(done!(primary.tick(500_000)), Done::default());
    done!(primary.commit(1, 600_000));
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), 600_000));
    assert_eq!(done!(primary.tick(700_000)).wanted.len(), 1);
}

#[test]
fn a_deadline_is_past_once_it_was_looked_at() {
    let mut primary = primary();
    let mut now_us = 0;
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), now_us));
    done!(primary.guest_output(Buffer::from(&arp(1)[..]), now_us));
    for _ in 0..10 {
        let next = primary.next_deadline().unwrap();
        assert!(next > now_us);
        now_us = next;
        done!(primary.tick(now_us));
    }
}

#[test]
fn orders_for_another_epoch_change_nothing() {
    let (mut primary, mut secondary) = (primary(), secondary());
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), 0));
    let mut actions = Actions::new();
    for epoch in [0, 2] {
        let refused = primary.commit(epoch, 0, &mut actions).unwrap_err();
        assert_eq!(refused.to_string(), format!("commit for epoch {epoch}, but epoch 1 is running"));
        assert!(primary.marker(epoch, &mut actions).is_err());
        assert!(secondary.commit(epoch, &mut actions).is_err());
    }
    assert!(actions.is_empty());
    assert_eq!(done!(primary.commit(1, 0)), to_lan(&[frame("held")]));
}

#[test]
fn nothing_leaves_a_primary_that_has_lost_its_peer_until_it_has_won() {
    let mut primary = primary();
    done!(primary.guest_output(Buffer::from(&frame("one")[..]), 0));
    primary.detach();
    assert_eq!(primary.next_deadline(), None);
    done!(primary.guest_output(Buffer::from(&frame("two")[..]), 0));
    assert_eq!(done!(primary.peer_frame(OUTPUT, 1, &frame("one"), 0)), Done::default());
    assert_eq!(done!(primary.commit(1, 0)), Done::default());
    assert_eq!(done!(primary.tick(9_000_000)), Done::default());
    done!(primary.guest_output(Buffer::from(&frame("three")[..]), 0));
    let all = ["one", "two", "three"].map(frame);
    assert_eq!(done!(primary.take_over(0)), to_lan(&all));
    assert_eq!(done!(primary.guest_output(Buffer::from(&frame("four")[..]), 0)), to_lan(&[frame("four")]));
    let done = done!(primary.lan_input(&frame("in"), 0));
    assert_eq!(done, Done { to_guest: vec![frame("in")], ..Done::default() });
}

#[test]
fn a_loser_is_silent_for_ever() {
    let (mut primary, mut secondary) = (primary(), secondary());
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), 0));
    primary.silence();
    secondary.silence();
    assert_eq!(done!(primary.take_over(0)), Done::default());
    assert_eq!(done!(secondary.take_over(0)), Done::default());
    for half in 0..2 {
        let done = match half {
            0 => done!(primary.guest_output(Buffer::from(&frame("out")[..]), 0)),
            _ => done!(secondary.guest_output(Buffer::from(&frame("out")[..]), 0)),
        };
        assert_eq!(done, Done::default());
    }
    assert_eq!(done!(primary.lan_input(&frame("in"), 0)), Done::default());
    assert_eq!(done!(primary.tick(9_000_000)), Done::default());
    assert_eq!(done!(secondary.tick(9_000_000)), Done::default());
}

#[test]
fn nothing_of_a_secondary_reaches_the_lan_until_it_has_won() {
    let mut secondary = secondary();
    let done = done!(secondary.guest_output(Buffer::from(&arp(1)[..]), 0));
    assert_eq!(done.to_peer, [(OUTPUT, 1, arp(1))]);
    assert_eq!(done!(secondary.lan_input(&frame("in"), 0)), Done::default());
    let done = done!(secondary.peer_frame(MIRROR, 1, &frame("in"), 0));
    assert_eq!(done.to_guest, [frame("in")]);
    assert_eq!(done!(secondary.peer_frame(MARKER, 1, &[], 0)).markers, [1]);
    assert_eq!(done!(secondary.commit(1)).to_peer, [(EPOCH, 2, vec![])]);
    assert_eq!(done!(secondary.guest_output(Buffer::from(&arp(1)[..]), 0)).to_peer, [(OUTPUT, 2, arp(1))]);
    secondary.detach();
    assert!(!secondary.accepts_output());
    assert_eq!(done!(secondary.guest_output(Buffer::from(&arp(1)[..]), 0)), Done::default());
    // the commit came before the link broke, the order after it
    assert_eq!(done!(secondary.commit(2)), Done::default());
    assert_eq!(secondary.stats().epoch, 3);
    assert_eq!(done!(secondary.tick(1_000_000)), Done::default());
    let announced = done!(secondary.take_over(1_000_000)).to_lan;
    assert_eq!(announced.len(), 2);
    assert_eq!(done!(secondary.take_over(1_000_000)), Done::default());
    assert_eq!(done!(secondary.guest_output(Buffer::from(&frame("out")[..]), 0)).to_lan, [frame("out")]);
    assert_eq!(done!(secondary.lan_input(&frame("in"), 0)).to_guest, [frame("in")]);
    // switches lose packets too
    let mut again = 0;
    while let Some(next) = secondary.next_deadline().filter(|next| *next < 1_500_000) {
        again += done!(secondary.tick(next)).to_lan.len() / announced.len();
    }
    assert_eq!(again, 4);
}

#[test]
fn a_peer_that_makes_no_sense_is_refused() {
    let mut actions = Actions::new();
    let mut primary = primary();
    let mut said = |kind, epoch, payload| primary.peer_frame(kind, epoch, payload, 0, &mut actions);
    assert_eq!(said(MIRROR, 1, &[]), Err(WireError::Kind(MIRROR)));
    assert_eq!(said(OUTPUT, 3, &[]), Err(WireError::Epoch { kind: OUTPUT, epoch: 3, running: 1 }));
    assert_eq!(said(EPOCH, 1, &[1]), Err(WireError::Length { kind: EPOCH, bytes: 1 }));
    let mut secondary = secondary();
    let mut said = |kind, epoch, payload| secondary.peer_frame(kind, epoch, payload, 0, &mut actions);
    assert_eq!(said(OUTPUT, 1, &[]), Err(WireError::Kind(OUTPUT)));
    assert_eq!(said(MIRROR, 2, &[]), Err(WireError::Epoch { kind: MIRROR, epoch: 2, running: 1 }));
    assert_eq!(said(ISN, 1, &[]), Err(WireError::Length { kind: ISN, bytes: 0 }));
    assert_eq!(said(MARKER, 1, &[0]), Err(WireError::Length { kind: MARKER, bytes: 1 }));
    assert_eq!(said(MARKER, 1, &[]), Ok(()));
    assert!(said(MIRROR, 1, &[]).is_err(), "behind the marker");
    assert!(actions.iter().count() == 1);
}

#[test]
fn what_is_no_frame_is_refused() {
    let mut actions = Actions::new();
    let (mut primary, mut secondary) = (primary(), secondary());
    for bytes in [0, 13, 65_558, 2 << 20] {
        let payload = vec![0; bytes];
        for epoch in [1, 2] {
            let refused = primary.peer_frame(OUTPUT, epoch, &payload, 0, &mut actions);
            assert_eq!(refused, Err(WireError::Length { kind: OUTPUT, bytes }));
        }
        let refused = secondary.peer_frame(MIRROR, 1, &payload, 0, &mut actions);
        assert_eq!(refused, Err(WireError::Length { kind: MIRROR, bytes }));
    }
    assert!(actions.is_empty());
}

#[test]
fn many_short_messages_of_the_next_epoch_are_within_the_limit_too() {
    const LIMIT: usize = 10_000;
    let mut config = Config::default();
    config.compare.svm_bytes_max = LIMIT;
    let (mut primary, mut actions) = (Primary::new(&config, 1, 0), Actions::new());
    let mut kept = 0;
    while primary.stats().stale_packets == 0 {
        assert!(kept <= LIMIT / 64, "each costs more than its bytes");
        primary.peer_frame(OUTPUT, 2, &[0; 14], 0, &mut actions).unwrap();
        kept += 1;
    }
}

#[test]
fn the_figures_can_be_shown() {
    let mut primary = primary();
    done!(primary.guest_output(Buffer::from(&frame("held")[..]), 0));
    done!(primary.tick(100_000));
    let figures = serde_json::to_value(primary.stats()).unwrap();
    assert_eq!(figures["mode"], "protected");
    assert_eq!(figures["compare"]["held_packets"], 1);
    assert_eq!(figures["compare"]["checkpoints_wanted"]["held-too-long"], 1);
    assert_eq!(serde_json::to_value(secondary().stats()).unwrap()["rewrite"]["connections"], 0);
}

proptest! {
    #[test]
    fn nothing_makes_either_half_panic_and_a_secondary_is_silent(
        steps in prop::collection::vec(
            (0u8..9, prop_oneof![0u16..7, Just(HEADED_MIRROR)], 0u64..4, crate::packet::tests::frame_like(), 0u64..300_000),
            1..60,
        ),
    ) {
        let (mut primary, mut secondary) = (primary(), secondary());
        let mut actions = Actions::new();
        let mut now_us = 0;
        let mut won = false;
        for (step, kind, epoch, bytes, us) in steps {
            now_us += us;
            let header = FrameHeader::read(&bytes[bytes.len() / 2..]).unwrap_or_default();
            let mut frame = Buffer::from(&bytes[..]);
            frame.set_header(header);
            let _ = match step {
                0 => { primary.guest_output(std::mem::take(&mut frame), now_us, &mut actions); None }
                1 => { primary.headed_lan_input(header, &bytes, now_us, &mut actions); None }
                2 => primary.peer_frame(kind, epoch, &bytes, now_us, &mut actions).err().map(|e| e.to_string()),
                3 => primary.commit(epoch, now_us, &mut actions).err().map(|e| e.to_string()),
                4 => { primary.tick(now_us, &mut actions); None }
                _ => None,
            };
            carry_out(&mut actions);
            let _ = match step {
                4 => { secondary.tick(now_us, &mut actions); None }
                5 => { secondary.guest_output(frame, now_us, &mut actions); None }
                6 => secondary.peer_frame(kind, epoch, &bytes, now_us, &mut actions).err().map(|e| e.to_string()),
                7 => secondary.commit(epoch, &mut actions).err().map(|e| e.to_string()),
                8 if us % 20 == 0 => {
                    secondary.detach();
                    secondary.take_over(now_us, &mut actions);
                    won = true;
                    None
                }
                8 if us % 20 == 1 => { primary.marker(epoch, &mut actions).err().map(|e| e.to_string()) }
                _ => None,
            };
            let done = carry_out(&mut actions);
            prop_assert!(won || done.to_lan.is_empty());
            prop_assert!(primary.next_deadline().is_none_or(|next| next > now_us || step != 4));
        }
    }
}
