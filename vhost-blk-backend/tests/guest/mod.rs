//! A driver for one queue: guest RAM in a memfd, a split virtqueue in it, requests over any descriptors.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};
use colo::vhost_user::{Device, Ring, RingSetup};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost_blk_backend::backend::Backend;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;
/// What the status byte holds before the device writes it.
pub const NO_STATUS: u8 = 0xee;

const QUEUE_SIZE: u16 = 256;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
const SLOTS: u64 = 32;
/// Descriptors of a slot.
const SLOT_DESCRIPTORS: u16 = QUEUE_SIZE / SLOTS as u16;
pub const SLOT_BYTES: u64 = 256 << 10;
const RAM_BYTES: u64 = (1 << 20) + SLOTS * SLOT_BYTES;
/// Most bytes of data of a request.
pub const DATA_BYTES: usize = (SLOT_BYTES - 8192) as usize;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub slot: usize,
    pub status: u8,
    pub used: u32,
}

pub struct Guest {
    memory: Arc<GuestMemory>,
    table: MemoryTable,
    device: Arc<Backend>,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    /// Requests made available so far.
    available: u16,
    /// Requests seen used so far.
    seen: u16,
    free: Vec<usize>,
    event_idx: bool,
    /// It kicks; otherwise the device has to look by itself.
    kicks: bool,
    queue: usize,
}

impl Guest {
    /// A guest whose queue 0 is running on `device`.
    pub fn start(device: Arc<Backend>, logs: DirtyLogs) -> Self {
        device.config_read();
        device.set_features(device.features());
        Self::on_queue(0, device, logs)
    }

