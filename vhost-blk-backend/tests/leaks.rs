//! A thousand frontends come and go, in good order or not, and the program is as large as before.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: usize = 1000;
const WARM_UP: usize = 100;
/// A thread that allocates for the first time gets an arena. What leaks with every frontend is a hundred times as much.
const MAPPINGS_SLACK: usize = 8;
/// What an allocator may hold more or less of at any moment.
const RSS_SLACK_KIB: u64 = 1024;
const LIMIT: Duration = Duration::from_secs(20);

const QUEUES: u16 = 4;
const ENTRIES: u16 = 16;
const BLOCK: u32 = 4096;
const DISK_BYTES: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;
/// Two regions, as a PC has below and above its hole.
const REGIONS: [u64; 2] = [0, 1 << 32];
const REGION_BYTES: u64 = 1 << 20;
/// A queue's ring and its data, from here on.
const QUEUE_BYTES: u64 = 0x20000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const DATA: u64 = 0x8000;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const LOG_ALL: u64 = 1 << 26;

/// The running program. Killed with the value.
struct Program(Child);

impl Program {
    fn start(socket: &Path, disk: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-blk-backend"));
        command.arg("--socket-path").arg(socket).arg("--blk-file").arg(disk);
        command.args(["--queues", &QUEUES.to_string(), "--poll-us", "0"]);
        Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn size(&self) -> Size {
        let at = |what: &str| format!("/proc/{}/{what}", self.0.id());
        let status = fs::read_to_string(at("status")).unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Size {
            descriptors: fs::read_dir(at("fd")).unwrap().count(),
            mappings: fs::read_to_string(at("maps")).unwrap().lines().count(),
            rss_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[derive(Clone, Copy, Debug)]
struct Size {
    descriptors: usize,
    mappings: usize,
    rss_kib: u64,
}

/// How a frontend ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// After the rings were stopped.
    Stopped,
    /// With everything set up and requests under way.
    Dead,
    /// With half of what there is to say said.
    HalfWay,
    /// In the middle of a migration.
    Logging,
}

const ENDS: [End; 4] = [End::Stopped, End::Dead, End::HalfWay, End::Logging];

/// A virtual machine that lives as long as one connection.
struct Machine {
    ram: [OwnedFd; 2],
    memory: Arc<GuestMemory>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

impl Machine {
    fn new() -> Self {
        let file = || {
            let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, REGION_BYTES).unwrap();
            file
        };
        let ram = [file(), file()];
        let mut table = MemoryTable::new(DirtyLogs::new());
        let region = |(file, guest_address): (&OwnedFd, u64)| Region {
            guest_address,
            bytes: REGION_BYTES,
            user_address: USER + guest_address,
            mmap_offset: 0,
            file: file.try_clone().unwrap(),
        };
        table.replace(ram.iter().zip(REGIONS).map(region).collect()).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let events = || (0..QUEUES).map(|_| event()).collect();
        Self { ram, memory: table.memory().clone(), kicks: events(), calls: events() }
    }

    /// Connects and speaks until `end`. Returns the program's size from when it has answered for the first time: it
    /// serves one frontend after the other, so that nothing of the one before is left then.
    fn live(&self, socket: &Path, end: End, program: &Program) -> Size {
        let mut frontend = Frontend::from_stream(UnixStream::connect(socket).unwrap(), u64::from(QUEUES));
        let offered = frontend.get_features().unwrap();
        let size = program.size();
        frontend.set_owner().unwrap();
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        assert!(frontend.get_protocol_features().unwrap().contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let logging = if end == End::Logging { LOG_ALL } else { 0 };
        frontend.set_features(offered & (VERSION_1 | PROTOCOL_FEATURES | logging)).unwrap();
        let asked = VhostUserInflight::new(0, 0, QUEUES, ENTRIES);
        let (inflight, inflight_file) = frontend.get_inflight_fd(&asked).unwrap();
        frontend.set_inflight_fd(&inflight, inflight_file.as_raw_fd()).unwrap();
        self.set_memory(&frontend);
        if end == End::HalfWay {
            return size;
        }
        for queue in 0..QUEUES {
            self.start_queue(&mut frontend, queue);
        }
        if end == End::Logging {
            Self::log(&frontend);
            // and once more, as after a change of the memory's size
            self.set_memory(&frontend);
            Self::log(&frontend);
        }
        for queue in 0..QUEUES {
            self.offer_read(queue);
        }
        if end == End::Dead {
            return size;
        }
        for queue in 0..QUEUES {
            self.await_used(queue);
        }
        if end == End::Stopped {
            for queue in 0..QUEUES {
                assert_eq!(frontend.get_vring_base(queue.into()).unwrap(), 1);
            }
        }
        size
    }

    fn set_memory(&self, frontend: &Frontend) {
        let region = |(file, guest_phys_addr): (&OwnedFd, u64)| VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: REGION_BYTES,
            userspace_addr: USER + guest_phys_addr,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let regions: Vec<_> = self.ram.iter().zip(REGIONS).map(region).collect();
        frontend.set_mem_table(&regions).unwrap();
    }

    fn log(frontend: &Frontend) {
        let bytes = (REGIONS[1] + REGION_BYTES) / 4096 / 8;
        let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        let region =
            VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        frontend.set_log_base(0, Some(region)).unwrap();
    }

    fn base(queue: u16) -> u64 {
        u64::from(queue) * QUEUE_BYTES
    }

    fn start_queue(&self, frontend: &mut Frontend, queue: u16) {
        let at = usize::from(queue);
        let base = USER + Self::base(queue);
        frontend.set_vring_num(at, ENTRIES).unwrap();
        frontend.set_vring_base(at, 0).unwrap();
        let addresses = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_addr(at, &addresses).unwrap();
        frontend.set_vring_call(at, &self.calls[at]).unwrap();
        frontend.set_vring_kick(at, &self.kicks[at]).unwrap();
        frontend.set_vring_enable(at, true).unwrap();
    }

    /// Asks for the disk's first block, into the second region.
    fn offer_read(&self, queue: u16) {
        let base = Self::base(queue);
        let data = base + DATA;
        let write = |value: Descriptor, index: u64| {
            self.memory.write_obj(value, GuestAddress(base + 16 * index)).unwrap();
        };
        write(Descriptor::new(data, 16, 1, 1), 0);
        write(Descriptor::new(REGIONS[1] + u64::from(queue) * u64::from(BLOCK), BLOCK, 1 | 2, 2), 1);
        write(Descriptor::new(data + 16, 1, 2, 0), 2);
        self.memory.write_slice(&[0; 16], GuestAddress(data)).unwrap();
        self.memory.write_obj(0xee_u8, GuestAddress(data + 16)).unwrap();
        self.memory.write_obj(0_u16, GuestAddress(base + AVAILABLE + 4)).unwrap();
        self.memory.store(1_u16, GuestAddress(base + AVAILABLE + 2), Ordering::SeqCst).unwrap();
        self.kicks[usize::from(queue)].write(1).unwrap();
    }

    fn await_used(&self, queue: u16) {
        let base = Self::base(queue);
        let deadline = Instant::now() + LIMIT;
        while self.memory.load::<u16>(GuestAddress(base + USED + 2), Ordering::Acquire).unwrap() != 1 {
            assert!(Instant::now() < deadline, "queue {queue} does not answer");
            std::thread::yield_now();
        }
        let status: u8 = self.memory.read_obj(GuestAddress(base + DATA + 16)).unwrap();
        assert_eq!(status, 0, "queue {queue}");
    }
}

#[test]
fn a_thousand_frontends_leave_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, disk) = (directory.path().join("socket"), directory.path().join("disk"));
    fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let program = Program::start(&socket, &disk);
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "the program does not listen");
        std::thread::yield_now();
    }
    let live = |round: usize| Machine::new().live(&socket, ENDS[round % ENDS.len()], &program);
    let sizes: Vec<Size> = (0..ROUNDS).map(live).collect();
    let (before, after) = (sizes[WARM_UP], sizes[ROUNDS - 1]);
    let told = format!("{before:?} after {WARM_UP} frontends, {after:?} after {ROUNDS}");
    assert_eq!(after.descriptors, before.descriptors, "{told}");
    assert!(after.mappings <= before.mappings + MAPPINGS_SLACK, "{told}");
    assert!(after.rss_kib <= before.rss_kib + RSS_SLACK_KIB, "{told}");
}
