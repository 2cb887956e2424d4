//! Faults below the device: the guest is told the truth, and everything else goes on.

mod faulty_disk;
mod guest;

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use colo::memory::DirtyLogs;
use colo::vhost_user::Device;
use faulty_disk::*;
use fuser::Errno;
use guest::*;
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::image::{Direct, ImageOptions, Source};

const DISK_BYTES: usize = 4 << 20;
const ALL: std::ops::Range<u64> = 0..DISK_BYTES as u64;

/// A disk that hangs, as the issue of this test has it.
const HANG: Duration = Duration::from_secs(5);

fn backend(disk: &std::path::Path, queues: usize, workers: usize) -> Arc<Backend> {
    backend_with(Direct::Off, disk, queues, workers)
}

fn backend_with(direct: Direct, disk: &std::path::Path, queues: usize, workers: usize) -> Arc<Backend> {
    let options = Options {
        queues,
        workers,
        poll: Duration::from_micros(20),
        ..Options::new(ImageOptions { direct, ..ImageOptions::new(Source::File(disk.into())) })
    };
    let backend = Backend::start(&options).unwrap();
    backend.serve_alone();
    backend
}

/// A guest that only reads.
fn reader(disk: &std::path::Path) -> Guest {
    let image =
        ImageOptions { direct: Direct::Off, read_only: true, ..ImageOptions::new(Source::File(disk.into())) };
    let backend =
        Backend::start(&Options { poll: Duration::from_micros(20), ..Options::new(image) }).unwrap();
    backend.serve_alone();
    Guest::start(backend, DirtyLogs::new())
}

fn served(disk: &FaultyDisk) -> Guest {
    Guest::start(backend(&disk.path(), 1, 1), DirtyLogs::new())
}

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(29).wrapping_add(seed * 11) >> 2) as u8).collect()
}

/// How a request ends that was begun on a guest with nothing else in flight.
fn status(guest: &mut Guest, begin: impl FnOnce(&mut Guest) -> usize) -> u8 {
    assert_eq!(guest.in_flight(), 0);
    let slot = begin(guest);
    let ended = guest.await_ended();
    assert_eq!(ended.slot, slot);
    ended.status
}

#[test]
fn a_read_that_fails_is_told_to_the_guest_and_the_next_one_is_read() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    let data = pattern(1, 16 << 10);
    disk.set_content(64 << 10, &data);
    let fault = disk.fail(Access::Read, 68 << 10..69 << 10, Errno::EIO);
    assert_eq!(status(&mut guest, |guest| guest.begin_read(128, data.len())), IO_ERROR);
    // before and behind the bad place
    assert_eq!(guest.read(128, 4096), data[..4096]);
    assert_eq!(guest.read(138, 4096), data[5120..][..4096]);
    drop(fault);
    assert_eq!(guest.read(128, data.len()), data);
}

#[test]
fn a_write_that_fails_is_told_to_the_guest_and_the_next_one_is_written() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    for (seed, error) in [(2, Errno::EIO), (3, Errno::ENOSPC)] {
        let data = pattern(seed, 8192);
        let before = disk.content(0, DISK_BYTES);
        let fault = disk.fail(Access::Write, 4096..8192, error);
        assert_eq!(status(&mut guest, |guest| guest.begin_write(8, &data)), IO_ERROR);
        assert_eq!(disk.content(0, DISK_BYTES), before);
        guest.write(16, &data);
        assert_eq!(guest.read(16, data.len()), data);
        drop(fault);
        guest.write(8, &data);
        assert_eq!(disk.content(4096, data.len()), data);
    }
}

/// Linux tells of lost pages once and takes them for clean then: a later flush that succeeds proves nothing. Past the page
/// cache it does.
#[test]
fn a_flush_that_fails_is_told_to_the_guest_and_so_are_those_after_it() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    for (direct, later) in [(Direct::On, OK), (Direct::Off, IO_ERROR)] {
        let mut guest = Guest::start(backend_with(direct, &disk.path(), 1, 1), DirtyLogs::new());
        guest.write(0, &pattern(4, 4096));
        assert_eq!(status(&mut guest, Guest::begin_flush), OK);
        for error in [Errno::EIO, Errno::ENOSPC] {
            let _fault = disk.fail(Access::Sync, ALL, error);
            assert_eq!(status(&mut guest, Guest::begin_flush), IO_ERROR);
        }
        assert_eq!(status(&mut guest, Guest::begin_flush), later, "{direct:?}");
        // what concerns no durability goes on
        assert_eq!(guest.read(0, 4096), pattern(4, 4096));
    }
}

