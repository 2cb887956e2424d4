//! The device over every kind of backing: what is written, read, discarded and marked is the same.

mod guest;

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use colo::memory::{DirtyLog, DirtyLogs, PageSet};
use colo::vhost_user::Device;
use guest::*;
use tempfile::NamedTempFile;
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::image::{Direct, ImageOptions, Source};

const DISK_BYTES: u64 = 4 << 20;

/// A way to serve a file: where it is, and whether past the page cache.
type Backing = (&'static str, Direct);

/// In memory, in the page cache, on the disk. Which of the last two paths the file system allows is the image's
/// business; both must do the same.
const BACKINGS: [Backing; 3] =
    [("/dev/shm", Direct::Off), ("/var/tmp", Direct::Off), ("/var/tmp", Direct::Auto)];

fn disk(directory: &str) -> NamedTempFile {
    let file = NamedTempFile::new_in(directory).unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    file
}

fn options(disk: &Path, direct: Direct) -> Options {
    Options::new(ImageOptions { direct, ..ImageOptions::new(Source::File(disk.into())) })
}

fn started(options: &Options) -> Arc<Backend> {
    let backend = Backend::start(options).unwrap();
    backend.serve_alone();
    backend
}

fn content(disk: &NamedTempFile, offset: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    disk.as_file().read_exact_at(&mut data, offset).unwrap();
    data
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(31).wrapping_add(seed * 7) >> 3) as u8 | 1).collect()
}

#[test]
fn buffers_at_any_address_and_of_any_length_are_served() {
    for (directory, direct) in BACKINGS {
        let disk = disk(directory);
        let mut guest = Guest::start(started(&options(disk.path(), direct)), DirtyLogs::new());
        let data = pattern(2, 8192);
        for (shift, cut) in [(0, 4096), (1, 4096), (3, 511), (512, 100), (8, 8191)] {
            let parts = |slot: usize, writable| {
                let at = Guest::data_at(slot) + shift;
                let rest = data.len() as u32 - cut;
                vec![(at, cut, writable), (at + u64::from(cut), rest, writable)]
            };
            let slot = guest.next_slot();
            guest.set_data(slot, &[&vec![0; shift as usize], &data[..]].concat());
            guest.offer(OUT, 8, |slot| {
                [vec![Guest::header_part(slot)], parts(slot, false), vec![Guest::status_part(slot)]].concat()
            });
            let case = format!("{directory} {direct:?}: {cut} bytes at {shift}");
            assert_eq!(guest.await_ended().status, OK, "{case}");
            assert!(content(&disk, 4096, data.len()) == data, "{case}");
            let slot = guest.next_slot();
            guest.set_data(slot, &[0; 16384]);
            guest.offer(IN, 8, |slot| {
                [vec![Guest::header_part(slot)], parts(slot, true), vec![Guest::status_part(slot)]].concat()
            });
            assert_eq!(guest.await_ended(), Ended { slot, status: OK, used: 8193 }, "{case}");
            let seen = guest.data(slot, 16384);
            let (before, after) = (shift as usize, shift as usize + data.len());
            assert!(seen[before..after] == data, "{case}");
            assert!(seen[..before].iter().chain(&seen[after..]).all(|byte| *byte == 0), "{case}");
        }
    }
}

#[test]
fn exactly_what_the_device_wrote_is_marked() {
    for (directory, direct) in BACKINGS {
        let disk = disk(directory);
        let logs = DirtyLogs::new();
        let mut guest = Guest::start(started(&options(disk.path(), direct)), logs.clone());
        let log = DirtyLog::create(Guest::pages()).unwrap();
        logs.set_control(Some(
            DirtyLog::from_fd(log.as_fd().try_clone_to_owned().unwrap(), Guest::pages()).unwrap(),
        ));
        let marked = |guest: &Guest| {
            let taken = guest.pause();
            let mut pages = PageSet::new(Guest::pages());
            log.drain(&mut pages);
            guest.resume(taken);
            // the queue asks for notifications when it goes to sleep, which is a write as well: to the used ring's page
            pages.iter().filter(|page| *page != USED / 4096).collect::<Vec<_>>()
        };
        let case = format!("{directory} {direct:?}");
        guest.write(0, &pattern(3, 8192));
        assert_eq!(marked(&guest).len(), 1, "{case}: the status byte's page");
        for shift in [0, 1] {
            let slot = guest.offer(IN, 0, |slot| {
                let data = (Guest::data_at(slot) + shift, 8192, true);
                vec![Guest::header_part(slot), data, Guest::status_part(slot)]
            });
            assert_eq!(guest.await_ended().status, OK);
            let first = Guest::data_at(slot) / 4096;
            let last = (Guest::data_at(slot) + shift + 8191) / 4096;
            let expected: Vec<u64> =
                std::iter::once(Guest::status_at(slot) / 4096).chain(first..=last).collect();
            assert_eq!(marked(&guest), expected, "{case}: read at {shift}");
        }
    }
}

