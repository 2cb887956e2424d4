//! virtio-blk requests (virtio 1.2 §5.2.6) in a driver's ring.
//!
//! Every request has a slot with a chain of three descriptors, written once: header, data, status. Header and status
//! share a cache line, and the four descriptors of a slot (the last is unused) another. A request changes only the
//! sector in its header, and nothing else as long as its direction stays the same.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with the device, so it is reached through raw pointers only"
)]

use std::sync::Arc;

use crate::driver::{self, BATCH, Descriptor, Memory, NEXT, PAGE, Place, RingError, WRITABLE};

/// Descriptors of a slot.
pub(super) const SLOT_DESCRIPTORS: u16 = 4;
/// What a status byte holds before the device writes it.
pub(super) const NO_STATUS: u8 = 0xff;

const LINE: usize = 64;
/// Where the status is in a slot's line; the header is at its beginning.
const STATUS: usize = 32;

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// Where the parts of a queue are in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) place: Place,
    headers: usize,
    data: usize,
    end: usize,
}

impl Layout {
    /// A queue for `depth` requests of `block_bytes` each, placed from `start` on.
    pub(super) fn new(start: usize, depth: u16, block_bytes: usize) -> Self {
        let place = Place::new(start, depth * SLOT_DESCRIPTORS);
        let headers = place.end;
        let data = (headers + LINE * usize::from(depth)).next_multiple_of(PAGE);
        let end = data + block_bytes.next_multiple_of(PAGE) * usize::from(depth);
        Self { place, headers, data, end }
    }

    /// The first byte behind it.
    pub(super) fn end(&self) -> usize {
        self.end
    }
}

/// One queue, driven by one thread.
#[derive(Debug)]
pub(super) struct Ring {
    ring: driver::Ring<SLOT_DESCRIPTORS>,
    headers: *mut u8,
    data: *mut u8,
    data_offset: usize,
    block_bytes: usize,
    /// Which slots write; none is offered before it was prepared.
    writes: Vec<Option<bool>>,
}

// SAFETY: the pointers lead into the memory that `ring` keeps, and only the owner uses them on this side.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn new(
        memory: &Arc<Memory>,
        layout: &Layout,
        depth: u16,
        block_bytes: usize,
        event_idx: bool,
    ) -> Self {
        let slots = usize::from(depth);
        let mut ring = Self {
            ring: driver::Ring::new(memory, &layout.place, depth, event_idx),
            headers: memory.at(layout.headers, LINE * slots),
            data: memory.at(layout.data, block_bytes.next_multiple_of(PAGE) * slots),
            data_offset: layout.data,
            block_bytes,
            writes: vec![None; slots],
        };
        for slot in 0..depth {
            ring.write_chain(slot, layout.headers);
        }
        ring
    }

    pub(super) fn slots(&self) -> u16 {
        self.ring.slots()
    }

    /// Requests that the device has and has not ended yet, as far as we have seen.
    pub(super) fn pending(&self) -> u16 {
        self.ring.pending()
    }

    fn write_chain(&mut self, slot: u16, headers_offset: usize) {
        let first = slot * SLOT_DESCRIPTORS;
        let line = (headers_offset + LINE * usize::from(slot)) as u64;
        let data = (self.data_offset + self.stride() * usize::from(slot)) as u64;
        let chain = [
            Descriptor { address: line, bytes: size_of::<Header>() as u32, flags: NEXT, next: first + 1 },
            self.data_descriptor(slot, data, NEXT),
            Descriptor { address: line + STATUS as u64, bytes: 1, flags: WRITABLE, next: 0 },
        ];
        for (at, descriptor) in (0..).zip(chain) {
            self.ring.set_descriptor(slot, at, descriptor);
        }
        // SAFETY: the line of a slot is inside the headers, and the device reads only what is available.
        unsafe { self.line(slot).add(STATUS).write_volatile(NO_STATUS) };
    }

    fn data_descriptor(&self, slot: u16, address: u64, flags: u16) -> Descriptor {
        Descriptor { address, bytes: self.block_bytes as u32, flags, next: slot * SLOT_DESCRIPTORS + 2 }
    }

    fn stride(&self) -> usize {
        self.block_bytes.next_multiple_of(PAGE)
    }

    #[inline]
    fn line(&self, slot: u16) -> *mut u8 {
        debug_assert!(slot < self.slots());
        self.headers.wrapping_add(LINE * usize::from(slot))
    }

    /// Makes a request of a slot that is not in flight. The device knows of it after [`Self::publish`].
    #[inline]
    pub(super) fn offer(&mut self, slot: u16, write: bool, sector: u64) {
        if self.writes[usize::from(slot)] != Some(write) {
            self.turn(slot, write);
        }
        self.ring.offer(slot);
        // SAFETY: `slot` is one of ours, or `offer` would have panicked, so the place is inside guest memory; the device
        // does not look at it before the index is published.
        unsafe { (&raw mut (*self.line(slot).cast::<Header>()).sector).write_volatile(sector.to_le()) };
    }

    /// Gives a slot's request another direction.
    #[cold]
    fn turn(&mut self, slot: u16, write: bool) {
        let flags = if write { NEXT } else { NEXT | WRITABLE };
        let data = (self.data_offset + self.stride() * usize::from(slot)) as u64;
        let descriptor = self.data_descriptor(slot, data, flags);
        self.ring.set_descriptor(slot, 1, descriptor);
        // SAFETY: the line of a slot that is not in flight.
        unsafe {
            (&raw mut (*self.line(slot).cast::<Header>()).kind).write_volatile(u32::from(write).to_le());
        };
        self.writes[usize::from(slot)] = Some(write);
    }

    /// Lets the device see what was offered. Returns whether it wants to be kicked.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// The slots of requests that the device has ended, as many as fit.
    #[inline]
    pub(super) fn take(&mut self, slots: &mut [(u16, u32); BATCH]) -> Result<usize, RingError> {
        let headers = self.headers;
        self.ring.take(slots, |slot| prefetch(headers.wrapping_add(LINE * usize::from(slot))))
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

    /// Asks for a signal at the next completion. Returns true when there is one already.
    pub(super) fn arm(&self) -> bool {
        self.ring.arm()
    }

    /// Asks for no signals.
    pub(super) fn quiet(&self) {
        self.ring.quiet();
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
        assert!(slot < self.slots() && bytes <= self.block_bytes && !self.ring.is_in_flight(slot));
        self.data.wrapping_add(self.stride() * usize::from(slot))
    }
}

/// Asks for a slot's line before it is needed, for writing: the device has it in its core's cache.
#[inline]
fn prefetch(line: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect that a program can see.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(line.cast_const().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests;