#[test]
fn what_a_pause_cannot_make_durable_is_told_to_the_next_flush() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let device = backend(&disk.path(), 1, 1);
    let mut guest = Guest::start(device.clone(), DirtyLogs::new());
    guest.write(0, &pattern(4, 4096));
    let fault = disk.fail(Access::Sync, ALL, Errno::EIO);
    let next = guest.pause();
    device.quiesced();
    drop(fault);
    guest.resume(next);
    assert_eq!(status(&mut guest, Guest::begin_flush), IO_ERROR);
    assert_eq!(device.status()["durability_lost"], true);
}

/// A driver that has switched the write cache off does not flush. One that had done so before this process began is not
/// known; a write that is durable when it is answered is seen here by the sync that it needs.
#[test]
fn without_a_write_cache_every_write_is_durable() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let write = |guest: &mut Guest| {
        let _fault = disk.fail(Access::Sync, ALL, Errno::EIO);
        status(guest, |guest| guest.begin_write(8, &pattern(5, 4096)))
    };
    // a driver that begins here, and chooses
    let device = backend(&disk.path(), 1, 1);
    let mut guest = Guest::start(device.clone(), DirtyLogs::new());
    assert_eq!(write(&mut guest), OK);
    {
        let _fault = disk.fail(Access::Sync, ALL, Errno::EIO);
        assert!(device.write_config(32, &[0]).unwrap_err().contains("durable"));
    }
    assert_eq!((device.config_bytes()[32], write(&mut guest)), (1, OK));
    device.write_config(32, &[0]).unwrap();
    assert_eq!(write(&mut guest), IO_ERROR);
    // a reset keeps the choice
    let next = guest.pause();
    device.set_features(0);
    device.set_features(device.features());
    guest.resume(next);
    assert_eq!((device.config_bytes()[32], write(&mut guest)), (0, IO_ERROR));
    device.write_config(32, &[1]).unwrap();
    assert_eq!(write(&mut guest), OK);
    guest.pause();
    device.quiesced();

    // one that had begun before
    let device = backend(&disk.path(), 1, 1);
    device.set_features(device.features());
    let mut guest = Guest::on_queue(0, device.clone(), DirtyLogs::new());
    assert_eq!(write(&mut guest), IO_ERROR);
    device.config_read();
    assert_eq!(write(&mut guest), IO_ERROR);
    assert_eq!(status(&mut guest, Guest::begin_flush), OK);
    assert_eq!(write(&mut guest), OK);
}

/// A write that was begun with a write cache may be answered after the driver has switched that off, and is never
/// flushed: the switch waits for what is in flight.
#[test]
fn the_write_cache_is_off_when_what_was_in_flight_is_durable() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let device = backend(&disk.path(), 1, 1);
    let mut guest = Guest::start(device.clone(), DirtyLogs::new());
    // a read: a sync of this file system waits for writes by itself
    let hang = disk.hang(Access::Read, ALL);
    guest.begin_read(8, 4096);
    disk.await_hanging(1);
    let switch = std::thread::spawn(move || device.write_config(32, &[0]));
    assert!(guest.nothing_ends());
    assert!(!switch.is_finished());
    drop(hang);
    guest.finish();
    switch.join().unwrap().unwrap();
}