    /// A guest, with memory of its own, whose one queue is this one of `device`.
    pub fn on_queue(queue: usize, device: Arc<Backend>, logs: DirtyLogs) -> Self {
        let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&ram, RAM_BYTES).unwrap();
        let map = |logs| {
            let mut table = MemoryTable::new(logs);
            let region = Region {
                guest_address: 0,
                bytes: RAM_BYTES,
                user_address: 0x7f00_0000_0000,
                mmap_offset: 0,
                file: ram.as_fd().try_clone_to_owned().unwrap(),
            };
            table.replace(vec![region]).unwrap();
            table
        };
        let event = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let guest = Self {
            memory: map(DirtyLogs::new()).memory().clone(),
            table: map(logs),
            device,
            kick: event(),
            call: event(),
            available: 0,
            seen: 0,
            free: (0..SLOTS as usize).rev().collect(),
            event_idx: true,
            kicks: true,
            queue,
        };
        guest.resume(0);
        guest
    }

    /// From here on it does not kick.
    pub fn stop_kicking(&mut self) {
        let next_available = self.pause();
        self.kicks = false;
        self.resume(next_available);
    }

    pub fn pages() -> u64 {
        RAM_BYTES / 4096
    }

    /// As the VMM does when the VM pauses. Returns the index that the ring goes on from.
    pub fn pause(&self) -> u16 {
        self.device.stop_queue(self.queue)
    }

    pub fn resume(&self, next_available: u16) {
        let setup = RingSetup {
            index: self.queue,
            size: QUEUE_SIZE,
            descriptors: GuestAddress(DESCRIPTORS),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available,
            event_idx: self.event_idx,
            memory: self.table.memory().clone(),
            kick: self.kicks.then(|| self.kick.clone()),
            call: Some(self.call.clone()),
            error: None,
            broken_rings: Arc::default(),
            inflight: None,
        };
        self.device.start_queue(self.queue, Ring::new(setup).unwrap()).unwrap();
    }

    /// How many requests the device has taken and ended, by the used ring.
    pub fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap()
    }

    pub fn available_index(&self) -> u16 {
        self.available
    }

    pub fn in_flight(&self) -> u16 {
        self.available - self.seen
    }

    /// The slot of the next request, to prepare its data.
    pub fn next_slot(&self) -> usize {
        *self.free.last().expect("a free slot")
    }

    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    fn base(slot: usize) -> u64 {
        (1 << 20) + slot as u64 * SLOT_BYTES
    }

    /// Where the data of a slot's request begins.
    pub fn data_at(slot: usize) -> u64 {
        Self::base(slot) + 4096
    }

    pub fn status_at(slot: usize) -> u64 {
        Self::base(slot) + 100
    }

    pub fn set_data(&self, slot: usize, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(Self::data_at(slot))).unwrap();
    }

    pub fn data(&self, slot: usize, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory.read_slice(&mut data, GuestAddress(Self::data_at(slot))).unwrap();
        data
    }

    fn header(&self, slot: usize, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(Self::base(slot))).unwrap();
        self.memory.write_obj(NO_STATUS, GuestAddress(Self::status_at(slot))).unwrap();
    }

    /// Offers a chain of (address, bytes, writable) and kicks. Returns its slot, whose memory it may use.
    pub fn offer(
        &mut self,
        kind: u32,
        sector: u64,
        layout: impl FnOnce(usize) -> Vec<(u64, u32, bool)>,
    ) -> usize {
        let slot = self.free.pop().expect("a free slot");
        self.header(slot, kind, sector);
        let parts = layout(slot);
        let first = slot as u16 * SLOT_DESCRIPTORS;
        assert!(parts.len() <= usize::from(SLOT_DESCRIPTORS));
        for (at, (address, bytes, writable)) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            let index = first + at as u16;
            let descriptor = Descriptor::new(*address, *bytes, flags, if last { 0 } else { index + 1 });
            self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * u64::from(index))).unwrap();
        }
        let at = AVAILABLE + 4 + 2 * u64::from(self.available % QUEUE_SIZE);
        self.memory.write_obj(first, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        // ask for a signal at the very next completion
        let used_event = AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory.store(self.seen, GuestAddress(used_event), Ordering::SeqCst).unwrap();
        self.memory.store(self.available, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        slot
    }

    pub fn header_part(slot: usize) -> (u64, u32, bool) {
        (Self::base(slot), 16, false)
    }

    pub fn status_part(slot: usize) -> (u64, u32, bool) {
        (Self::status_at(slot), 1, true)
    }

    pub fn begin_read(&mut self, sector: u64, bytes: usize) -> usize {
        self.offer(IN, sector, |slot| {
            vec![Self::header_part(slot), (Self::data_at(slot), bytes as u32, true), Self::status_part(slot)]
        })
    }

    pub fn begin_write(&mut self, sector: u64, data: &[u8]) -> usize {
        let slot = self.next_slot();
        self.set_data(slot, data);
        self.offer(OUT, sector, |slot| {
            vec![
                Self::header_part(slot),
                (Self::data_at(slot), data.len() as u32, false),
                Self::status_part(slot),
            ]
        })
    }

    /// The next request that ends, if it does within the limit.
    pub fn next_ended(&mut self, limit: Duration) -> Option<Ended> {
        let deadline = std::time::Instant::now() + limit;
        while self.used_index() == self.seen {
            let used_event = AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
            self.memory.store(self.seen, GuestAddress(used_event), Ordering::SeqCst).unwrap();
            if self.used_index() != self.seen {
                break;
            }
            let left = deadline.checked_duration_since(std::time::Instant::now())?;
            let timeout = rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            if poll(&mut [PollFd::new(&*self.call, PollFlags::IN)], Some(&timeout)).unwrap() == 0 {
                return None;
            }
            let _ = rustix::io::read(&*self.call, &mut [0u8; 8]);
        }
        let at = USED + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let used = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        let slot = head as usize / usize::from(SLOT_DESCRIPTORS);
        let status = self.memory.read_obj(GuestAddress(Self::status_at(slot))).unwrap();
        assert!(!self.free.contains(&slot), "slot {slot} was used twice");
        self.free.push(slot);
        Some(Ended { slot, status, used })
    }

    pub fn await_ended(&mut self) -> Ended {
        self.next_ended(Duration::from_secs(20)).expect("the request does not end")
    }

    /// Waits for everything that is in flight; all of it must have gone well.
    pub fn finish(&mut self) {
        while self.in_flight() > 0 {
            assert_eq!(self.await_ended().status, OK);
        }
    }

    /// Nothing ends within a short while.
    pub fn nothing_ends(&mut self) -> bool {
        self.next_ended(Duration::from_millis(100)).is_none()
    }

    pub fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        assert_eq!(self.in_flight(), 0);
        let next = self.next_slot();
        self.set_data(next, &vec![0xaa; bytes]);
        self.begin_read(sector, bytes);
        let slot = self.await_ended();
        assert_eq!((slot.status, slot.used), (OK, bytes as u32 + 1));
        self.data(slot.slot, bytes)
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.in_flight(), 0);
        self.begin_write(sector, data);
        let ended = self.await_ended();
        assert_eq!((ended.status, ended.used), (OK, 1));
    }

    /// A discard or a write of zeros of extents (sector, sectors, flags).
    pub fn begin_clear(&mut self, kind: u32, extents: &[(u64, u32, u32)]) -> usize {
        let data: Vec<u8> = extents
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        let slot = self.next_slot();
        self.set_data(slot, &data);
        self.offer(kind, 0, |slot| {
            let data = (Self::data_at(slot), data.len() as u32, false);
            vec![Self::header_part(slot), data, Self::status_part(slot)]
        })
    }

    pub fn begin_flush(&mut self) -> usize {
        self.offer(FLUSH, 0, |slot| vec![Self::header_part(slot), Self::status_part(slot)])
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.device.stop_queue(self.queue);
    }
}
