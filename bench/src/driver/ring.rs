//! The driver's side of a split virtqueue (virtio 1.2 §2.7), made so that one core can drive more than ten million
//! requests a second: each slot has a chain of descriptors of its own, written once and used again and again.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with the device, so it is reached through raw pointers only"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::{Memory, PAGE};

/// Most requests that are taken at once, and after which the available index is published.
pub(crate) const BATCH: usize = 16;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITABLE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

#[repr(C)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Where the parts of a queue are in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) size: u16,
    pub(crate) descriptors: usize,
    pub(crate) available: usize,
    pub(crate) used: usize,
    /// The first byte behind it.
    pub(crate) end: usize,
}

impl Place {
    /// A queue of at least `entries` entries, from `start` on.
    pub(crate) fn new(start: usize, entries: u16) -> Self {
        let size = entries.next_power_of_two().max(64);
        let entries = usize::from(size);
        let after = |end: usize| end.next_multiple_of(PAGE);
        let descriptors = after(start);
        let available = after(descriptors + size_of::<Descriptor>() * entries);
        let used = after(available + 6 + 2 * entries);
        Self { size, descriptors, available, used, end: after(used + 6 + 8 * entries) }
    }
}

/// What the device has broken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
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

/// One queue, driven by one thread. The chain of a slot begins at `STEP` times its number.
#[derive(Debug)]
pub(crate) struct Ring<const STEP: u16> {
    /// What the pointers lead into.
    _memory: Arc<Memory>,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u16,
    slots: u16,
    size: u16,
    event_idx: bool,
    /// Requests offered, of which the device knows the first `published`.
    offered: u16,
    published: u16,
    /// Requests seen used.
    seen: u16,
    in_flight: Vec<bool>,
}

// SAFETY: the pointers lead into `memory`, which is kept as long as they are, and only the owner of the ring uses them
// on this side.
unsafe impl<const STEP: u16> Send for Ring<STEP> {}

impl<const STEP: u16> Ring<STEP> {
    pub(crate) fn new(memory: &Arc<Memory>, place: &Place, slots: u16, event_idx: bool) -> Self {
        let size = usize::from(place.size);
        assert!(usize::from(slots) * usize::from(STEP) <= size);
        let ring = Self {
            _memory: memory.clone(),
            descriptors: memory.at(place.descriptors, size_of::<Descriptor>() * size),
            available: memory.at(place.available, 6 + 2 * size),
            used: memory.at(place.used, 6 + 8 * size),
            slots,
            size: place.size,
            event_idx,
            offered: 0,
            published: 0,
            seen: 0,
            in_flight: vec![false; slots.into()],
        };
        ring.quiet();
        ring
    }

    pub(crate) fn slots(&self) -> u16 {
        self.slots
    }

    /// Requests that the device has and has not ended yet, as far as we have seen.
    pub(crate) fn pending(&self) -> u16 {
        self.published.wrapping_sub(self.seen)
    }

    pub(crate) fn is_in_flight(&self, slot: u16) -> bool {
        self.in_flight[usize::from(slot)]
    }

    /// Writes descriptor `at` of a slot that is not in flight.
    pub(crate) fn set_descriptor(&mut self, slot: u16, at: u16, descriptor: Descriptor) {
        assert!(slot < self.slots && at < STEP && !self.is_in_flight(slot));
        // SAFETY: below slots * STEP <= size; the device reads only what is available.
        unsafe { self.descriptors.add(usize::from(slot * STEP + at)).write_volatile(descriptor) };
    }

    /// Makes a request of a slot that is not in flight. The device knows of it after [`Self::publish`].
    #[inline]
    pub(crate) fn offer(&mut self, slot: u16) {
        let index = usize::from(slot);
        assert!(!std::mem::replace(&mut self.in_flight[index], true), "slot {slot} is in flight");
        // SAFETY: inside the available ring; the device does not look at it before the index is published.
        unsafe {
            let entry = self.available.add(2 + usize::from(self.offered & (self.size - 1)));
            entry.write_volatile((slot * STEP).to_le());
        }
        self.offered = self.offered.wrapping_add(1);
    }

    /// Lets the device see what was offered. Returns whether it wants to be kicked (§2.7.13.4).
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
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

    /// The slots of requests that the device has ended, with the bytes that it says it has written, as many as fit. `early`
    /// hears of each at once, to fetch what will be needed.
    #[inline]
    pub(crate) fn take(
        &mut self,
        ended: &mut [(u16, u32); BATCH],
        early: impl Fn(u16),
    ) -> Result<usize, RingError> {
        let used = u16::from_le(self.atomic(self.used, 1).load(Ordering::Acquire)).wrapping_sub(self.seen);
        if used == 0 {
            return Ok(0);
        }
        let available = self.pending();
        if used > available {
            return Err(RingError::TooMany { used, available });
        }
        let count = usize::from(used).min(BATCH);
        for (slot, bytes) in &mut ended[..count] {
            let at = 2 + 4 * usize::from(self.seen & (self.size - 1));
            // SAFETY: an entry of the used ring, which the device wrote before the index that we have read.
            let [head, written] =
                unsafe { self.used.add(at).cast::<[u32; 2]>().read_volatile() }.map(u32::from_le);
            (*slot, *bytes) = ((head / u32::from(STEP)) as u16, written);
            let ours = head.is_multiple_of(u32::from(STEP))
                && head < u32::from(self.slots * STEP)
                && std::mem::replace(&mut self.in_flight[usize::from(*slot)], false);
            if !ours {
                return Err(RingError::Head { head });
            }
            early(*slot);
            self.seen = self.seen.wrapping_add(1);
        }
        Ok(count)
    }

    /// Asks for a signal at the next completion. Returns true when there is one already (§2.7.10).
    pub(crate) fn arm(&self) -> bool {
        if self.event_idx {
            self.used_event().store(self.seen.to_le(), Ordering::SeqCst);
        } else {
            self.atomic(self.available, 0).store(0, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        self.atomic(self.used, 1).load(Ordering::Acquire) != self.seen.to_le()
    }

    /// Asks for no signals. With EVENT_IDX that holds for the next 32768 completions.
    pub(crate) fn quiet(&self) {
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
}
