//! The three parts of a split virtqueue in guest memory (virtio 1.2 §2.7), and how they are read and written.
//!
//! All of it is shared with the guest, which changes it at any time: every access is one atomic or volatile access of
//! the field's own size. What the guest may see of it, and when, is the caller's business ([`super::Ring`]).
#![expect(unsafe_code, reason = "reads and writes rings in guest memory")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::chain::{Table, prefetch};
use super::ring::{RingError, RingSetup};
use crate::memory::{HostMap, Piece};

/// Offsets common to both rings: flags, then the index, then the entries.
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// A queue's memory. Indices wrap at 2^16, as those of the specification do.
#[derive(Debug)]
pub(super) struct SplitQueue {
    map: Arc<HostMap>,
    size: u16,
    table: Table,
    available: Piece,
    used: Piece,
}

// SAFETY: the pointers are into mappings that `map` keeps alive, and every access through them is atomic.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Checks size and alignment (§2.7) and finds the parts in memory.
    pub(super) fn new(setup: &RingSetup, map: Arc<HostMap>) -> Result<Self, RingError> {
        let (index, size) = (setup.index, setup.size);
        let rules = |what| Err(RingError::Layout { index, size, what });
        if size == 0 || size > 32768 || !size.is_power_of_two() {
            return rules("it must be a power of two, 32768 at most");
        }
        for (at, align, what) in [
            (setup.descriptors.0, 16, "its descriptor table is not aligned to 16 bytes"),
            (setup.available.0, 2, "its available ring is not aligned to 2 bytes"),
            (setup.used.0, 4, "its used ring is not aligned to 4 bytes"),
        ] {
            if !at.is_multiple_of(align) {
                return rules(what);
            }
        }
        let entries = u32::from(size);
        let find = |part, at, bytes| map.contiguous(at, bytes).ok_or(RingError::Memory { index, part });
        let descriptors = find("descriptor table", setup.descriptors.0, 16 * entries)?;
        let available = find("available ring", setup.available.0, 6 + 2 * entries)?;
        let used = find("used ring", setup.used.0, 6 + 8 * entries)?;
        // A region may begin anywhere in its file: what is aligned for the guest need not be here.
        if !descriptors.host.addr().is_multiple_of(8)
            || !available.host.addr().is_multiple_of(2)
            || !used.host.addr().is_multiple_of(4)
        {
            return rules("its memory region is not aligned");
        }
        // SAFETY: `map` is kept beside the table.
        let table = unsafe { Table::new(descriptors, size) };
        Ok(Self { map, size, table, available, used })
    }

    pub(super) fn map(&self) -> &Arc<HostMap> {
        &self.map
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn table(&self) -> Table {
        self.table
    }

    /// A field of 16 bits.
    #[inline]
    fn field(&self, ring: &Piece, offset: usize) -> &AtomicU16 {
        assert!(offset + 2 <= ring.bytes as usize, "a field of the ring");
        // SAFETY: inside the ring, which `new` has found mapped and aligned to 2 bytes; offsets are even. Only atomics
        // touch it on this side.
        unsafe { AtomicU16::from_ptr(ring.host.add(offset).cast()) }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// How many requests were made available. What was written before, the entries and their chains, is visible
    /// afterwards.
    #[inline]
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.field(&self.available, INDEX).load(Ordering::Acquire))
    }

    /// Tells the processor that the available index, and the entry `index`, will be wanted soon.
    #[inline]
    pub(super) fn prefetch_available(&self, index: u16) {
        prefetch(self.available.host, false);
        prefetch(self.available.host.wrapping_add(ENTRIES + 2 * self.slot(index)), false);
    }

    /// The head of the chain that was made available as number `index`.
    #[inline]
    pub(super) fn available_head(&self, index: u16) -> u16 {
        u16::from_le(self.field(&self.available, ENTRIES + 2 * self.slot(index)).load(Ordering::Relaxed))
    }

    /// The driver's flags.
    pub(super) fn available_flags(&self) -> u16 {
        u16::from_le(self.field(&self.available, 0).load(Ordering::Relaxed))
    }

    /// The used index after which the driver wants to be signalled.
    pub(super) fn used_event(&self) -> u16 {
        let at = ENTRIES + 2 * usize::from(self.size);
        u16::from_le(self.field(&self.available, at).load(Ordering::Relaxed))
    }

    /// How many requests were used so far.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.field(&self.used, INDEX).load(Ordering::Relaxed))
    }

    /// Writes used entry number `index`. Not yet the driver's.
    #[inline]
    pub(super) fn put_used(&self, index: u16, head: u16, bytes: u32) {
        let at = ENTRIES + 8 * self.slot(index);
        assert!(at + 8 <= self.used.bytes as usize, "an entry of the ring");
        // SAFETY: inside the used ring, which `new` has found mapped and aligned to 4 bytes. Only atomics touch it on
        // this side.
        let [id, len] = unsafe {
            let entry = self.used.host.add(at);
            [AtomicU32::from_ptr(entry.cast()), AtomicU32::from_ptr(entry.add(4).cast())]
        };
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        len.store(bytes.to_le(), Ordering::Relaxed);
    }

    /// Makes the entries `from..to` the driver's, and marks them in the dirty logs.
    #[inline]
    pub(super) fn publish_used(&self, from: u16, to: u16) {
        let (first, count) = (self.slot(from), usize::from(to.wrapping_sub(from)));
        // entries that wrap around are marked as the whole ring
        let wraps = first + count > usize::from(self.size);
        let (first, count) = if wraps { (0, usize::from(self.size)) } else { (first, count) };
        self.map.mark(self.used.guest + (ENTRIES + 8 * first) as u64, 8 * count);
        self.field(&self.used, INDEX).store(to.to_le(), Ordering::Release);
        self.map.mark(self.used.guest + INDEX as u64, 2);
    }

    /// Sets the device's flags.
    pub(super) fn set_used_flags(&self, flags: u16) {
        self.field(&self.used, 0).store(flags.to_le(), Ordering::Relaxed);
        self.map.mark(self.used.guest, 2);
    }

    /// Sets the available index after which the driver is to kick.
    pub(super) fn set_available_event(&self, index: u16) {
        let at = ENTRIES + 8 * usize::from(self.size);
        self.field(&self.used, at).store(index.to_le(), Ordering::Relaxed);
        self.map.mark(self.used.guest + at as u64, 2);
    }
}
