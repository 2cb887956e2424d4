//! The program is killed under load, again and again, and a frontend that keeps its inflight memory misses nothing.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const LIMIT: Duration = Duration::from_secs(20);
const ENTRIES: u16 = 128;
/// Requests at once, each with four descriptors and a block of the disk of its own.
const SLOTS: u16 = ENTRIES / 4;
const BLOCK: u64 = 4096;
const DISK_BYTES: u64 = SLOTS as u64 * BLOCK;
const RAM_BYTES: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const EVENT_IDX: u64 = 1 << 29;

/// The running program. Killed with the value.
struct Program(Child);

impl Program {
    fn start(socket: &Path, disk: &Path, direct: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-blk-backend"));
        command.arg("--socket-path").arg(socket).arg("--blk-file").arg(disk).args(["--direct", direct]);
        Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// What survives the program: the guest's memory and driver, and what the frontend keeps.
struct Machine {
    ram: OwnedFd,
    memory: Arc<GuestMemory>,
    kick: EventFd,
    call: EventFd,
    inflight: Option<(VhostUserInflight, File)>,
    available: u16,
    seen: u16,
    /// How many requests each slot has made: an odd one writes its number, an even one reads that back.
    requests: [u64; SLOTS as usize],
    busy: [bool; SLOTS as usize],
}

impl Machine {
    fn new() -> Self {
        let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&ram, RAM_BYTES).unwrap();
        let mut table = MemoryTable::new(DirtyLogs::new());
        let file = ram.try_clone().unwrap();
        table
            .replace(vec![Region {
                guest_address: 0,
                bytes: RAM_BYTES,
                user_address: USER,
                mmap_offset: 0,
                file,
            }])
            .unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        Self {
            ram,
            memory: table.memory().clone(),
            kick: event(),
            call: event(),
            inflight: None,
            available: 0,
            seen: 0,
            requests: [0; SLOTS as usize],
            busy: [false; SLOTS as usize],
        }
    }

    /// Connects as QEMU does after the connection was lost: the inflight memory as it is, the base from the used ring.
    fn connect(&mut self, socket: &Path) -> Frontend {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::yield_now();
        };
        let mut frontend = Frontend::from_stream(stream, 1);
        let features = frontend.get_features().unwrap();
        frontend.set_owner().unwrap();
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        assert!(frontend.get_protocol_features().unwrap().contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features & (VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX)).unwrap();
        let asked = VhostUserInflight::new(0, 0, 1, ENTRIES);
        let (inflight, file) = self.inflight.get_or_insert_with(|| frontend.get_inflight_fd(&asked).unwrap());
        frontend.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: RAM_BYTES,
                userspace_addr: USER,
                mmap_offset: 0,
                mmap_handle: self.ram.as_raw_fd(),
            }])
            .unwrap();
        frontend.set_vring_num(0, ENTRIES).unwrap();
        frontend.set_vring_base(0, self.used_index()).unwrap();
        let addresses = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: USER + DESCRIPTORS,
            used_ring_addr: USER + USED,
            avail_ring_addr: USER + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_addr(0, &addresses).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
        frontend
    }

    fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap()
    }

    fn data_at(slot: u16) -> u64 {
        0x10000 + u64::from(slot) * 2 * BLOCK
    }

    /// Offers the slot's next request: a write of the next version, or a read of the present one.
    fn offer(&mut self, slot: u16) {
        let at = usize::from(slot);
        self.requests[at] += 1;
        let write = self.requests[at] % 2 == 1;
        let data = Self::data_at(slot);
        let (header, status) = (data + BLOCK, data + BLOCK + 16);
        let content = if write { block(slot, self.requests[at]) } else { vec![0xaa; BLOCK as usize] };
        self.memory.write_slice(&content, GuestAddress(data)).unwrap();
        let sector = u64::from(slot) * BLOCK / 512;
        let words = [&u32::from(write).to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xee]].concat();
        self.memory.write_slice(&words, GuestAddress(header)).unwrap();
        let head = slot * 4;
        let data_flags = if write { 1 } else { 1 | 2 };
        for (index, descriptor) in [
            Descriptor::new(header, 16, 1, head + 1),
            Descriptor::new(data, BLOCK as u32, data_flags, head + 2),
            Descriptor::new(status, 1, 2, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let at = DESCRIPTORS + 16 * (u64::from(head) + index as u64);
            self.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % ENTRIES);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
        self.busy[at] = true;
        self.kick.write(1).unwrap();
    }

    /// Takes `count` answers, and offers the slot of each again when `more`.
    fn answers(&mut self, count: usize, more: bool) {
        let deadline = Instant::now() + LIMIT;
        let mut left = count;
        while left > 0 {
            if self.used_index() == self.seen {
                assert!(Instant::now() < deadline, "{left} of {count} answers do not come");
                std::thread::yield_now();
                continue;
            }
            let at = USED + 4 + 8 * u64::from(self.seen % ENTRIES);
            self.seen = self.seen.wrapping_add(1);
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let slot = (head / 4) as u16;
            let at = usize::from(slot);
            assert!(
                head.is_multiple_of(4) && self.busy[at],
                "head {head} is answered, and was not asked or twice"
            );
            self.busy[at] = false;
            let status: u8 = self.memory.read_obj(GuestAddress(Self::data_at(slot) + BLOCK + 16)).unwrap();
            assert_eq!(status, 0, "slot {slot}");
            if self.requests[at].is_multiple_of(2) {
                let mut seen = vec![0; BLOCK as usize];
                self.memory.read_slice(&mut seen, GuestAddress(Self::data_at(slot))).unwrap();
                assert!(
                    seen == block(slot, self.requests[at] - 1),
                    "slot {slot} does not read what it wrote"
                );
            }
            if more {
                self.offer(slot);
            }
            left -= 1;
        }
    }

    fn under_way(&self) -> usize {
        self.busy.iter().filter(|busy| **busy).count()
    }
}