#[test]
fn discards_and_zeros_cover_what_they_say_and_free_it() {
    for (directory, direct) in BACKINGS {
        let disk = disk(directory);
        let backend = started(&options(disk.path(), direct));
        assert_eq!(backend.features() >> 13 & 3, 3, "DISCARD and WRITE_ZEROES");
        let mut guest = Guest::start(backend, DirtyLogs::new());
        let bytes = 128 << 10;
        let full = pattern(4, bytes);
        for (kind, extents, frees) in [
            (DISCARD, &[(16, 32, 0), (64, 128, 0)][..], true),
            (WRITE_ZEROES, &[(16, 128, 1)], true),
            (WRITE_ZEROES, &[(16, 128, 0)], false),
            (WRITE_ZEROES, &[(3, 1, 0)], false),
            (DISCARD, &[(5, 0, 0)], false),
        ] {
            let case = format!("{directory} {direct:?}: {kind} of {extents:?}");
            guest.write(0, &full);
            guest.begin_flush();
            guest.finish();
            let blocks = disk.as_file().metadata().unwrap().blocks();
            guest.begin_clear(kind, extents);
            assert_eq!(guest.await_ended().status, OK, "{case}");
            let mut expected = full.clone();
            for (sector, sectors, _) in extents {
                expected[*sector as usize * 512..][..*sectors as usize * 512].fill(0);
            }
            assert!(content(&disk, 0, bytes) == expected, "{case}");
            assert!(guest.read(0, bytes) == expected, "{case}");
            if frees {
                assert!(disk.as_file().metadata().unwrap().blocks() < blocks, "{case}: nothing was freed");
            }
        }
        // and with a write cache that the driver has switched off
        guest.begin_clear(WRITE_ZEROES, &[(0, 8, 0)]);
        guest.finish();
    }
}

#[test]
fn the_driver_chooses_the_write_cache() {
    let disk = disk("/var/tmp");
    let writeback = |backend: &Backend| backend.config_bytes()[32];
    let (flush, config_wce) = (1 << 9, 1 << 11);
    let backend = started(&options(disk.path(), Direct::Auto));
    backend.set_features(flush | config_wce);
    assert_eq!(writeback(&backend), 1);
    let mut guest = Guest::on_queue(0, backend.clone(), DirtyLogs::new());
    for (choice, seen) in [([0], 0), ([1], 1)] {
        backend.write_config(32, &choice).unwrap();
        assert_eq!(writeback(&backend), seen);
        guest.write(8, &pattern(seen.into(), 4096));
        guest.begin_clear(WRITE_ZEROES, &[(0, 8, 0)]);
        guest.finish();
        assert!(content(&disk, 4096, 4096) == pattern(seen.into(), 4096));
    }
    for (offset, data) in [(32, &[2][..]), (32, &[0, 0]), (0, &[0]), (33, &[0])] {
        assert!(backend.write_config(offset, data).is_err());
    }
    // a driver that cannot flush has none
    backend.set_features(0);
    assert_eq!(writeback(&backend), 0);
    drop((guest, backend));
    let through = Options { writeback: false, ..options(disk.path(), Direct::Auto) };
    let backend = started(&through);
    backend.set_features(flush | config_wce);
    assert_eq!(writeback(&backend), 0);
}

#[test]
fn blocks_of_4096_bytes_are_neither_split_nor_shifted() {
    let disk = disk("/var/tmp");
    let image = ImageOptions { block_bytes: 4096, ..ImageOptions::new(Source::File(disk.path().into())) };
    let backend = started(&Options::new(image));
    assert_eq!(backend.config_bytes()[20..24], 4096u32.to_le_bytes());
    let mut guest = Guest::start(backend, DirtyLogs::new());
    guest.write(8, &pattern(5, 8192));
    assert!(guest.read(8, 8192) == pattern(5, 8192));
    for (sector, bytes) in [(8, 512), (1, 4096), (7, 8192)] {
        guest.begin_read(sector, bytes);
        assert_eq!(guest.await_ended().status, IO_ERROR, "{bytes} bytes at {sector}");
    }
}

#[test]
fn a_null_disk_answers_everything_and_writes_nothing_into_the_guest() {
    let backend = started(&Options::new(ImageOptions::new(Source::Null { bytes: 1 << 40 })));
    let mut guest = Guest::start(backend, DirtyLogs::new());
    let sector = (1u64 << 40) / 512 - 8;
    guest.write(sector, &pattern(6, 4096));
    let slot = guest.next_slot();
    guest.set_data(slot, &[7; 4096]);
    guest.begin_read(sector, 4096);
    assert_eq!(guest.await_ended(), Ended { slot, status: OK, used: 4097 });
    assert_eq!(guest.data(slot, 4096), [7; 4096]);
    guest.begin_flush();
    guest.begin_clear(DISCARD, &[(0, 8, 0)]);
    guest.finish();
    guest.begin_read(sector + 8, 512);
    assert_eq!(guest.await_ended().status, IO_ERROR);
}

#[test]
fn queues_share_workers_and_none_waits_for_another_to_stop() {
    for (queues, workers) in [(4, 2), (5, 1), (3, 3)] {
        let disk = disk("/var/tmp");
        let poll = Duration::from_micros(20);
        let backend = started(&Options { queues, workers, poll, ..options(disk.path(), Direct::Auto) });
        assert_eq!(backend.queues(), queues);
        assert_eq!(backend.features() >> 12 & 1, 1, "MQ");
        backend.set_features(backend.features());
        let mut guests: Vec<Guest> =
            (0..queues).map(|queue| Guest::on_queue(queue, backend.clone(), DirtyLogs::new())).collect();
        for round in 0..10u64 {
            for (queue, guest) in guests.iter_mut().enumerate() {
                while guest.free_slots() > 0 {
                    let at = (queue * 32 + guest.free_slots() - 1) as u64 * 16;
                    guest.begin_write(at, &pattern(at + round, 8192));
                }
            }
            // one of them stops while the others are busy
            let stopping = &guests[round as usize % queues];
            let taken = stopping.pause();
            assert_eq!(stopping.used_index(), taken);
            stopping.resume(taken);
            guests.iter_mut().for_each(Guest::finish);
            for at in (0..queues as u64 * 32).map(|slot| slot * 16) {
                assert!(
                    content(&disk, at * 512, 8192) == pattern(at + round, 8192),
                    "round {round}, sector {at}"
                );
            }
        }
    }
}
