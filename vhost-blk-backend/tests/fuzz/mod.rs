//! What a hostile guest, frontend or controller may do, driven by arbitrary bytes. The functions panic, hang or are
//! killed where the back end does something wrong; libFuzzer (`make fuzz`) and `cargo test` call them alike.
#![allow(dead_code, unreachable_pub, reason = "each driver uses its own part")]

#[path = "../../../tests/fuzz/input.rs"]
mod input;

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use colo::control::Server;
use colo::memory::{DirtyLog, DirtyLogs, MemoryTable, PAGE_BYTES, PageSet, Region};
use colo::vhost_user::{Device, Ring, RingSetup, serve_connection};
use input::Input;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg, shutdown};
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::control::Controlled;
use vhost_blk_backend::image::{Direct, ImageOptions, Source};
use vm_memory::GuestAddress;

const DISK_BYTES: u64 = 64 << 10;
const RAM_BYTES: u64 = 1 << 20;
/// What is never told to the device, behind the RAM in the same file.
const CANARY_BYTES: u64 = 64 << 10;

/// A disk in memory, none of it zero.
fn image() -> (tempfile::NamedTempFile, ImageOptions) {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    // not what memory holds by itself, so that a read changes it
    file.as_file().write_all_at(&vec![0xa5; DISK_BYTES as usize], 0).unwrap();
    let source = Source::File(file.path().into());
    let image = ImageOptions { direct: Direct::Off, ..ImageOptions::new(source) };
    (file, image)
}

fn device(queues: usize, image: ImageOptions) -> Arc<Backend> {
    let backend = Backend::start(&Options { queues, ..Options::new(image) }).unwrap();
    backend.serve_alone();
    backend
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Sends bytes with descriptors beside them, as far as the other side still listens.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
}

/// Any messages on the vhost-user socket, with and without descriptors. The session ends, and with it every ring.
pub fn vhost_user(data: &[u8]) {
    // one device for all: a frontend that has gone must leave nothing behind
    static DEVICE: OnceLock<Arc<Backend>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| device(2, ImageOptions::new(Source::Null { bytes: DISK_BYTES })));
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let serving = {
        let device = device.clone();
        std::thread::spawn(move || serve_connection(&*device, &DirtyLogs::new(), theirs))
    };
    // meanwhile: a device that cannot answer does not read either
    let mut answers = ours.try_clone().unwrap();
    let reading = std::thread::spawn(move || {
        let mut replies = [0; 4096];
        loop {
            match answers.read(&mut replies) {
                Ok(0) => break,
                Ok(_) => {}
                // the fuzzer's timer
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // closed with messages unread
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => panic!("the session does not end: {error}"),
            }
        }
    });
    let (ram, event) = (memfd(RAM_BYTES), event());
    // not a copy of `ours`: the device makes what it is given non-blocking, for all copies
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut input = Input(data);
    while !input.is_empty() {
        let (what, request, length) = (input.byte(), input.byte(), input.byte());
        let fds: &[BorrowedFd<'_>] = match what & 7 {
            0..=2 => &[],
            3 => &[ram.as_fd()],
            4 => &[event.as_fd()],
            5 => &[ram.as_fd(), ram.as_fd()],
            6 => &[ram.as_fd(), event.as_fd(), ram.as_fd()],
            _ => &[socket.as_fd()],
        };
        let payload = input.bytes(length.into());
        // mostly a header that fits
        let flags = if what & 0x80 == 0 { 1 | u32::from(what & 8) } else { u32::from(input.word()) };
        let announced = if what & 0x40 == 0 { payload.len() as u32 } else { u32::from(input.word()) };
        let header = [u32::from(request % 45), flags, announced].map(u32::to_ne_bytes).concat();
        send(&ours, &[&header, payload].concat(), fds);
    }
    let _ = ours.shutdown(std::net::Shutdown::Write);
    reading.join().unwrap();
    let _ = serving.join().expect("the session panics");
}

