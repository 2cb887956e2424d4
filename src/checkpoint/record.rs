//! What each checkpoint cost: the figures behind `colo status` and the benchmarks.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Checkpoints that are remembered one by one.
const HISTORY_MAX: usize = 512;

/// Microseconds that each step of the primary's half took, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrimarySteps {
    /// Stopping the VM and draining its back ends.
    pub stop_us: u64,
    /// Marking the end of the epoch on the links of the devices.
    pub marker_us: u64,
    /// Saving the devices.
    pub save_us: u64,
    /// Taking the dirty set.
    pub dirty_us: u64,
    /// Sending pages and devices.
    pub send_us: u64,
    /// Waiting until the secondary has committed.
    pub commit_us: u64,
    /// Waiting for the comparison of `--verify`.
    pub verify_us: u64,
    /// Releasing the held output.
    pub release_us: u64,
    /// Letting the VM run again.
    pub resume_us: u64,
}

/// Microseconds that each step of the secondary's half took, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecondarySteps {
    /// From the primary's word to the VM running again.
    pub pause_us: u64,
    /// Stopping the VM and draining its back ends.
    pub stop_us: u64,
    /// Waiting for the rest of the checkpoint.
    pub receive_us: u64,
    /// Taking the dirty set.
    pub dirty_us: u64,
    /// Copying pages from the cache.
    pub copy_us: u64,
    /// Loading the devices, and repairing the pages that this wrote.
    pub load_us: u64,
    /// Digests of `--verify`.
    pub verify_us: u64,
    /// Emptying the block buffer, resetting the rewriter.
    pub commit_us: u64,
    /// Letting the VM run again.
    pub resume_us: u64,
    /// Pages copied: dirtied by the primary or by the secondary.
    pub pages: u64,
    /// Pages written by loading the devices.
    pub load_pages: u64,
}

/// One checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// Its number.
    pub epoch: u64,
    /// What asked for it.
    pub cause: String,
    /// For how long the primary's VM stood still, in microseconds.
    pub pause_us: u64,
    /// Pages sent.
    pub pages: u64,
    /// Bytes of device state sent.
    pub device_bytes: u64,
    /// The primary's steps.
    pub primary: PrimarySteps,
    /// The secondary's, once it has told.
    pub secondary: Option<SecondarySteps>,
}

/// Counts and the latest checkpoints.
#[derive(Clone, Debug, Default, Serialize)]
pub struct History {
    /// Checkpoints since the start, by cause.
    pub by_cause: BTreeMap<String, u64>,
    /// The latest ones, oldest first.
    pub latest: VecDeque<Record>,
}

impl History {
    /// Adds one.
    pub fn add(&mut self, record: Record) {
        *self.by_cause.entry(record.cause.clone()).or_default() += 1;
        if self.latest.len() == HISTORY_MAX {
            self.latest.pop_front();
        }
        self.latest.push_back(record);
    }

    /// Adds what the secondary told of a checkpoint afterwards.
    pub fn complete(&mut self, epoch: u64, steps: SecondarySteps) {
        if let Some(record) = self.latest.iter_mut().rev().find(|record| record.epoch == epoch) {
            record.secondary = Some(steps);
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.by_cause.values().sum()
    }
}

/// Measures steps that follow one another without a gap.
pub(super) struct Stopwatch {
    began: Instant,
    step: Instant,
}

impl Stopwatch {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { began: now, step: now }
    }

    /// Microseconds since the last call, or since the start.
    pub(super) fn step_us(&mut self) -> u64 {
        let now = Instant::now();
        let us = (now - self.step).as_micros() as u64;
        self.step = now;
        us
    }

    /// Microseconds since the start.
    pub(super) fn total_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }
}
