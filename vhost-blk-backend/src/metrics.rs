//! What the device counts, for `status`. Each worker has its own, so that none waits for another's cache line.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::request::Operation;

/// A number that only grows, by one thread. Any other may look.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds, on the one thread that does.
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        // no other thread adds, so this needs no locked instruction
        self.0.store(self.0.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one worker counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Metrics {
    pub(crate) reads: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) writes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) flushes: Counter,
    pub(crate) discards: Counter,
    pub(crate) write_zeroes: Counter,
    /// Requests that were taken from a ring, and those of them that were answered.
    pub(crate) taken: Counter,
    pub(crate) answered: Counter,
    /// Requests that were malformed or of an unknown kind.
    pub(crate) refused: Counter,
    pub(crate) read_errors: Counter,
    pub(crate) write_errors: Counter,
    pub(crate) flush_errors: Counter,
    /// Discards and writes of zeros that failed.
    pub(crate) clear_errors: Counter,
    /// How often a request had to wait for the link, the buffer or an overlapping write.
    pub(crate) waits: Counter,
    /// Transfers that were done in one system call, without the ring.
    pub(crate) inline: Counter,
    /// Transfers whose data had to be copied, because the guest's buffers are not aligned as the disk needs them.
    pub(crate) bounced: Counter,
    /// How often the worker slept.
    pub(crate) sleeps: Counter,
}

impl Metrics {
    #[inline]
    pub(crate) fn count(&self, operation: Operation, bytes: u64, sound: bool) {
        let failed = u64::from(!sound);
        match operation {
            Operation::Read(_) => {
                self.reads.add(1);
                self.read_bytes.add(bytes);
                self.read_errors.add(failed);
            }
            Operation::Write(_) => {
                self.writes.add(1);
                self.written_bytes.add(bytes);
                self.write_errors.add(failed);
            }
            Operation::Flush => {
                self.flushes.add(1);
                self.flush_errors.add(failed);
            }
            Operation::Discard => {
                self.discards.add(1);
                self.clear_errors.add(failed);
            }
            Operation::WriteZeroes => {
                self.write_zeroes.add(1);
                self.clear_errors.add(failed);
            }
            Operation::GetId => {}
        }
    }

    /// Everything that failed.
    pub(crate) fn errors(&self) -> u64 {
        [&self.read_errors, &self.write_errors, &self.flush_errors, &self.clear_errors]
            .iter()
            .map(|counter| counter.get())
            .sum()
    }
}

/// The sums over all workers.
pub(crate) fn to_json(workers: &[Metrics]) -> Value {
    let sum = |counter: fn(&Metrics) -> &Counter| -> u64 {
        workers.iter().map(|metrics| counter(metrics).get()).sum()
    };
    // answered first: a request that ends in between is still counted as in flight, never below zero
    let answered = sum(|metrics| &metrics.answered);
    json!({
        "reads": sum(|metrics| &metrics.reads),
        "read_bytes": sum(|metrics| &metrics.read_bytes),
        "writes": sum(|metrics| &metrics.writes),
        "written_bytes": sum(|metrics| &metrics.written_bytes),
        "flushes": sum(|metrics| &metrics.flushes),
        "discards": sum(|metrics| &metrics.discards),
        "write_zeroes": sum(|metrics| &metrics.write_zeroes),
        "in_flight": sum(|metrics| &metrics.taken).saturating_sub(answered),
        "refused": sum(|metrics| &metrics.refused),
        "read_errors": sum(|metrics| &metrics.read_errors),
        "write_errors": sum(|metrics| &metrics.write_errors),
        "flush_errors": sum(|metrics| &metrics.flush_errors),
        "clear_errors": sum(|metrics| &metrics.clear_errors),
        "waits": sum(|metrics| &metrics.waits),
        "inline": sum(|metrics| &metrics.inline),
        "bounced": sum(|metrics| &metrics.bounced),
        "sleeps": sum(|metrics| &metrics.sleeps),
    })
}