/// Any lines on the control socket, with and without descriptors.
pub fn control(data: &[u8]) {
    let mut input = Input(data);
    let protected = input.byte() & 1 == 1;
    let (_file, image) = image();
    let backend = Backend::start(&Options::new(image)).unwrap();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let closer = listener.try_clone().unwrap();
    let server = Server::from_listener(listener);
    let mut controlled =
        Controlled::new(backend, DirtyLogs::new(), server.events(), protected, 1 << 20).unwrap();
    let serving = std::thread::spawn(move || {
        let greeting = controlled.greeting();
        // ends with an error, when the listener is shut down
        drop(server.run(&greeting, &mut controlled));
    });
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let memory = memfd(4096);
    let (link, _peer) = UnixStream::pair().unwrap();
    while !input.is_empty() {
        let (what, length) = (input.byte(), input.byte());
        let fds: &[BorrowedFd<'_>] = match what & 3 {
            0 => &[],
            1 => &[memory.as_fd()],
            2 => &[link.as_fd()],
            _ => &[link.as_fd(), memory.as_fd()],
        };
        send(&stream, input.bytes(length.into()), fds);
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the controller's connection does not end: {error}"),
    }
    shutdown(&closer, Shutdown::Both).unwrap();
    serving.join().expect("the control server panics");
}

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// The guest of one input: memory, and a ring in it.
struct Hostile {
    ram: std::fs::File,
    /// What is in memory by the guest's own doing since it was last compared.
    shadow: Vec<u8>,
    /// The controller's, in pages of the file.
    log: DirtyLog,
    table: MemoryTable,
    size: u16,
    event_idx: bool,
    broken: Arc<AtomicU64>,
    kick: Arc<OwnedFd>,
    offered: u16,
}

impl Hostile {
    fn start(&self, device: &Backend, next_available: u16) {
        let setup = RingSetup {
            index: 0,
            size: self.size,
            descriptors: GuestAddress(DESCRIPTORS),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available,
            event_idx: self.event_idx,
            memory: self.table.memory().clone(),
            kick: Some(self.kick.clone()),
            call: None,
            error: None,
            broken_rings: self.broken.clone(),
            inflight: None,
        };
        device.start_queue(0, Ring::new(setup).unwrap()).unwrap();
    }

