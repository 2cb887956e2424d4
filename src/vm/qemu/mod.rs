//! Stock QEMU as a VM, 7.2 or later, not a line of it changed.
//!
//! - [`config`](QemuConfig): what it is started with
//! - `launch`: makes the files that it inherits, starts it, shakes hands
//! - `process`: the process and its end
//! - [`qmp`](Qmp): its monitor
//! - `ram`: where it keeps guest memory
//! - `tracker`, `inject`: which pages it wrote
//! - `device_state`, `qcow2`: its devices, out and in
//! - [`check`]: what must hold before a VM can be protected

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the tracker injects x86-64 system calls");

pub mod check;
mod config;
mod device_state;
#[cfg(test)]
mod e2e;
mod inject;
mod launch;
mod process;
mod qcow2;
mod qmp;
mod ram;
mod tracker;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::memory::PageSet;
use crate::vm::{RamBlock, SharedRam, Vm, VmError};
pub use config::{Accelerator, Disk, Nic, QemuConfig};
use device_state::{DeviceState, DeviceStateError};
pub use launch::LaunchError;
use process::Process;
pub use qmp::{Qmp, QmpError, QmpEvent};
use ram::GuestRam;
use tracker::Tracker;

/// How long the end of a QEMU that closed its monitor may take.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A running QEMU. It is killed when this is dropped.
pub struct QemuVm {
    process: Process,
    qmp: Qmp,
    ram: GuestRam,
    devices: DeviceState,
    tracker: Option<Tracker>,
    identity: String,
}

impl QemuVm {
    /// Readable once QEMU has ended, for whoever waits for several things.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.pidfd()
    }

    /// Process id, for messages.
    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// How it ended, with its last words; nothing while it runs.
    pub fn ended(&self) -> Option<String> {
        self.process.ended(Duration::ZERO)
    }

    /// What the guest sees of the hardware, in lines of `name: value`. It must be the same on both hosts, else the state of one
    /// cannot be loaded into the other.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The monitor, for what this type does not offer. Stopping, saving and loading are its own.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Ends the write protection: a VM that goes on alone is not slowed down by it.
    pub fn stop_tracking(&mut self) {
        self.tracker = None;
    }

    fn command(&mut self, command: &str) -> Result<(), VmError> {
        let outcome = self.qmp.execute(command, Value::Null);
        outcome.map(drop).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: QmpError) -> VmError {
        match error {
            QmpError::Refused { command, error } => VmError::Refused { command, error },
            QmpError::Closed => {
                let how = self.process.ended(END_LIMIT);
                VmError::Exited(how.unwrap_or_else(|| "it has closed its monitor, but runs on".into()))
            }
            QmpError::Io(error) => VmError::Io { what: "QEMU's monitor".into(), error },
            error @ (QmpError::Timeout { .. } | QmpError::Protocol(_)) => {
                VmError::Io { what: "QEMU's monitor".into(), error: std::io::Error::other(error.to_string()) }
            }
        }
    }

    fn devices_failed(&self, error: DeviceStateError) -> VmError {
        match error {
            DeviceStateError::Qmp(error) => self.failed(error),
            DeviceStateError::Io { what, error } => VmError::Io { what: what.into(), error },
            DeviceStateError::Unusable(why) => VmError::Unsupported(why),
        }
    }
}

impl Vm for QemuVm {
    fn ram_blocks(&self) -> &[RamBlock] {
        self.ram.blocks()
    }

    fn shared_ram(&self) -> Option<Arc<SharedRam>> {
        Some(self.ram.shared().clone())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.command("stop")
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.command("cont")?;
        self.qmp.dismiss_jobs().map_err(|error| self.failed(error))
    }

    fn start_tracking(&mut self, populated: &mut PageSet) -> Result<(), VmError> {
        match &self.tracker {
            Some(tracker) => {
                tracker.forget_all().map_err(VmError::io("Cannot write-protect guest memory"))?;
            }
            None => {
                let tracker = Tracker::attach(self.process.pid(), self.process.pidfd(), self.ram.areas());
                self.tracker = Some(tracker.map_err(check::attach_failed)?);
            }
        }
        self.ram.populated(populated).map_err(VmError::io("Cannot find the pages that the guest uses"))
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), VmError> {
        match &mut self.tracker {
            Some(tracker) => {
                tracker.take(dirty).map_err(VmError::io("Cannot find the pages that QEMU wrote"))
            }
            None => {
                Err(VmError::Unsupported("Dirty pages were asked for before tracking was started".into()))
            }
        }
    }

    fn save_devices(&mut self, state: &mut Vec<u8>) -> Result<(), VmError> {
        let outcome = self.devices.save(&mut self.qmp, state);
        outcome.map_err(|error| self.devices_failed(error))
    }

    fn load_devices(&mut self, state: &[u8]) -> Result<(), VmError> {
        let outcome = self.devices.load(&mut self.qmp, state);
        outcome.map_err(|error| self.devices_failed(error))
    }

    fn read_pages(&self, pages: &[u64], into: &mut [u8]) -> Result<(), VmError> {
        self.ram.read(pages, into).map_err(VmError::io("Cannot read guest memory"))
    }

    fn write_pages(&mut self, pages: &[u64], from: &[u8]) -> Result<(), VmError> {
        self.ram.write(pages, from).map_err(VmError::io("Cannot write guest memory"))?;
        let Some(tracker) = &self.tracker else { return Ok(()) };
        // Private pages are written through QEMU's own mapping. They would count as written by QEMU for ever: each checkpoint
        // would write them again because the one before did.
        for run in self.ram.runs(pages).filter(|run| self.ram.is_private(run[0])) {
            let protected = tracker.forget(run[0], run[0] + run.len() as u64);
            protected.map_err(VmError::io("Cannot write-protect guest memory"))?;
        }
        Ok(())
    }
}
