//! The state of all devices and vCPUs, out of one QEMU and into another, through files that have no name.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::qcow2;
use super::qmp::{Qmp, QmpError};

/// The block node of the image that QEMU loads from.
pub(super) const NODE: &str = "vmstate";
const SNAPSHOT: &str = "colo";

/// How a migration stream begins.
const MAGIC: &[u8] = b"QEVM";

/// Why the state of the devices was not moved.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceStateError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
    #[error("{0}")]
    Unusable(String),
}

/// The two files that QEMU inherits.
pub(super) struct DeviceState {
    saved: File,
    image: File,
}

impl DeviceState {
    pub(super) fn create() -> io::Result<Self> {
        let memfd = |name| memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
        let (saved, image) = (memfd("device-state")?, memfd("vmstate-image")?);
        let write_at = |bytes: &[u8], offset| image.write_all_at(bytes, offset);
        qcow2::write(SNAPSHOT, write_at, |bytes| image.set_len(bytes))?;
        Ok(Self { saved, image })
    }

    /// For [`DeviceState::save`].
    pub(super) fn saved_fd(&self) -> BorrowedFd<'_> {
        self.saved.as_fd()
    }

    /// For the block node [`NODE`].
    pub(super) fn image_fd(&self) -> BorrowedFd<'_> {
        self.image.as_fd()
    }

    /// Replaces `state` by what the paused VM's devices hold.
    pub(super) fn save(&self, qmp: &mut Qmp, state: &mut Vec<u8>) -> Result<(), DeviceStateError> {
        let path = format!("/proc/self/fd/{}", self.saved.as_raw_fd());
        // QEMU truncates the file. Not live: the block devices stay QEMU's.
        qmp.execute("xen-save-devices-state", json!({"filename": path, "live": false}))?;
        let failed =
            |error| DeviceStateError::Io { what: "Cannot read the device state that QEMU saved", error };
        let bytes = self.saved.metadata().map_err(failed)?.size();
        check(bytes, "QEMU saved")?;
        state.clear();
        state.resize(bytes as usize, 0);
        self.saved.read_exact_at(state, 0).map_err(failed)?;
        check_magic(state, "QEMU saved")
    }

    /// Loads what `save` of another QEMU made into the paused VM's devices.
    pub(super) fn load(&self, qmp: &mut Qmp, state: &[u8]) -> Result<(), DeviceStateError> {
        check(state.len() as u64, "the peer sent")?;
        check_magic(state, "the peer sent")?;
        self.image.write_all_at(state, qcow2::VMSTATE_OFFSET).map_err(|error| DeviceStateError::Io {
            what: "Cannot write the device state for QEMU",
            error,
        })?;
        let arguments = json!({"tag": SNAPSHOT, "vmstate": NODE, "devices": [NODE]});
        Ok(qmp.run_job("snapshot-load", arguments)?)
    }
}

fn check(bytes: u64, who: &str) -> Result<(), DeviceStateError> {
    if bytes > qcow2::VMSTATE_BYTES {
        return Err(DeviceStateError::Unusable(format!(
            "The device state that {who} has {bytes} bytes, more than the {} that there is room for: use fewer devices",
            qcow2::VMSTATE_BYTES
        )));
    }
    Ok(())
}

fn check_magic(state: &[u8], who: &str) -> Result<(), DeviceStateError> {
    if !state.starts_with(MAGIC) {
        return Err(DeviceStateError::Unusable(format!(
            "The device state that {who} is none: it does not begin with QEVM"
        )));
    }
    Ok(())
}
