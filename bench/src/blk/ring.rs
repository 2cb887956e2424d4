//! The driver's side of a split virtqueue (virtio 1.2 §2.7) with virtio-blk requests in it (§5.2.6), made so that one
//! core can drive more than ten million requests a second.
//!
//! Every request has a slot with a chain of three descriptors, written once: header, data, status. Header and status
//! share a cache line, and the four descriptors of a slot (the last is unused) another. A request changes only the
//! sector in its header, and nothing else as long as its direction stays the same.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with the device, so it is reached through raw pointers only"
)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Descriptors of a slot.
pub(super) const SLOT_DESCRIPTORS: u16 = 4;
/// Most requests that are taken at once, and after which the available index is published.
pub(super) const BATCH: usize = 16;
/// What a status byte holds before the device writes it.
pub(super) const NO_STATUS: u8 = 0xff;

const PAGE: usize = 4096;
const LINE: usize = 64;
/// Where the status is in a slot's line; the header is at its beginning.
const STATUS: usize = 32;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

#[repr(C)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// Guest memory: a memfd that both sides map.
#[derive(Debug)]
pub(super) struct Memory {
    file: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its mapping, and nothing in it is tied to a thread.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives out addresses only; who reads and writes there says why that is right.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn new(bytes: usize) -> Result<Arc<Self>> {
        let bytes = bytes.next_multiple_of(PAGE);
        let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).context("Cannot make guest memory")?;
        ftruncate(&file, bytes as u64).context("Cannot make guest memory")?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let base = unsafe { mmap(null_mut(), bytes, protection, flags, &file, 0) }.context("Guest memory")?;
        let base = NonNull::new(base.cast()).context("Guest memory is at address 0")?;
        Ok(Arc::new(Self { file, base, bytes }))
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address in this process, which vhost-user calls the user address.
    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A pointer to `bytes` bytes at `offset`, inside the mapping.
    pub(super) fn at<T>(&self, offset: usize, bytes: usize) -> *mut T {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "outside of guest memory");
        let pointer = self.base.as_ptr().wrapping_add(offset).cast::<T>();
        assert!(pointer.is_aligned());
        pointer
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every ring that points into it holds a reference to us.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Where the parts of a queue are in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) size: u16,
    pub(super) descriptors: usize,
    pub(super) available: usize,
    pub(super) used: usize,
    headers: usize,
    data: usize,
    end: usize,
}

impl Layout {
    /// A queue for `depth` requests of `block_bytes` each, placed from `start` on.
    pub(super) fn new(start: usize, depth: u16, block_bytes: usize) -> Self {
        let size = (depth * SLOT_DESCRIPTORS).next_power_of_two().max(64);
        let entries = usize::from(size);
        let after = |end: usize| end.next_multiple_of(PAGE);
        let descriptors = after(start);
        let available = after(descriptors + size_of::<Descriptor>() * entries);
        let used = after(available + 6 + 2 * entries);
        let headers = after(used + 6 + 8 * entries);
        let data = after(headers + LINE * usize::from(depth));
        let end = data + block_bytes.next_multiple_of(PAGE) * usize::from(depth);
        Self { size, descriptors, available, used, headers, data, end }
    }

    /// The first byte behind it.
    pub(super) fn end(&self) -> usize {
        self.end
    }
}

/// What the device has broken.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    /// It used a request that is not in flight.
    #[error("The device says that it used descriptor {head}, which begins no request in flight")]
    Head {
        /// The descriptor.
        head: u32,
    },
    /// It used more than was available.
    #[error("The device says that it used {used} requests, of {available} that were available")]
    TooMany {
        /// Used since we last looked.
        used: u16,
        /// In flight then.
        available: u16,
    },
}

/// One queue, driven by one thread.
#[derive(Debug)]
pub(super) struct Ring {
    /// What the pointers lead into.
    _memory: Arc<Memory>,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u16,
    headers: *mut u8,
    data: *mut u8,
    data_offset: usize,
    block_bytes: usize,
    slots: u16,
    size: u16,
    event_idx: bool,
    /// Requests offered, of which the device knows the first `published`.
    offered: u16,
    published: u16,
    /// Requests seen used.
    seen: u16,
    /// Which slots write; none is offered before it was prepared.
    writes: Vec<Option<bool>>,
    in_flight: Vec<bool>,
}

