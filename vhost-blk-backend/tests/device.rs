//! The device alone, driven over a virtqueue.

mod guest;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use colo::memory::DirtyLogs;
use colo::vhost_user::Device;
use guest::*;
use tempfile::NamedTempFile;
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::image::{Direct, ImageOptions, Source};

const DISK_BYTES: u64 = 4 << 20;

fn disk() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    file
}

fn options(disk: &NamedTempFile) -> Options {
    let image = ImageOptions { direct: Direct::Off, ..ImageOptions::new(Source::File(disk.path().into())) };
    Options { serial: "the-serial".into(), poll: Duration::from_micros(20), ..Options::new(image) }
}

fn served(disk: &NamedTempFile) -> (Arc<Backend>, Guest) {
    let backend = Backend::start(&options(disk)).unwrap();
    backend.serve_alone();
    let guest = Guest::start(backend.clone(), DirtyLogs::new());
    (backend, guest)
}

fn content(disk: &NamedTempFile, offset: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    disk.as_file().read_exact_at(&mut data, offset).unwrap();
    data
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(31).wrapping_add(seed * 7) >> 3) as u8).collect()
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_back() {
    let disk = disk();
    let (_, mut guest) = served(&disk);
    let data = pattern(1, 96 << 10);
    guest.write(100, &data);
    assert_eq!(content(&disk, 100 * 512, data.len()), data);
    assert_eq!(guest.read(100, data.len()), data);
    assert_eq!(guest.read(99, 512), [0; 512]);
    guest.begin_flush();
    assert_eq!(guest.await_ended().status, OK);
    let last = DISK_BYTES / 512 - 1;
    guest.write(last, &data[..512]);
    assert_eq!(guest.read(last, 512), data[..512]);
}

#[test]
fn the_serial_number_is_padded_with_zeros() {
    let disk = disk();
    let (_, mut guest) = served(&disk);
    let slot = guest.offer(GET_ID, 0, |slot| {
        vec![Guest::header_part(slot), (Guest::data_at(slot), 20, true), Guest::status_part(slot)]
    });
    assert_eq!(guest.await_ended(), Ended { slot, status: OK, used: 21 });
    assert_eq!(guest.data(slot, 20), b"the-serial\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn requests_may_be_split_over_any_descriptors() {
    let disk = disk();
    let (_, mut guest) = served(&disk);
    let data = pattern(2, 2048);
    guest.set_data(guest.next_slot(), &data);
    guest.offer(OUT, 8, |slot| {
        let (header, _, _) = Guest::header_part(slot);
        let at = Guest::data_at(slot);
        let parts = [(header, 7), (header + 7, 9), (at, 1), (at + 1, 1000), (at + 1001, 1047)];
        let mut parts: Vec<_> = parts.into_iter().map(|(address, bytes)| (address, bytes, false)).collect();
        parts.push(Guest::status_part(slot));
        parts
    });
    assert_eq!(guest.await_ended().status, OK);
    assert_eq!(content(&disk, 8 * 512, data.len()), data);
    let slot = guest.offer(IN, 8, |slot| {
        let at = Guest::data_at(slot);
        vec![
            Guest::header_part(slot),
            (at, 3, true),
            (at + 3, 1021, true),
            (at + 1024, 1023, true),
            // the last byte of data and the status in one
            (Guest::data_at(slot) + 2047, 2, true),
        ]
    });
    let ended = guest.await_ended();
    assert_eq!(ended.used, 2049);
    assert_eq!(guest.data(slot, 2049), [&data[..], &[OK]].concat());
}

#[test]
fn wrong_requests_are_told_so_and_change_nothing() {
    let disk = disk();
    let (_, mut guest) = served(&disk);
    let end = DISK_BYTES / 512;
    let both = |kind| {
        move |slot| {
            vec![Guest::header_part(slot), (Guest::data_at(slot), 512, kind == IN), Guest::status_part(slot)]
        }
    };
    for (kind, sector, status, used) in [
        (IN, end, IO_ERROR, 0),
        (OUT, end, IO_ERROR, 1),
        (OUT, u64::MAX, IO_ERROR, 1),
        (77, 0, UNSUPPORTED, 1),
    ] {
        let slot = guest.offer(kind, sector, both(kind));
        assert_eq!(guest.await_ended(), Ended { slot, status, used }, "kind {kind} at {sector}");
    }
    // no place for a status
    let slot = guest.offer(FLUSH, 0, |slot| vec![Guest::header_part(slot)]);
    assert_eq!(guest.await_ended(), Ended { slot, status: NO_STATUS, used: 0 });
    assert_eq!(content(&disk, 0, DISK_BYTES as usize), vec![0; DISK_BYTES as usize]);
    guest.write(0, &[1; 512]);
}

#[test]
fn a_read_only_disk_is_offered_as_such_and_refuses_writes() {
    let disk = disk();
    let mut options = options(&disk);
    options.image.read_only = true;
    let backend = Backend::start(&options).unwrap();
    backend.serve_alone();
    assert_ne!(backend.features() & 1 << 5, 0);
    let mut guest = Guest::start(backend, DirtyLogs::new());
    guest.begin_write(0, &[1; 512]);
    assert_eq!(guest.await_ended().status, IO_ERROR);
    assert_eq!(guest.read(0, 512), [0; 512]);
}

#[test]
fn many_at_once_and_a_drain_that_leaves_nothing_in_flight() {
    let disk = disk();
    let (_, mut guest) = served(&disk);
    let mut next = 0;
    for round in 0..20u64 {
        while guest.free_slots() > 0 {
            let sector = next % 4096;
            next += 64;
            guest.begin_write(sector, &pattern(round, 64 * 512));
        }
        let taken = guest.pause();
        // all that was taken has ended, and nothing else
        assert_eq!(guest.used_index(), taken);
        guest.resume(taken);
        guest.finish();
        assert_eq!(guest.used_index(), guest.available_index());
    }
}

#[test]
fn the_configuration_is_that_of_the_disk() {
    let disk = disk();
    let backend = Backend::start(&Options { queues: 2, ..options(&disk) }).unwrap();
    let config = backend.config_bytes();
    assert_eq!(config.len(), 60);
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 2u16.to_le_bytes());
    assert_eq!(backend.queues(), 2);
    assert!(backend.write_config(0, &[1]).is_err());
}

#[test]
fn a_core_that_does_not_exist_is_refused() {
    let disk = disk();
    let refused = Backend::start(&Options { cores: vec![9999], ..options(&disk) }).unwrap_err();
    assert!(refused.to_string().contains("9999"), "{refused}");
    Backend::start(&Options { cores: vec![0], ..options(&disk) }).unwrap();
}

/// A frontend that gives no descriptor for kicks wants its ring looked at, also when it was idle for long.
#[test]
fn a_ring_that_nobody_kicks_is_looked_at() {
    let disk = disk();
    for poll in [Duration::ZERO, Duration::from_micros(50)] {
        let backend = Backend::start(&Options { poll, ..options(&disk) }).unwrap();
        backend.serve_alone();
        let mut guest = Guest::start(backend, DirtyLogs::new());
        guest.stop_kicking();
        for round in 0..3 {
            guest.write(8, &pattern(round, 4096));
            assert!(guest.nothing_ends());
        }
        assert!(guest.read(8, 4096) == pattern(2, 4096));
        guest.pause();
    }
}
