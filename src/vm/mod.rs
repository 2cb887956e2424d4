//! A virtual machine as the checkpoint engine sees it.

pub mod qemu;
mod shared_ram;

use std::io;
use std::sync::Arc;

use crate::memory::{PAGE_BYTES, PageSet};
pub use shared_ram::SharedRam;

/// One block of guest memory. Pages are numbered through all blocks of a VM, in the order of
/// [`Vm::ram_blocks`]; the shared guest RAM comes first, so its pages are `0..bytes / 4096`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// The VMM's name for it, the same on both hosts.
    pub name: String,
    /// Length, a multiple of the page.
    pub bytes: u64,
    /// Number of its first page.
    pub first_page: u64,
}

/// What a VM could not do. Whatever it was, this side's VM cannot be trusted any more.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The VMM has ended.
    #[error("The VMM has ended: {0}")]
    Exited(String),
    /// The VMM refused a command.
    #[error("The VMM refuses {command}: {error}")]
    Refused {
        /// The command.
        command: String,
        /// The VMM's words.
        error: String,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// What the system says.
        error: io::Error,
    },
    /// The VM or this host cannot be checkpointed. The text says why, and what to do.
    #[error("{0}")]
    Unsupported(String),
}

impl VmError {
    /// For `map_err`: a system call failed while `what` was being done.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
        move |error| VmError::Io { what: what.into(), error }
    }
}

/// A VM that can be checkpointed. Everything but `pause` and `resume` is called while it is paused.
pub trait Vm: Send {
    /// Its memory, shared guest RAM first.
    fn ram_blocks(&self) -> &[RamBlock];

    /// Pages of all its blocks together.
    fn pages(&self) -> u64 {
        self.ram_blocks().last().map_or(0, |last| last.first_page + last.bytes / PAGE_BYTES as u64)
    }

    /// The guest RAM that device servers share, for those who read pages where they lie instead of copying them with
    /// [`Vm::read_pages`]. Page `n` of the VM is its page `n`.
    fn shared_ram(&self) -> Option<Arc<SharedRam>> {
        None
    }

    /// Stops the vCPUs and the devices; when it returns, every device back end has drained.
    ///
    /// # Errors
    /// The VMM is gone or refuses.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets it run on.
    ///
    /// # Errors
    /// The VMM is gone or refuses.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Adds every page that may hold something else than zeros, and starts tracking. For the first synchronisation.
    ///
    /// # Errors
    /// The memory cannot be inspected.
    fn start_tracking(&mut self, populated: &mut PageSet) -> Result<(), VmError>;

    /// Adds the pages that the VMM wrote since the last call, and forgets them.
    ///
    /// # Errors
    /// The tracker fails.
    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), VmError>;

    /// Replaces `state` by the state of all devices and vCPUs.
    ///
    /// # Errors
    /// The VMM refuses.
    fn save_devices(&mut self, state: &mut Vec<u8>) -> Result<(), VmError>;

    /// Loads what `save_devices` of the peer made. Guest memory must already be the peer's; pages that the load itself
    /// writes show up in the next `take_dirty`.
    ///
    /// # Errors
    /// The VMM refuses; its devices are then half new, and the VM is lost.
    fn load_devices(&mut self, state: &[u8]) -> Result<(), VmError>;

    /// Reads whole pages, in the order given, into `into` (`pages.len()` × 4096 bytes).
    ///
    /// # Errors
    /// The memory cannot be read.
    fn read_pages(&self, pages: &[u64], into: &mut [u8]) -> Result<(), VmError>;

    /// Writes whole pages, in the order given, from `from` (`pages.len()` × 4096 bytes).
    ///
    /// # Errors
    /// The memory cannot be written.
    fn write_pages(&mut self, pages: &[u64], from: &[u8]) -> Result<(), VmError>;
}
