//! The control queue against a model of it: any commands, and those that a fuzzer has found.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

use fuzz::Both;
use proptest::prelude::*;

#[test]
fn any_driver_is_survived() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives("control_queue", fuzz::control_queue, fuzz::seeds(), &found);
}

/// Few addresses, so that tables and frames meet.
fn mac() -> impl Strategy<Value = [u8; 6]> {
    let last = prop_oneof![8 => 0..80u8, 1 => any::<u8>()];
    prop_oneof![
        8 => (prop::sample::select(vec![2u8, 3]), last).prop_map(|(first, last)| [first, 0, 0, 0, 0, last]),
        1 => Just([0xff; 6]),
        1 => Just(fuzz::MAC),
        1 => any::<[u8; 6]>(),
    ]
}

fn table() -> impl Strategy<Value = Vec<u8>> {
    let macs = prop_oneof![
        4 => prop::collection::vec(mac(), 0..5),
        2 => prop::collection::vec(mac(), 60..70),
        1 => prop::collection::vec(mac(), 0..300),
    ];
    macs.prop_map(|macs| [&(macs.len() as u32).to_le_bytes()[..], &macs.concat()].concat())
}

fn vlan() -> impl Strategy<Value = u16> {
    prop_oneof![0..8u16, 4090..4100u16, any::<u16>()]
}

/// A command that is one, but for the odd value.
fn command() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => (0..7u8, 0..3u8).prop_map(|(command, on)| vec![0, command, on]),
        2 => (table(), table()).prop_map(|(unicast, multicast)| [&[1, 0][..], &unicast, &multicast].concat()),
        1 => mac().prop_map(|mac| [&[1, 1][..], &mac].concat()),
        2 => (0..3u8, vlan()).prop_map(|(command, vlan)| [&[2, command][..], &vlan.to_le_bytes()].concat()),
        1 => Just(vec![3, 0]),
        1 => (0..20u16).prop_map(|pairs| [&[4, 0][..], &pairs.to_le_bytes()].concat()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

/// As it was made, or cut off, or with more behind it.
fn changed() -> impl Strategy<Value = Vec<u8>> {
    (command(), prop_oneof![6 => Just(0isize), 1 => -5..5isize]).prop_map(|(mut bytes, change)| {
        bytes.resize(bytes.len().saturating_add_signed(change), 1);
        bytes
    })
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![Just([0x81, 0x00]), Just([0x08, 0x00]), any::<[u8; 2]>()];
    (mac(), any::<[u8; 6]>(), kind, vlan(), 0..20usize).prop_map(|(to, from, kind, tag, more)| {
        let mut frame = [&to[..], &from, &kind, &tag.to_be_bytes()].concat();
        frame.resize(frame.len() + more, 0);
        frame
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Each answer, and what is received after it, is what the specification says.
    #[test]
    fn commands_and_frames_are_the_models(
        features: u64,
        pairs_max in 1..=16u16,
        is_heard: bool,
        steps in prop::collection::vec((changed(), prop::collection::vec(frame(), 0..8)), 0..40),
    ) {
        for features in [features, u64::MAX] {
            let mut both = Both::new(features, pairs_max, is_heard);
            for (command, frames) in &steps {
                both.command(command);
                frames.iter().for_each(|frame| both.frame(frame));
            }
        }
    }

    /// A driver that was not heard gets every frame that one gets that was, whatever both say from then on.
    #[test]
    fn who_was_not_heard_gets_no_less(
        before in prop::collection::vec(command(), 0..20),
        after in prop::collection::vec(command(), 0..20),
        frames in prop::collection::vec(frame(), 0..20),
    ) {
        use vhost_net_backend::control_queue::{Card, State};
        let card = Card { features: u64::MAX, mac: fuzz::MAC, pairs_max: 4 };
        let (mut heard, mut unheard) = (State::reset(&card), State::unknown(&card));
        for command in &before {
            let _ = heard.carry_out(&card, command);
        }
        for command in &after {
            prop_assert_eq!(heard.carry_out(&card, command).is_ok(), unheard.carry_out(&card, command).is_ok());
        }
        for frame in &frames {
            prop_assert!(unheard.filter().admits(frame) || !heard.filter().admits(frame), "{frame:x?}");
        }
        prop_assert!(unheard.pairs() >= heard.pairs());
    }
}
