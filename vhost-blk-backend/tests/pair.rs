//! Two back ends in one process, joined by a link: what is on which disk, and what each guest sees, at every step.

mod guest;
mod side;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use colo::control::{Command, Event, Role};
use guest::{DATA_BYTES, OK};
use proptest::prelude::*;
use side::{Pair, Side, link};

const SECTORS: usize = 256;
const BUFFER_BYTES: usize = 32 << 20;

/// One byte stands for a sector.
fn sectors(values: &[u8]) -> Vec<u8> {
    values.iter().flat_map(|value| [*value; 512]).collect()
}

/// Waits until `holds`.
fn until(mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < limit, "it does not come to be");
        std::thread::yield_now();
    }
}

#[derive(Clone, Debug)]
enum Step {
    PvmWrite(usize, Vec<u8>),
    PvmRead(usize, usize),
    SvmWrite(usize, Vec<u8>),
    SvmRead(usize, usize),
    Flush,
    Checkpoint,
}

#[derive(Clone, Copy, Debug)]
enum End {
    PrimaryDies,
    PrimaryDiesAtMarker,
    SecondaryDies,
}

fn step() -> impl Strategy<Value = Step> {
    let write = || {
        (0..SECTORS).prop_flat_map(|sector| {
            (Just(sector), prop::collection::vec(any::<u8>(), 1..=(SECTORS - sector).min(40)))
        })
    };
    prop_oneof![
        6 => write().prop_map(|(sector, values)| Step::PvmWrite(sector, values)),
        2 => write().prop_map(|(sector, values)| Step::PvmRead(sector, values.len())),
        6 => write().prop_map(|(sector, values)| Step::SvmWrite(sector, values)),
        4 => write().prop_map(|(sector, values)| Step::SvmRead(sector, values.len())),
        1 => Just(Step::Flush),
        2 => Just(Step::Checkpoint),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Against the model of two arrays of sectors: what the PVM has and what the SVM has.
    #[test]
    fn each_guest_sees_its_own_disk_and_a_survivor_keeps_it(
        start in prop::collection::vec(any::<u8>(), SECTORS),
        steps in prop::collection::vec(step(), 0..50),
        end in prop::sample::select(&[End::PrimaryDies, End::PrimaryDiesAtMarker, End::SecondaryDies][..]),
    ) {
        let mut pair = Pair::start(&sectors(&start), BUFFER_BYTES);
        let (mut pvm, mut svm) = (start.clone(), start);
        for step in steps {
            match step {
                Step::PvmWrite(sector, values) => {
                    pair.primary.guest.write(sector as u64, &sectors(&values));
                    pvm[sector..sector + values.len()].copy_from_slice(&values);
                }
                Step::SvmWrite(sector, values) => {
                    pair.secondary.guest.write(sector as u64, &sectors(&values));
                    svm[sector..sector + values.len()].copy_from_slice(&values);
                }
                Step::PvmRead(sector, count) => prop_assert_eq!(
                    pair.primary.guest.read(sector as u64, count * 512), sectors(&pvm[sector..sector + count])
                ),
                Step::SvmRead(sector, count) => prop_assert_eq!(
                    pair.secondary.guest.read(sector as u64, count * 512), sectors(&svm[sector..sector + count])
                ),
                Step::Flush => for side in [&mut pair.primary, &mut pair.secondary] {
                    side.guest.begin_flush();
                    side.guest.finish();
                },
                Step::Checkpoint => {
                    pair.checkpoint();
                    prop_assert_eq!(pair.secondary.disk(), sectors(&pvm));
                    svm.copy_from_slice(&pvm);
                }
            }
        }
        if let End::PrimaryDiesAtMarker = end {
            let stand = pair.begin_checkpoint();
            pair.secondary.guest.resume(stand.1);
        }
        let (survivor, has) = match end {
            End::PrimaryDies | End::PrimaryDiesAtMarker => (&mut pair.secondary, svm),
            End::SecondaryDies => (&mut pair.primary, pvm),
        };
        survivor.tell(&Command::Detach).unwrap();
        // requests wait until it is known how it goes on, and no longer
        survivor.guest.begin_read(0, 512);
        prop_assert!(survivor.guest.next_ended(Duration::from_millis(5)).is_none());
        survivor.tell(&Command::TakeOver).unwrap();
        survivor.guest.finish();
        prop_assert_eq!(survivor.seen(), sectors(&has));
        prop_assert_eq!(survivor.disk(), sectors(&has));
        survivor.guest.write(7, &[0x77; 512]);
        prop_assert_eq!(&survivor.disk()[7 * 512..8 * 512], &[0x77; 512]);
    }

    /// Overlapping writes in flight at once: which one wins is nobody's business, that it is the same on both disks is.
    #[test]
    fn overlapping_writes_end_the_same_on_both_disks(
        rounds in prop::collection::vec(
            prop::collection::vec((0..64usize, 1..32usize, any::<u8>()), 1..32), 1..8),
    ) {
        let mut pair = Pair::start(&sectors(&[0; SECTORS]), BUFFER_BYTES);
        for round in rounds {
            for (sector, count, value) in round {
                pair.primary.guest.begin_write(sector as u64, &vec![value; count * 512]);
            }
            // not drained by us: the pause does it, and may put some back
            pair.checkpoint();
            pair.primary.guest.finish();
        }
        pair.checkpoint();
    }
}

#[test]
fn a_full_buffer_asks_for_a_checkpoint_waits_for_it_and_loses_nothing() {
    let start = sectors(&[1; SECTORS]);
    // eight blocks
    let mut pair = Pair::start(&start, 8 * 4096);
    pair.secondary.guest.write(0, &[2; 7 * 4096]);
    match pair.secondary.next_event() {
        Event::CheckpointWanted { cause, .. } => assert_eq!(cause, "buffer"),
        other => panic!("{other:?}"),
    }
    pair.secondary.guest.begin_write(64, &[3; 2 * 4096]);
    assert!(pair.secondary.guest.nothing_ends(), "there is room for one block only");
    // the primary's own write is done when it is on its disk, the secondary has to wait with it
    pair.primary.guest.write(128, &[4; 2 * 4096]);
    pair.primary.guest.write(192, &[5; 512]);
    until(|| pair.secondary.status()["secondary"]["link_queue_bytes"] == 2 * 4096 + 512);
    assert_eq!(pair.secondary.disk(), start);
    assert!(pair.secondary.events.is_empty(), "asked twice in one epoch");
    // the write that waits does not keep the VM from being paused, nor those of the primary the marker from coming
    pair.checkpoint();
    assert_eq!(pair.secondary.guest.in_flight(), 1);
    pair.secondary.guest.finish();
    let mut expected = pair.primary.disk();
    assert_eq!(expected[128 * 512..][..2 * 4096], [4; 2 * 4096]);
    assert_eq!(pair.secondary.disk(), expected);
    expected[64 * 512..][..2 * 4096].fill(3);
    assert_eq!(pair.secondary.seen(), expected);
}

#[test]
fn a_secondary_that_does_not_keep_up_slows_the_primary_down() {
    const DISK_BYTES: usize = 64 << 20;
    let mut pair = Pair::start(&vec![0; DISK_BYTES], 8 * 4096);
    // a buffer of eight blocks takes next to nothing, so what is written stays on the link until that is full
    let queued = |pair: &mut Pair| pair.primary.status()["primary"]["link_queue_bytes"].as_u64().unwrap();
    let bytes = DATA_BYTES / 4096 * 4096;
    let mut written = 0;
    let mut offer = |pair: &mut Pair| {
        while pair.primary.guest.free_slots() > 0 {
            pair.primary.guest.begin_write(written as u64 / 512, &vec![(written >> 12) as u8 | 1; bytes]);
            written += bytes;
        }
    };
    until(|| {
        offer(&mut pair);
        while let Some(ended) = pair.primary.guest.next_ended(Duration::from_millis(1)) {
            assert_eq!(ended.status, OK);
        }
        queued(&mut pair) > (32 << 20) - bytes as u64
    });
    offer(&mut pair);
    while !pair.primary.guest.nothing_ends() {}
    assert!(pair.primary.guest.in_flight() > 0 && written > 32 << 20);
    assert!(queued(&mut pair) <= 32 << 20);
    // and a checkpoint sets it free
    pair.checkpoint();
    let mut checkpoints = 1;
    while pair.primary.guest.in_flight() > 0 {
        match pair.primary.guest.next_ended(Duration::from_millis(100)) {
            Some(ended) => assert_eq!(ended.status, OK),
            None => pair.checkpoint(),
        }
        checkpoints += 1;
        assert!(checkpoints < 1000);
    }
    pair.checkpoint();
}

#[test]
fn a_protected_disk_serves_nothing_before_it_is_attached() {
    let mut side = Side::start(&sectors(&[9; SECTORS]), BUFFER_BYTES);
    side.guest.begin_write(0, &[1; 512]);
    assert!(side.guest.nothing_ends());
    assert_eq!(side.guest.pause(), 0);
    side.guest.resume(0);
    assert_eq!(side.status()["role"], "waiting");
    assert_eq!(side.status()["in_flight"], 0);
    for command in [Command::Marker { epoch: 1 }, Command::Commit { epoch: 1 }] {
        assert!(side.tell(&command).unwrap_err().contains("waiting"));
    }
    side.tell(&Command::TakeOver).unwrap();
    side.guest.finish();
    assert_eq!(side.disk()[..512], [1; 512]);
}

#[test]
fn without_its_controller_neither_side_touches_its_disk() {
    let start = sectors(&[9; SECTORS]);
    let mut pair = Pair::start(&start, BUFFER_BYTES);
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.change_controllers();
        assert_eq!(side.status()["role"], "silenced");
        side.guest.begin_write(0, &[1; 512]);
        assert!(side.guest.nothing_ends());
    }
    assert_eq!((pair.primary.disk(), pair.secondary.disk()), (start.clone(), start));
}