/// The driver's copies are ours to keep while the disk works on them, and a guest must not make us keep any number.
#[test]
fn copies_for_buffers_that_are_not_aligned_are_bounded() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let device = backend_with(Direct::On, &disk.path(), 1, 1);
    let mut guest = Guest::start(device.clone(), DirtyLogs::new());
    let hang = disk.hang(Access::Read, ALL);
    // many times the same memory, in an odd place
    let buffers = [(1, DATA_BYTES as u32, true); 6];
    let request_bytes = DATA_BYTES * buffers.len();
    let expected = (32 << 20) / request_bytes + 1;
    for _ in 0..guest.free_slots() {
        guest.offer(IN, 0, |slot| {
            let data =
                buffers.map(|(shift, bytes, writable)| (Guest::data_at(slot) + shift, bytes, writable));
            [&[Guest::header_part(slot)], &data[..], &[Guest::status_part(slot)]].concat()
        });
    }
    assert!(expected < guest.in_flight().into());
    let taken = || device.status()["in_flight"].as_u64().unwrap() as usize;
    let deadline = Instant::now() + Duration::from_secs(20);
    while taken() < expected {
        assert!(Instant::now() < deadline, "{} of {expected} requests were taken", taken());
        std::thread::yield_now();
    }
    assert!(guest.nothing_ends());
    assert_eq!(taken(), expected);
    drop(hang);
    guest.finish();
}

/// Begins a request whose data is in two pieces with a gap between, so that a short transfer can end in either.
fn begin_in_pieces(guest: &mut Guest, kind: u32, sector: u64, bytes: [u32; 2]) -> usize {
    let writable = kind == IN;
    guest.offer(kind, sector, |slot| {
        let at = Guest::data_at(slot);
        let second = at + u64::from(bytes[0]) + 512;
        vec![
            Guest::header_part(slot),
            (at, bytes[0], writable),
            (second, bytes[1], writable),
            Guest::status_part(slot),
        ]
    })
}

/// Two pieces of a transfer that is cut short, and all of their bytes.
const PIECES: [u32; 2] = [3072, 40960];
const PIECES_BYTES: usize = (PIECES[0] + PIECES[1]) as usize;

/// Reads what is at sector 24 in two pieces: each is filled, and nothing between them.
fn read_in_pieces(guest: &mut Guest, data: &[u8], case: &str) {
    let (first, second) = data.split_at(PIECES[0] as usize);
    guest.set_data(guest.next_slot(), &vec![0xaa; data.len() + 512]);
    let slot = begin_in_pieces(guest, IN, 24, PIECES);
    assert_eq!(guest.await_ended(), Ended { slot, status: OK, used: data.len() as u32 + 1 }, "{case}");
    let read = guest.data(slot, data.len() + 512);
    assert!(read == [first, &[0xaa; 512], second].concat(), "{case}");
}

#[test]
fn short_writes_are_continued_to_the_end() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    for (seed, most) in [(5, 512), (6, 1000), (7, 4096), (8, 7777)] {
        disk.shorten_writes(Some(most));
        let (case, data) = (format!("by {most}"), pattern(seed, PIECES_BYTES));
        let (first, second) = data.split_at(PIECES[0] as usize);
        let before = disk.requests();
        let laid_out = [first, &[0; 512], second].concat();
        guest.set_data(guest.next_slot(), &laid_out);
        assert_eq!(status(&mut guest, |guest| begin_in_pieces(guest, OUT, 24, PIECES)), OK, "{case}");
        assert_eq!(disk.content(24 * 512, PIECES_BYTES), data, "{case}");
        read_in_pieces(&mut guest, &data, &case);
        assert!(disk.requests() - before >= PIECES_BYTES.div_ceil(most) as u64, "nothing was short");
    }
}

#[test]
fn short_reads_are_continued_to_the_end() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let Some((_overlay, path)) = disk.overlay() else { return };
    let mut guest = reader(&path);
    for (seed, most) in [(5, 512), (6, 1000), (7, 4096), (8, 7777)] {
        disk.shorten_reads(Some(most));
        let data = pattern(seed, PIECES_BYTES);
        disk.set_content(24 * 512, &data);
        let before = disk.requests();
        read_in_pieces(&mut guest, &data, &format!("by {most}"));
        assert!(disk.requests() - before >= PIECES_BYTES.div_ceil(most) as u64, "nothing was short");
    }
}

#[test]
fn a_read_that_is_short_and_then_fails_is_an_error() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let Some((_overlay, path)) = disk.overlay() else { return };
    let mut guest = reader(&path);
    disk.set_content(0, &pattern(14, 32768));
    disk.shorten_reads(Some(4096));
    let fault = disk.fail(Access::Read, 12288..16384, Errno::EIO);
    assert_eq!(status(&mut guest, |guest| guest.begin_read(0, 32768)), IO_ERROR);
    assert_eq!(guest.read(0, 12288), pattern(14, 32768)[..12288]);
    drop(fault);
    assert_eq!(guest.read(0, 32768), pattern(14, 32768));
}