// SAFETY: the pointers lead into `memory`, which is kept as long as they are, and only the owner of the ring uses them
// on this side.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn new(
        memory: &Arc<Memory>,
        layout: &Layout,
        depth: u16,
        block_bytes: usize,
        event_idx: bool,
    ) -> Self {
        let (slots, size) = (usize::from(depth), usize::from(layout.size));
        assert!(slots * usize::from(SLOT_DESCRIPTORS) <= size);
        let mut ring = Self {
            _memory: memory.clone(),
            descriptors: memory.at(layout.descriptors, size_of::<Descriptor>() * size),
            available: memory.at(layout.available, 6 + 2 * size),
            used: memory.at(layout.used, 6 + 8 * size),
            headers: memory.at(layout.headers, LINE * slots),
            data: memory.at(layout.data, block_bytes.next_multiple_of(PAGE) * slots),
            data_offset: layout.data,
            block_bytes,
            slots: depth,
            size: layout.size,
            event_idx,
            offered: 0,
            published: 0,
            seen: 0,
            writes: vec![None; slots],
            in_flight: vec![false; slots],
        };
        for slot in 0..depth {
            ring.write_chain(slot, layout.headers);
        }
        ring.quiet();
        ring
    }

    pub(super) fn slots(&self) -> u16 {
        self.slots
    }

    /// Requests that the device has and has not ended yet, as far as we have seen.
    pub(super) fn pending(&self) -> u16 {
        self.published.wrapping_sub(self.seen)
    }

    fn write_chain(&mut self, slot: u16, headers_offset: usize) {
        let first = slot * SLOT_DESCRIPTORS;
        let line = (headers_offset + LINE * usize::from(slot)) as u64;
        let data = (self.data_offset + self.stride() * usize::from(slot)) as u64;
        let chain = [
            Descriptor { address: line, bytes: size_of::<Header>() as u32, flags: NEXT, next: first + 1 },
            Descriptor { address: data, bytes: self.block_bytes as u32, flags: NEXT, next: first + 2 },
            Descriptor { address: line + STATUS as u64, bytes: 1, flags: WRITABLE, next: 0 },
        ];
        for (at, descriptor) in chain.into_iter().enumerate() {
            // SAFETY: `first + at` is below 4 * slots <= size; the device reads only what is available.
            unsafe { self.descriptors.add(usize::from(first) + at).write_volatile(descriptor) };
        }
        // SAFETY: the line of a slot is inside the headers, and the device reads only what is available.
        unsafe { self.line(slot).add(STATUS).write_volatile(NO_STATUS) };
    }

    fn stride(&self) -> usize {
        self.block_bytes.next_multiple_of(PAGE)
    }

    #[inline]
    fn line(&self, slot: u16) -> *mut u8 {
        debug_assert!(slot < self.slots);
        self.headers.wrapping_add(LINE * usize::from(slot))
    }

    /// Makes a request of a slot that is not in flight. The device knows of it after [`Self::publish`].
    #[inline]
    pub(super) fn offer(&mut self, slot: u16, write: bool, sector: u64) {
        let index = usize::from(slot);
        assert!(!std::mem::replace(&mut self.in_flight[index], true), "slot {slot} is in flight");
        if self.writes[index] != Some(write) {
            self.turn(slot, write);
        }
        // SAFETY: `slot` is one of ours, or `in_flight` would have panicked, so both places are inside guest memory;
        // the device does not look at them before the index is published.
        unsafe {
            (&raw mut (*self.line(slot).cast::<Header>()).sector).write_volatile(sector.to_le());
            let entry = self.available.add(2 + usize::from(self.offered & (self.size - 1)));
            entry.write_volatile((slot * SLOT_DESCRIPTORS).to_le());
        }
        self.offered = self.offered.wrapping_add(1);
    }

    /// Gives a slot's request another direction.
    #[cold]
    fn turn(&mut self, slot: u16, write: bool) {
        let flags = if write { NEXT } else { NEXT | WRITABLE };
        let data = usize::from(slot * SLOT_DESCRIPTORS) + 1;
        // SAFETY: as in `offer`.
        unsafe {
            (&raw mut (*self.descriptors.add(data)).flags).write_volatile(flags.to_le());
            (&raw mut (*self.line(slot).cast::<Header>()).kind).write_volatile(u32::from(write).to_le());
        }
        self.writes[usize::from(slot)] = Some(write);
    }

    /// Lets the device see what was offered. Returns whether it wants to be kicked (§2.7.13.4).
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let before = std::mem::replace(&mut self.published, self.offered);
        if before == self.offered {
            return false;
        }
        self.atomic(self.available, 1).store(self.offered.to_le(), Ordering::Release);
        // the index must be visible before the device's wish is read
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = 2 + 4 * usize::from(self.size);
            let event = u16::from_le(self.atomic(self.used, at).load(Ordering::Relaxed));
            self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(before)
        } else {
            u16::from_le(self.atomic(self.used, 0).load(Ordering::Relaxed)) & NO_NOTIFY == 0
        }
    }

    /// The slots of requests that the device has ended, as many as fit.
    #[inline]
    pub(super) fn take(&mut self, slots: &mut [u16; BATCH]) -> Result<usize, RingError> {
        let used = u16::from_le(self.atomic(self.used, 1).load(Ordering::Acquire)).wrapping_sub(self.seen);
        if used == 0 {
            return Ok(0);
        }
        let available = self.pending();
        if used > available {
            return Err(RingError::TooMany { used, available });
        }
        let count = usize::from(used).min(BATCH);
        for slot in &mut slots[..count] {
            let at = 2 + 4 * usize::from(self.seen & (self.size - 1));
            // SAFETY: an entry of the used ring, which the device wrote before the index that we have read.
            let head = u32::from_le(unsafe { self.used.add(at).cast::<u32>().read_volatile() });
            *slot = (head / u32::from(SLOT_DESCRIPTORS)) as u16;
            let ours = head % u32::from(SLOT_DESCRIPTORS) == 0
                && head < u32::from(self.slots * SLOT_DESCRIPTORS)
                && std::mem::replace(&mut self.in_flight[usize::from(*slot)], false);
            if !ours {
                return Err(RingError::Head { head });
            }
            self.prefetch(*slot);
            self.seen = self.seen.wrapping_add(1);
        }
        Ok(count)
    }

    /// Asks for a slot's line before it is needed, for writing: the device has it in its core's cache.
    #[inline]
    fn prefetch(&self, slot: u16) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch has no effect that a program can see.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_ET0>(self.line(slot).cast_const().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = slot;
    }

    /// The status of a request that has ended, which is reset.
    #[inline]
    pub(super) fn take_status(&mut self, slot: u16) -> u8 {
        let status = self.line(slot).wrapping_add(STATUS);
        // SAFETY: inside the line of a slot, which has ended, so that the device leaves it alone.
        unsafe {
            let value = status.read_volatile();
            status.write_volatile(NO_STATUS);
            value
        }
    }

    /// Asks for a signal at the next completion. Returns true when there is one already (§2.7.10).
    pub(super) fn arm(&self) -> bool {
        if self.event_idx {
            self.used_event().store(self.seen.to_le(), Ordering::SeqCst);
        } else {
            self.atomic(self.available, 0).store(0, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        self.atomic(self.used, 1).load(Ordering::Acquire) != self.seen.to_le()
    }

    /// Asks for no signals. With EVENT_IDX that holds for the next 32768 completions.
    pub(super) fn quiet(&self) {
        if self.event_idx {
            self.used_event().store(self.seen.wrapping_sub(1).to_le(), Ordering::SeqCst);
        } else {
            self.atomic(self.available, 0).store(NO_INTERRUPT.to_le(), Ordering::SeqCst);
        }
    }

    fn used_event(&self) -> &AtomicU16 {
        self.atomic(self.available, 2 + usize::from(self.size))
    }

    /// A 16 bit word of the available or the used ring.
    #[inline]
    fn atomic(&self, ring: *mut u16, word: usize) -> &AtomicU16 {
        // SAFETY: the callers' words are inside their ring (flags 0, index 1, the event behind the entries), aligned,
        // mapped as long as we are, and on both sides reached by atomic accesses only.
        unsafe { AtomicU16::from_ptr(ring.add(word)) }
    }

    /// Fills the data of a slot that is not in flight.
    pub(super) fn set_data(&mut self, slot: u16, data: &[u8]) {
        let to = self.data_of(slot, data.len());
        // SAFETY: checked by `data_of`; the device has no request with this buffer.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Copies the data of a slot that is not in flight.
    pub(super) fn copy_data(&self, slot: u16, data: &mut [u8]) {
        let from = self.data_of(slot, data.len());
        // SAFETY: checked by `data_of`; the device has no request with this buffer.
        unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) };
    }

    fn data_of(&self, slot: u16, bytes: usize) -> *mut u8 {
        assert!(slot < self.slots && bytes <= self.block_bytes && !self.in_flight[usize::from(slot)]);
        self.data.wrapping_add(self.stride() * usize::from(slot))
    }
}

#[cfg(test)]
mod tests;
