//! Whether a write has to be durable when it is answered (virtio 1.2 §5.2.6.2).
//!
//! The driver decides, in the field `writeback` of the configuration space, and then relies on it: one that has switched
//! the write cache off never flushes again. So the choice outlasts a reset of the device, as the frontend's copy of the
//! field does. A process that is started anew under a running guest cannot know it: QEMU keeps the field to itself when
//! it connects again, and a guest that comes by migration has chosen elsewhere. Until the driver flushes, which only one
//! with a write cache does, its writes are durable then.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The driver wants every write durable, or cannot flush.
const THROUGH: u8 = 1;
/// It may have wanted that of somebody else.
const UNSURE: u8 = 2;

#[derive(Debug)]
pub(crate) struct WriteCache {
    /// [`THROUGH`] and [`UNSURE`], for the workers.
    state: AtomicU8,
    choice: Mutex<Choice>,
}

#[derive(Debug)]
struct Choice {
    /// As the disk was started, or as the driver has chosen last.
    writeback: bool,
    /// The driver has heard that from us, or we from it.
    agreed: bool,
    /// The driver can flush.
    flushes: bool,
}

impl WriteCache {
    pub(crate) fn new(writeback: bool) -> Self {
        let choice = Choice { writeback, agreed: false, flushes: true };
        Self { state: AtomicU8::new(if writeback { 0 } else { THROUGH }), choice: Mutex::new(choice) }
    }

    /// Whether a write that is begun now has to be durable when it is answered.
    #[inline]
    pub(crate) fn is_through(&self) -> bool {
        self.state.load(Ordering::Relaxed) != 0
    }

    /// What the driver reads as `writeback`.
    pub(crate) fn writeback(&self) -> bool {
        self.state.load(Ordering::Relaxed) & THROUGH == 0
    }

    /// The driver has negotiated to flush, and to choose. Without the latter, one that flushes knows that it has to.
    pub(crate) fn negotiated(&self, flushes: bool, chooses: bool) {
        let mut choice = self.choice();
        choice.flushes = flushes;
        let unsure = if chooses && !choice.agreed { UNSURE } else { 0 };
        self.state.store(choice.through() | unsure, Ordering::Relaxed);
    }

    /// A driver that is about to begin has read the configuration space.
    pub(crate) fn told(&self) {
        let mut choice = self.choice();
        choice.agreed = true;
        self.state.fetch_and(!UNSURE, Ordering::Relaxed);
    }

    /// The driver has chosen. Returns whether that has switched the cache off: what was answered before has to be made
    /// durable then.
    pub(crate) fn choose(&self, writeback: bool) -> bool {
        let mut choice = self.choice();
        (choice.writeback, choice.agreed) = (writeback, true);
        self.state.swap(choice.through(), Ordering::Relaxed) & THROUGH == 0 && choice.through() != 0
    }

    /// The driver flushes.
    #[inline]
    pub(crate) fn flushed(&self) {
        if self.state.load(Ordering::Relaxed) & UNSURE != 0 {
            self.state.fetch_and(!UNSURE, Ordering::Relaxed);
        }
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Choice {
    fn through(&self) -> u8 {
        if self.flushes && self.writeback { 0 } else { THROUGH }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(cache: &WriteCache) -> (bool, bool) {
        (cache.writeback(), cache.is_through())
    }

    #[test]
    fn what_the_driver_chose_outlasts_its_reset() {
        let cache = WriteCache::new(true);
        cache.told();
        cache.negotiated(true, true);
        assert_eq!(seen(&cache), (true, false));
        assert!(cache.choose(false));
        assert!(!cache.choose(false));
        // firmware that knows of no cache, and the same driver again
        cache.negotiated(false, false);
        assert_eq!(seen(&cache), (false, true));
        cache.negotiated(true, true);
        assert_eq!(seen(&cache), (false, true));
        assert!(!cache.choose(true));
        assert_eq!(seen(&cache), (true, false));
        // a driver that cannot flush has none, whatever it was
        cache.negotiated(false, true);
        assert_eq!(seen(&cache), (false, true));
        cache.negotiated(true, true);
        assert_eq!(seen(&cache), (true, false));
    }

    #[test]
    fn a_guest_that_was_running_before_gets_durable_writes_until_it_flushes() {
        let cache = WriteCache::new(true);
        cache.negotiated(true, true);
        assert_eq!(seen(&cache), (true, true));
        cache.flushed();
        assert_eq!(seen(&cache), (true, false));
        // one that cannot choose has chosen by flushing
        cache.negotiated(true, false);
        assert_eq!(seen(&cache), (true, false));
        // and a disk without a cache has none
        let cache = WriteCache::new(false);
        cache.negotiated(true, true);
        cache.flushed();
        assert_eq!(seen(&cache), (false, true));
    }
}