#[test]
fn a_file_that_has_become_shorter_is_an_error_past_its_end() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES as u64).unwrap();
    let mut guest = Guest::start(backend(file.path(), 1, 1), DirtyLogs::new());
    guest.write(0, &pattern(13, 8192));
    file.as_file().set_len(6144).unwrap();
    assert_eq!(status(&mut guest, |guest| guest.begin_read(0, 8192)), IO_ERROR);
    assert_eq!(status(&mut guest, |guest| guest.begin_read(1024, 4096)), IO_ERROR);
    assert_eq!(guest.read(0, 6144), pattern(13, 8192)[..6144]);
}

#[test]
fn an_error_in_the_middle_of_a_transfer_is_an_error() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    disk.shorten_writes(Some(4096));
    let _read = disk.fail(Access::Read, 12288..16384, Errno::EIO);
    let _write = disk.fail(Access::Write, 12288..16384, Errno::ENOSPC);
    assert_eq!(status(&mut guest, |guest| guest.begin_read(0, 32768)), IO_ERROR);
    assert_eq!(status(&mut guest, |guest| guest.begin_write(0, &pattern(9, 32768))), IO_ERROR);
    assert_eq!(guest.read(0, 8192), pattern(9, 8192));
}

#[test]
fn a_disk_that_moves_nothing_is_an_error_and_no_endless_loop() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    disk.move_nothing(true);
    assert_eq!(status(&mut guest, |guest| guest.begin_read(0, 4096)), IO_ERROR);
    assert_eq!(status(&mut guest, |guest| guest.begin_write(0, &[1; 4096])), IO_ERROR);
    disk.move_nothing(false);
    guest.write(0, &[1; 4096]);
}

#[test]
fn of_many_requests_at_once_those_fail_that_touch_the_bad_place() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    let _read = disk.fail(Access::Read, 0..1 << 20, Errno::EIO);
    let _write = disk.fail(Access::Write, 0..1 << 20, Errno::EIO);
    disk.shorten_writes(Some(3 << 10));
    for round in 0..10 {
        let mut bad = Vec::new();
        let mut number = 0;
        while guest.free_slots() > 0 {
            let sector = (number % 4) * 2048 - u64::from(number % 4 == 1) + round;
            let slot = match number % 3 {
                0 => guest.begin_read(sector, 8192),
                1 => guest.begin_write(sector, &pattern(number as usize, 8192)),
                _ => guest.begin_flush(),
            };
            if number % 3 != 2 && sector * 512 < 1 << 20 {
                bad.push(slot);
            }
            number += 1;
        }
        // the drain ends, with an answer to all that was taken
        let taken = guest.pause();
        assert_eq!(guest.used_index(), taken);
        guest.resume(taken);
        assert!(!bad.is_empty());
        while guest.in_flight() > 0 {
            let ended = guest.await_ended();
            let expected = if bad.contains(&ended.slot) { IO_ERROR } else { OK };
            assert_eq!(ended.status, expected, "slot {} of round {round}", ended.slot);
        }
    }
}