#[test]
fn a_silenced_side_stays_silent() {
    let start = sectors(&[9; SECTORS]);
    let mut pair = Pair::start(&start, BUFFER_BYTES);
    pair.secondary.guest.write(0, &[1; 512]);
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.tell(&Command::Detach).unwrap();
        side.tell(&Command::Silence).unwrap();
        side.guest.begin_write(3, &[2; 512]);
        assert!(side.guest.nothing_ends());
        for command in [Command::TakeOver, Command::Detach] {
            assert!(side.tell(&command).unwrap_err().contains("silenced"));
        }
        assert!(side.attach(Role::Primary, &link().0).unwrap_err().contains("silenced"));
        assert_eq!(side.disk(), start);
    }
}

#[test]
fn a_lost_link_is_told_and_writes_wait_for_what_comes_next() {
    let mut pair = Pair::start(&sectors(&[9; SECTORS]), BUFFER_BYTES);
    pair.secondary.tell(&Command::Detach).unwrap();
    assert!(matches!(pair.primary.next_event(), Event::LinkLost { .. }));
    pair.primary.guest.begin_write(0, &[1; 512]);
    assert!(pair.primary.guest.nothing_ends());
    // told once, by the event: a controller that has not heard it yet may go on with its checkpoint
    pair.primary.tell(&Command::Marker { epoch: 1 }).unwrap();
    pair.primary.tell(&Command::Detach).unwrap();
    assert!(pair.primary.guest.nothing_ends());
    pair.primary.tell(&Command::TakeOver).unwrap();
    pair.primary.guest.finish();
    assert_eq!(pair.primary.disk()[..512], [1; 512]);
}

