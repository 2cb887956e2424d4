//! A driver, a frontend and a device that are simple enough to be right.

mod malformed;
mod protocol;
mod ring;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};

const RAM_BYTES: u64 = 64 * 4096;
const USER: u64 = 0x7f00_0000_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

fn duplicate(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
}

/// How often an eventfd was signalled since the last call.
fn signals(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn region(ram: &impl AsFd) -> Region {
    Region { guest_address: 0, bytes: RAM_BYTES, user_address: USER, mmap_offset: 0, file: duplicate(ram) }
}

/// Guest memory through a mapping of its own, as the guest has it.
fn map(ram: &OwnedFd, logs: &DirtyLogs) -> Arc<GuestMemory> {
    let mut table = MemoryTable::new(logs.clone());
    table.replace(vec![region(ram)]).unwrap();
    table.memory().clone()
}

/// The driver's side of one ring.
struct Driver {
    memory: Arc<GuestMemory>,
    size: u16,
    available: u16,
    seen: u16,
}

impl Driver {
    fn new(ram: &OwnedFd, size: u16) -> Self {
        Self { memory: map(ram, &DirtyLogs::new()), size, available: 0, seen: 0 }
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn read(&self, at: u64) -> u16 {
        self.memory.load(GuestAddress(at), Ordering::SeqCst).unwrap()
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        self.write(DESCRIPTORS + 16 * u64::from(index), Descriptor::new(address, len, flags as u16, next));
    }

    fn offer(&mut self, head: u16) {
        self.write(AVAILABLE + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    }

    fn set_no_interrupt(&self, flag: bool) {
        self.write(AVAILABLE, u16::from(flag));
    }

    fn set_used_event(&self, index: u16) {
        self.write(AVAILABLE + 4 + 2 * u64::from(self.size), index);
    }

    fn avail_event(&self) -> u16 {
        self.read(USED + 4 + 8 * u64::from(self.size))
    }

    fn no_notify(&self) -> bool {
        self.read(USED) == 1
    }

    /// The next used entry.
    fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.read(USED + 2) == self.seen {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        let read = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((read(at), read(at + 4)))
    }

    fn setup(&self, memory: Arc<GuestMemory>, event_idx: bool) -> RingSetup {
        RingSetup {
            index: 0,
            size: self.size,
            descriptors: GuestAddress(DESCRIPTORS),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available: 0,
            event_idx,
            memory,
            kick: Some(event()),
            call: Some(event()),
            error: Some(event()),
            broken_rings: Arc::default(),
            inflight: None,
        }
    }
}

/// A device that only keeps what it is given; the test does the work.
#[derive(Default)]
struct Shelf {
    config: Mutex<Vec<u8>>,
    features: AtomicU64,
    rings: Mutex<[Option<Ring>; 2]>,
    changed: Condvar,
    starts: AtomicU64,
    feature_choices: AtomicU64,
    quiet: AtomicU64,
    announced: Mutex<Vec<[u8; 6]>>,
    channel: Option<FrontendChannel>,
}

impl Shelf {
    /// Waits until queue `index` runs, then does something with its ring.
    fn with_ring<T>(&self, index: usize, work: impl FnOnce(&mut Ring) -> T) -> T {
        let rings = self.rings.lock().unwrap();
        let mut rings = self.changed.wait_while(rings, |rings| rings[index].is_none()).unwrap();
        work(rings[index].as_mut().unwrap())
    }

    fn runs(&self, index: usize) -> bool {
        self.rings.lock().unwrap()[index].is_some()
    }
}

impl Device for Shelf {
    fn queues(&self) -> usize {
        2
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn config_bytes(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    fn frontend_channel(&self) -> Option<&FrontendChannel> {
        self.channel.as_ref()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), String> {
        let mut config = self.config.lock().unwrap();
        let at = offset as usize..offset as usize + data.len();
        config.get_mut(at).ok_or("Past the end")?.copy_from_slice(data);
        Ok(())
    }

    fn set_features(&self, features: u64) {
        assert!(!self.runs(0) && !self.runs(1));
        self.features.store(features, Ordering::SeqCst);
        self.feature_choices.fetch_add(1, Ordering::SeqCst);
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn announces(&self) -> bool {
        true
    }

    fn announce(&self, mac: [u8; 6]) {
        self.announced.lock().unwrap().push(mac);
    }

    fn quiesced(&self) {
        assert!(!self.runs(0) && !self.runs(1));
        self.quiet.fetch_add(1, Ordering::SeqCst);
    }

    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String> {
        assert!(self.rings.lock().unwrap()[index].replace(ring).is_none());
        self.starts.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_all();
        Ok(())
    }

    fn stop_queue(&self, index: usize) -> u16 {
        // there is none when a test has made away with it, as death does
        self.rings.lock().unwrap()[index].take().map_or(0, |ring| ring.next_avail())
    }
}
