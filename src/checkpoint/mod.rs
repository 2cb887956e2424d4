//! The checkpoint engine: makes the secondary's VM equal to the primary's, whole or not at all.
//!
//! [`Primary`] and [`Secondary`] are the two halves of one checkpoint, each running on the thread that drives its VM.
//! What the peer says arrives through a thread of its own ([`read_replies`], [`read_checkpoints`]) as events, so that
//! waiting for the peer and noticing its death is the same thing.

mod cache;
mod crash;
mod primary;
mod record;
mod secondary;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

pub use crash::crash_point;
pub use primary::{Hearing, Primary, Reply, read_replies};
pub use record::{History, PrimarySteps, Record, SecondarySteps};
pub use secondary::{Incoming, Received, Secondary, SharedCache, read_checkpoints};
pub use stream::UringStream;

use crate::memory::PageSet;
use crate::vm::VmError;

/// The device back ends of one side, as the checkpoint engine sees them.
pub trait Devices {
    /// Primary: everything of `epoch` is queued, mark its end on the links.
    ///
    /// # Errors
    /// A back end refuses or is gone.
    fn marker(&mut self, epoch: u64) -> Result<(), DeviceError>;

    /// `epoch` is committed: release, or forget, what belongs to it.
    ///
    /// # Errors
    /// A back end refuses or is gone.
    fn commit(&mut self, epoch: u64) -> Result<(), DeviceError>;

    /// Adds the pages of guest RAM that the back ends wrote since the last call, and forgets them.
    fn take_dirty(&mut self, dirty: &mut PageSet);
}

/// A back end did not do what it has to. Its side has failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// Why a checkpoint did not come about.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The peer is lost, or said something that it must not. The arbiter decides who goes on.
    #[error("The peer is lost: {0}")]
    Peer(String),
    /// This side's VM failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A back end of this side failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// `--verify` found pages that differ although they should not.
    #[error("After checkpoint {epoch} {count} pages differ on the secondary, the first are {pages}")]
    Verify {
        /// The checkpoint.
        epoch: u64,
        /// How many.
        count: u64,
        /// Block and offset of the first ones.
        pages: String,
    },
}

impl From<std::io::Error> for CheckpointError {
    fn from(error: std::io::Error) -> Self {
        Self::Peer(error.to_string())
    }
}