#[test]
fn nonsense_on_the_link_ends_it_and_changes_nothing() {
    let start = sectors(&[9; SECTORS]);
    let frame = |kind, epoch, offset: u64, data: &[u8]| {
        let mut bytes = Vec::new();
        colo::link::encode(kind, epoch, &[&offset.to_be_bytes(), data], &mut bytes);
        bytes
    };
    let past_the_end = frame(1, 1, SECTORS as u64 * 512, &[1; 512]);
    for nonsense in [
        b"GET / HTTP/1.1\r\nHost: disk.example.org\r\n\r\n".to_vec(),
        past_the_end,
        frame(1, 2, 0, &[1; 512]),
        frame(1, 1, 1, &[1; 512]),
        frame(1, 1, 0, &[1; 511]),
        frame(77, 1, 0, &[1; 512]),
        frame(3, 1, 0, &[]),
        frame(1, 1, 0, &[1; 512])[..100].to_vec(),
    ] {
        let mut side = Side::start(&start, BUFFER_BYTES);
        let (ours, theirs) = link();
        side.attach(Role::Secondary, &theirs).unwrap();
        let mut ours = UnixStream::from(ours);
        ours.write_all(&nonsense).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        match side.next_event() {
            Event::LinkLost { reason } => assert!(!reason.is_empty()),
            other => panic!("{other:?}"),
        }
        assert_eq!(side.disk(), start);
        assert_eq!(side.guest.read(0, 512), [9; 512]);
    }
}

#[test]
fn commands_out_of_order_are_refused() {
    let mut pair = Pair::start(&sectors(&[9; SECTORS]), BUFFER_BYTES);
    assert!(pair.secondary.tell(&Command::Commit { epoch: 1 }).unwrap_err().contains("not arrived"));
    assert!(pair.secondary.tell(&Command::Commit { epoch: 2 }).unwrap_err().contains("running"));
    assert!(pair.secondary.tell(&Command::Marker { epoch: 1 }).unwrap_err().contains("secondary"));
    assert!(pair.primary.tell(&Command::Marker { epoch: 2 }).unwrap_err().contains("running"));
    assert!(pair.primary.tell(&Command::Commit { epoch: 1 }).unwrap_err().contains("running"));
    assert!(pair.primary.attach(Role::Primary, &link().0).unwrap_err().contains("primary"));
    assert!(
        pair.primary
            .tell(&Command::Attach { role: Role::Primary, epoch: 1 })
            .unwrap_err()
            .contains("descriptor")
    );
    pair.checkpoint();
    pair.primary.guest.write(0, &[1; 512]);
    pair.checkpoint();
}
