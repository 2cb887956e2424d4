//! What `colo status` tells of this side.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::checkpoint::History;

/// A side at one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    /// Name of the VM.
    pub vm: String,
    /// Name of this node.
    pub node: String,
    /// Name of the other one.
    pub peer: String,
    /// `starting`, `waiting` (for the peer), `primary`, `secondary`, `alone`, `stopped`.
    pub role: String,
    /// One sentence for a person.
    pub state: String,
    /// Highest generation that this side knows.
    pub generation: u64,
    /// The epoch that runs.
    pub epoch: u64,
    /// Guest memory of all kinds, in pages.
    pub pages: u64,
    /// Checkpoints: the primary's view; the secondary knows its own steps only.
    pub checkpoints: History,
    /// How this side came to be alone.
    pub failover: Option<Failover>,
}

/// One failover, in microseconds since the loss was noticed.
#[derive(Clone, Debug, Serialize)]
pub struct Failover {
    /// Why the peer was taken for lost.
    pub reason: String,
    /// Until the arbiter had answered.
    pub claimed_us: u64,
    /// Until the block buffer was written back, the output released and the VM ran.
    pub serving_us: u64,
}

/// The status, shared between the loop that changes it and the socket that shows it.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Mutex<Status>>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, role: &str, state: impl Into<String>) {
        let state = state.into();
        tracing::info!("{role}: {state}");
        let mut status = self.lock();
        role.clone_into(&mut status.role);
        status.state = state;
    }
}
