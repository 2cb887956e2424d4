//! What the device counts, for `status`. Relaxed: figures for people, no synchronisation.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the workers count.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) reads: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) writes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) flushes: Counter,
    /// Requests that were taken from a ring, and those of them that were answered.
    pub(crate) taken: Counter,
    pub(crate) answered: Counter,
    /// Requests that were malformed or of an unknown kind.
    pub(crate) refused: Counter,
    pub(crate) read_errors: Counter,
    pub(crate) write_errors: Counter,
    pub(crate) flush_errors: Counter,
    /// How often a request had to wait for the link, the buffer or an overlapping write.
    pub(crate) waits: Counter,
}

impl Metrics {
    pub(crate) fn to_json(&self) -> Value {
        let answered = self.answered.get();
        json!({
            "reads": self.reads.get(),
            "read_bytes": self.read_bytes.get(),
            "writes": self.writes.get(),
            "written_bytes": self.written_bytes.get(),
            "flushes": self.flushes.get(),
            "in_flight": self.taken.get().saturating_sub(answered),
            "refused": self.refused.get(),
            "read_errors": self.read_errors.get(),
            "write_errors": self.write_errors.get(),
            "flush_errors": self.flush_errors.get(),
            "waits": self.waits.get(),
        })
    }
}