    fn new(file: OwnedFd, regions: Vec<Region>, size: u16, event_idx: bool) -> Self {
        let logs = DirtyLogs::new();
        let pages = (RAM_BYTES + CANARY_BYTES) / PAGE_BYTES as u64;
        let log = DirtyLog::create(pages).unwrap();
        logs.set_control(Some(DirtyLog::from_fd(log.as_fd().try_clone_to_owned().unwrap(), pages).unwrap()));
        let mut table = MemoryTable::new(logs);
        table.replace(regions).unwrap();
        Self {
            ram: std::fs::File::from(file),
            shadow: vec![0; (RAM_BYTES + CANARY_BYTES) as usize],
            log,
            table,
            size,
            event_idx,
            broken: Arc::default(),
            kick: Arc::new(event()),
            offered: 0,
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, at).unwrap();
        self.shadow[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Stops the queue; all that was taken is answered, or the ring is broken. Each page that the device has changed is
    /// marked, and none is outside of guest memory. `alone`: nobody else writes to memory.
    fn stop(&mut self, device: &Backend, alone: bool) -> u16 {
        let next = device.stop_queue(0);
        let mut memory = vec![0; self.shadow.len()];
        self.ram.read_exact_at(&mut memory, 0).unwrap();
        let canary = &memory[RAM_BYTES as usize..];
        assert!(canary.iter().all(|byte| *byte == 0), "written outside of guest memory");
        if alone {
            if self.broken.load(Ordering::SeqCst) == 0 {
                assert_eq!(self.used_index(), next, "taken and not answered");
            }
            let pages = memory.chunks(PAGE_BYTES).zip(self.shadow.chunks(PAGE_BYTES));
            for (page, _) in pages.enumerate().filter(|(_, (now, guests))| now != guests) {
                assert!(self.log.is_marked(page as u64), "page {page} was written to and is not marked");
            }
            self.shadow = memory;
            self.log.drain(&mut PageSet::new(self.log.pages()));
        }
        next
    }

    fn used_index(&self) -> u16 {
        let mut bytes = [0; 2];
        self.ram.read_exact_at(&mut bytes, USED + 2).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn offer(&mut self, head: u16) {
        self.write(AVAILABLE + 4 + 2 * u64::from(self.offered % self.size), &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.offered.to_le_bytes());
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }
}

/// A guest that puts anything into its rings, descriptors and requests, at any time.
pub fn chain(data: &[u8]) {
    static DEVICES: OnceLock<Mutex<(Vec<Arc<Backend>>, tempfile::NamedTempFile)>> = OnceLock::new();
    let devices = DEVICES.get_or_init(|| {
        let (file, image) = image();
        let null = ImageOptions::new(Source::Null { bytes: DISK_BYTES });
        Mutex::new((vec![device(1, null), device(1, image)], file))
    });
    // one guest at a time
    let devices = devices.lock().unwrap();
    let mut input = Input(data);
    let setup = input.byte();
    let device = &devices.0[usize::from(setup & 1)];
    let file = memfd(RAM_BYTES + CANARY_BYTES);
    let region = |guest_address, bytes, mmap_offset| Region {
        guest_address,
        bytes,
        user_address: guest_address,
        mmap_offset,
        file: file.try_clone().unwrap(),
    };
    // one region, or two that touch
    let half = RAM_BYTES / 2;
    let regions = if setup & 2 == 0 {
        vec![region(0, RAM_BYTES, 0)]
    } else {
        vec![region(0, half, 0), region(half, half, half)]
    };
    let mut guest = Hostile::new(file, regions, 1 << (setup >> 4 & 7).min(6), setup & 4 != 0);
    device.set_features(device.features());
    guest.start(device, 0);

    let scribbles = setup & 8 != 0;
    let stop = Arc::new(AtomicBool::new(false));
    let scribbler = scribbles.then(|| {
        let (ram, stop) = (guest.ram.try_clone().unwrap(), stop.clone());
        let bytes = data.to_vec();
        std::thread::spawn(move || {
            let mut at = 0;
            while !stop.load(Ordering::Relaxed) {
                // descriptors and, behind them, requests
                let place = [0, 0x10, 0x3000, 0x3008, AVAILABLE + 4][at % 5] + (at as u64 % 64) * 16;
                let _ = ram.write_all_at(&bytes[at % bytes.len()..][..1], place);
                at += 1;
            }
        })
    });
    while !input.is_empty() {
        match input.byte() {
            // a descriptor: address, length, flags and next mostly near what makes sense
            op @ 0..=99 => {
                let (page, offset, length) = (input.byte(), input.word(), input.word());
                let (flags, next) = (input.byte(), input.byte());
                let address = match page {
                    0xff => u64::MAX - u64::from(offset),
                    0xfe => RAM_BYTES - u64::from(offset),
                    0xfd => half - u64::from(offset & 0x3ff),
                    page => u64::from(page) << 12 | u64::from(offset & 0xfff),
                };
                let bytes = if flags & 0x80 == 0 { u32::from(length) } else { u32::from(length) << 16 };
                let words =
                    [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &[flags & 7, 0, next & 0x3f, 0]];
                // into the table, or into an indirect one
                let at = if op < 70 { DESCRIPTORS } else { 0x3000 } + u64::from(op % 64) * 16;
                guest.write(at, &words.concat());
            }
            // a header or other bytes
            op @ 100..=139 => {
                let at = 0x3000 + (u64::from(op % 8) << 12) + u64::from(input.byte()) * 8;
                let length = input.byte() % 33;
                guest.write(at, input.bytes(length.into()));
            }
            140..=219 => guest.offer(u16::from(input.byte()) % (guest.size + 1)),
            // the available index as it comes
            220..=224 => {
                let index = input.word();
                guest.write(AVAILABLE + 2, &index.to_le_bytes());
                guest.offered = index;
            }
            // a pause
            225..=244 => {
                let next = guest.stop(device, !scribbles);
                guest.start(device, next);
            }
            _ => std::thread::yield_now(),
        }
    }
    stop.store(true, Ordering::Relaxed);
    if let Some(scribbler) = scribbler {
        scribbler.join().unwrap();
    }
    guest.stop(device, !scribbles);
    // whoever comes next is served
    sound(device);
}

/// A well formed request of a sound guest is answered.
fn sound(device: &Backend) {
    let file = memfd(RAM_BYTES);
    let region = Region {
        guest_address: 0,
        bytes: RAM_BYTES,
        user_address: 0,
        mmap_offset: 0,
        file: file.try_clone().unwrap(),
    };
    let mut guest = Hostile::new(file, vec![region], 4, false);
    let descriptor = |address: u64, bytes: u32, flags: u16, next: u16| {
        [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    guest.write(DESCRIPTORS, &descriptor(0x3000, 16, 1, 1));
    guest.write(DESCRIPTORS + 16, &descriptor(0x4000, 512, 3, 2));
    guest.write(DESCRIPTORS + 32, &descriptor(0x5000, 1, 2, 0));
    guest.write(0x5000, &[0xee]);
    guest.start(device, 0);
    guest.offer(0);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while guest.used_index() == 0 {
        assert!(std::time::Instant::now() < deadline, "a sound request is not answered");
        std::thread::yield_now();
    }
    let mut status = [0xee];
    guest.ram.read_exact_at(&mut status, 0x5000).unwrap();
    assert_eq!((status, device.stop_queue(0)), ([0], 1));
}

/// Seeds from which a fuzzer finds its way: what a sound peer says.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    // a read: header, data, status, offered; then a discard; both devices, both region layouts, with EVENT_IDX
    for setup in [0x40, 0x41, 0x47, 0x4d, 0x2c] {
        let mut chain = vec![setup];
        for kind in [0u8, 1, 4, 8, 11, 13] {
            chain.extend([100, 0, 16, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let data_flags = if kind == 0 || kind == 8 { 3 } else { 1 };
            chain.extend([0, 3, 0, 0, 16, 0, 1, 1]);
            chain.extend([
                1,
                5,
                0,
                0,
                if kind > 10 { 16 } else { 0 },
                if kind > 10 { 0 } else { 2 },
                data_flags,
                2,
            ]);
            chain.extend([2, 6, 0, 0, 1, 0, 2, 0]);
            chain.extend([140, 0, 225]);
        }
        // an indirect table
        chain.extend([70, 7, 0, 0, 16, 0, 1, 1, 71, 6, 0, 0, 1, 0, 2, 0, 3, 3, 0x60, 0, 32, 0, 4, 0, 140, 3]);
        seeds.push(("chain", chain));
    }
    let message =
        |what: u8, request: u8, payload: &[u8]| [&[what, request, payload.len() as u8], payload].concat();
    let number = |value: u64| value.to_ne_bytes();
    let state = |index: u32, num: u32| [index.to_ne_bytes(), num.to_ne_bytes()].concat();
    let region: Vec<u8> = [0u64, RAM_BYTES, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let addresses: Vec<u8> =
        [state(0, 0), [DESCRIPTORS, USED, AVAILABLE, 0].map(u64::to_ne_bytes).concat()].concat();
    let inflight = [&number(0)[..], &number(0), &[2, 0, 64, 0, 0, 0, 0, 0]].concat();
    for memory in [5u8, 37] {
        let table = if memory == 5 {
            [&state(1, 0)[..], &region].concat()
        } else {
            [&number(0)[..], &region].concat()
        };
        seeds.push((
            "vhost_user",
            [
                message(0, 1, &[]),
                message(0, 15, &[]),
                message(0, 16, &number(0xb2bf)),
                message(0, 2, &number(1 << 32 | 1 << 30 | 1 << 29)),
                message(0, 31, &inflight),
                message(3, 32, &[&number(4096)[..], &inflight[8..]].concat()),
                message(11, memory, &table),
                message(0, 8, &state(0, 64)),
                message(0, 10, &state(0, 0)),
                message(0, 9, &addresses),
                message(4, 12, &number(0)),
                message(4, 13, &number(0)),
                message(0, 18, &state(0, 1)),
                message(0, 24, &[&[0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &[0; 60]].concat()),
                message(3, 6, &[&number(4096)[..], &number(0)].concat()),
                message(0, 11, &state(0, 0)),
            ]
            .concat(),
        ));
    }
    for protected in [0u8, 1] {
        let mut control = vec![protected];
        for (what, line) in [
            (1, r#"{"execute":"dirty-log","arguments":{"pages":32768},"id":1}"#),
            (2, r#"{"execute":"attach","arguments":{"role":"secondary","epoch":1}}"#),
            (0, r#"{"execute":"commit","arguments":{"epoch":1}}"#),
            (0, r#"{"execute":"marker","arguments":{"epoch":1}}"#),
            (0, r#"{"execute":"resize","arguments":{"bytes":131072}}"#),
            (0, r#"{"execute":"detach"}"#),
            (0, r#"{"execute":"take-over"}"#),
            (0, r#"{"execute":"status"}"#),
            (0, r#"{"execute":"silence"}"#),
        ] {
            control.extend([what, line.len() as u8 + 1]);
            control.extend(line.bytes());
            control.push(b'\n');
        }
        seeds.push(("control", control));
    }
    seeds
}