fn block(slot: u16, version: u64) -> Vec<u8> {
    let word = (u64::from(slot) << 48 | version).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK as usize).collect()
}

/// Numbers from a seed (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn killed_again_and_again(directory: &str, direct: &str) {
    let seed = std::env::var("COLO_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("COLO_TEST_SEED={seed}");
    let mut dice = Dice(seed);
    let directory = tempfile::tempdir_in(directory).unwrap();
    let disk: PathBuf = directory.path().join("disk");
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let socket = directory.path().join("socket");
    let mut machine = Machine::new();
    (0..SLOTS).for_each(|slot| machine.offer(slot));
    let mut interrupted = 0;
    for _ in 0..60 {
        let program = Program::start(&socket, &disk, direct);
        let frontend = machine.connect(&socket);
        machine.answers(1 + dice.roll(400) as usize, true);
        // at any moment of what the program does
        let until = Instant::now() + Duration::from_nanos(dice.roll(300_000));
        while Instant::now() < until {}
        drop(program);
        interrupted += usize::from(machine.under_way() > 0);
        drop(frontend);
    }
    assert_eq!(interrupted, 60, "there is always something under way");
    let program = Program::start(&socket, &disk, direct);
    let frontend = machine.connect(&socket);
    machine.answers(machine.under_way(), false);
    assert_eq!((machine.under_way(), machine.used_index()), (0, machine.available));
    assert_eq!(frontend.get_vring_base(0).unwrap(), u32::from(machine.available));
    drop((frontend, program));
    let disk = File::open(&disk).unwrap();
    for slot in 0..SLOTS {
        let mut found = vec![0; BLOCK as usize];
        disk.read_exact_at(&mut found, u64::from(slot) * BLOCK).unwrap();
        let version = machine.requests[usize::from(slot)];
        assert!(found == block(slot, version - (version + 1) % 2), "slot {slot} on the disk");
    }
}

#[test]
fn nothing_is_lost_on_a_disk() {
    killed_again_and_again("/var/tmp", "auto");
}

#[test]
fn nothing_is_lost_in_the_page_cache() {
    killed_again_and_again("/var/tmp", "off");
}

#[test]
fn nothing_is_lost_in_memory() {
    killed_again_and_again("/dev/shm", "auto");
}

#[test]
fn a_second_frontend_is_served_when_the_first_has_gone() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("socket"));
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let _program = Program::start(&socket, &disk, "off");
    for _ in 0..3 {
        let mut machine = Machine::new();
        (0..SLOTS).for_each(|slot| machine.offer(slot));
        let frontend = machine.connect(&socket);
        machine.answers(200, true);
        machine.answers(machine.under_way(), false);
        drop(frontend);
    }
}
