//! Figures of the comparison.

use std::collections::BTreeMap;

use serde::Serialize;

use super::mismatches::{Mismatch, ServiceCount};
use crate::proxy::Cause;

/// What the comparison has done, and what it holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CompareStats {
    /// Packets that the PVM sent.
    pub pvm_packets: u64,
    /// Packets that the SVM sent.
    pub svm_packets: u64,
    /// Packets of the SVM that were not kept for want of room.
    pub svm_packets_dropped: u64,
    /// Segments of the SVM of which a digest came.
    pub digests: u64,
    /// Times when the SVM was asked for bytes instead.
    pub asked: u64,
    /// Packets of the PVM that left without waiting.
    pub released_at_once: u64,
    /// Packets of the PVM that left when the SVM had said the same.
    pub released_by_match: u64,
    /// Packets of the PVM that left because a checkpoint was committed.
    pub released_by_commit: u64,
    /// Packets of the PVM that left at once and uncompared, as the policy has it.
    pub bypassed: u64,
    /// Packets of the SVM that the policy has no use for.
    pub svm_packets_unused: u64,
    /// Acknowledgments made here, to open a window that had been narrowed.
    pub windows_reopened: u64,
    /// Acknowledgments that were sent of less than the PVM's, because the SVM did not get on without.
    pub acks_lowered: u64,
    /// How long those released by a match had waited, together, in microseconds.
    pub waited_us: u64,
    /// The longest wait among them, in microseconds.
    pub waited_us_max: u64,
    /// Packets of the PVM that wait now.
    pub held_packets: usize,
    /// Bytes of them.
    pub held_bytes: usize,
    /// Most bytes that ever waited.
    pub held_bytes_peak: usize,
    /// Memory that the SVM's output takes which the PVM has not said yet.
    pub svm_bytes: usize,
    /// Entries in the table of flows.
    pub flows: usize,
    /// Times when the two said different things.
    pub mismatches: u64,
    /// Times when a packet waited too long.
    pub held_too_long: u64,
    /// The last mismatches and packets that waited too long, newest first.
    pub recent_mismatches: Vec<Mismatch>,
    /// How often those happened to the flows of one service; those with most first.
    pub mismatches_by_service: Vec<ServiceCount>,
    /// How often a checkpoint was asked for.
    pub checkpoints_wanted: BTreeMap<Cause, u64>,
}

impl CompareStats {
    pub(super) fn released_after_wait(&mut self, us: u64) {
        self.released_by_match += 1;
        self.waited_us += us;
        self.waited_us_max = self.waited_us_max.max(us);
    }
}