/// One request of queue 0 hangs for [`HANG`]. Meanwhile queue 1 goes on, of the same worker or of another, and queue 0
/// cannot be stopped; afterwards it can.
fn hangs(disk: &FaultyDisk, workers: usize, access: Access, begin: impl FnOnce(&mut Guest) -> usize) {
    let backend = backend(&disk.path(), 2, workers);
    let mut guest = Guest::start(backend.clone(), DirtyLogs::new());
    let mut other = Guest::on_queue(1, backend.clone(), DirtyLogs::new());
    disk.set_content(1 << 20, &pattern(10, 8192));
    let hang = disk.hang(access, 0..1 << 20);
    let slot = begin(&mut guest);
    disk.await_hanging(1);
    // on the same queue too
    let beside = guest.begin_read(2048, 8192);
    assert_eq!(guest.await_ended(), Ended { slot: beside, status: OK, used: 8193 });

    let (stopped, is_stopped) = channel();
    let base = std::thread::scope(|threads| {
        // in here, so that it ends before the thread is waited for
        let hang = hang;
        let began = Instant::now();
        let pausing = &guest;
        threads.spawn(move || stopped.send(pausing.pause()).unwrap());
        while began.elapsed() < HANG {
            assert_eq!(other.read(2048, 8192), pattern(10, 8192));
            // the kernel lets a sync exclude all writes to the file
            if access != Access::Sync {
                other.write(4096, &pattern(11, 4096));
            }
            let wait = is_stopped.recv_timeout(Duration::from_millis(50));
            assert_eq!(
                wait,
                Err(RecvTimeoutError::Timeout),
                "the queue was stopped with a request in flight"
            );
            assert_eq!(disk.hanging(), 1);
            assert_eq!(guest.used_index(), 1);
        }
        drop(hang);
        is_stopped.recv_timeout(Duration::from_secs(20)).expect("the queue cannot be stopped")
    });
    assert_eq!((base, guest.used_index()), (2, 2));
    let ended = guest.await_ended();
    assert_eq!((ended.slot, ended.status), (slot, OK));
    guest.resume(base);
    assert_eq!(guest.read(2048, 8192), pattern(10, 8192));
    // both guests' queues are stopped before the device goes
    drop((guest, other));
    assert_eq!(Arc::strong_count(&backend), 1);
}

#[test]
fn a_read_that_hangs_keeps_only_its_own_queue_from_stopping() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    hangs(&disk, 1, Access::Read, |guest| guest.begin_read(0, 4096));
}

#[test]
fn a_write_that_hangs_keeps_only_its_own_queue_from_stopping() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    hangs(&disk, 2, Access::Write, |guest| guest.begin_write(0, &pattern(12, 4096)));
    assert_eq!(disk.content(0, 4096), pattern(12, 4096));
}

#[test]
fn a_flush_that_hangs_keeps_only_its_own_queue_from_stopping() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    hangs(&disk, 1, Access::Sync, Guest::begin_flush);
}

#[test]
fn what_hung_and_then_failed_is_told_to_the_guest() {
    let Some(disk) = FaultyDisk::mount(DISK_BYTES) else { return };
    let mut guest = served(&disk);
    let hang = disk.hang(Access::Write, ALL);
    let slot = guest.begin_write(0, &[1; 4096]);
    disk.await_hanging(1);
    let _fault = disk.fail(Access::Write, ALL, Errno::EIO);
    drop(hang);
    let ended = guest.await_ended();
    assert_eq!((ended.slot, ended.status), (slot, IO_ERROR));
}

#[test]
fn a_full_host_file_system_fails_the_writes_that_find_no_room_and_nothing_else() {
    let mount = match mount("tmpfs", &[("size", "1m".into())]) {
        Ok(mount) => mount,
        Err(error) => return println!("skipped: no tmpfs can be mounted: {error}"),
    };
    let path = path_in(&mount).join("disk");
    std::fs::File::create_new(&path).unwrap().set_len(DISK_BYTES as u64).unwrap();
    let mut guest = Guest::start(backend(&path, 1, 1), DirtyLogs::new());
    // no page of the file takes part in two writes
    let bytes = 96 << 10;
    let sector = |number: usize| (number * bytes / 512) as u64;
    let mut kept = 0;
    while status(&mut guest, |guest| guest.begin_write(sector(kept), &pattern(kept, bytes))) == OK {
        kept += 1;
        assert!(kept * bytes <= 1 << 20, "more was kept than there is room for");
    }
    assert!(kept > 0);
    assert_eq!(status(&mut guest, |guest| guest.begin_write(sector(kept + 1), &[1; 4096])), IO_ERROR);
    assert_eq!(status(&mut guest, Guest::begin_flush), OK);
    for number in 0..kept {
        assert_eq!(guest.read(sector(number), bytes), pattern(number, bytes));
    }
    // what has room is written still, and what makes room lets others in
    guest.write(0, &pattern(99, bytes));
    assert_eq!(guest.read(0, bytes), pattern(99, bytes));
    assert_eq!(guest.read(DISK_BYTES as u64 / 512 - 1, 512), [0; 512]);
}
