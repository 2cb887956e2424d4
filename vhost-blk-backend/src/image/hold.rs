//! Whose the image is.
//!
//! Two writers destroy a disk, so whoever serves one holds a lock on it: exclusive to write, shared to read only. It is an
//! open-file-description lock (F_OFD_SETLK) on the very descriptor that does the guest's I/O, and both matters:
//!
//! - It belongs to the open file and not to the process. What the kernel still has in flight for a back end that was
//!   killed keeps that file open, so the lock outlasts the process until the last write has ended, and only then can a
//!   successor have it. A lock file, or a lock on a second descriptor, would be free at the process's end, and an old
//!   write could still overtake a new one. (Shared locks do not keep a successor waiting: what a killed reader had begun
//!   to read may reach the guest's memory late.)
//! - It covers the whole file, so it meets the locks that QEMU takes on single bytes of an image that it has opened
//!   itself, in both directions.
//!
//! A descriptor's own locks never conflict with each other, and a second lock on it replaces the first: hence the count
//! of users here, who are the device's queues.
//!
//! A live migration on one image, or any other handover, needs the second back end to start while the first still
//! serves. So a plain back end has the lock only while a queue runs ([`Hold::WhileServing`]), and one that is started
//! for a migration does not mind who has it until then ([`Hold::Incoming`]): the VMM stops the queues of the source
//! before it starts those of the destination. When the last has stopped, what was written is made durable
//! and then the lock is given back, so that a successor on another host that shares the storage finds it there. A
//! protected disk is touched without queues as well (a secondary writes its buffer back) and is never handed over:
//! it is held from beginning to end ([`Hold::WhileOpen`]).
//!
//! A block device is also claimed (O_EXCL) against the host itself: a mount, a volume group. A claim cannot be given
//! back without closing, so it is on a descriptor of its own, taken after the lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ImageError;
use crate::lock;

/// How often to look whether a lock has become free: there is no waiting for one with a limit.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// When an image is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// From its opening to its end.
    WhileOpen,
    /// While somebody has acquired it ([`super::Image::acquire`]). At its opening it must be free.
    WhileServing,
    /// The same, but at its opening another may still have it: the source of a migration.
    Incoming,
}

/// What is locked.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) file: &'a File,
    pub(super) path: &'a Path,
    pub(super) exclusive: bool,
    pub(super) is_device: bool,
}

#[derive(Debug, Default)]
pub(super) struct Holder {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    users: usize,
    claim: Option<File>,
}

impl Holder {
    /// One more user. The first takes the lock, for which it waits at most `patience`; the others wait for the first.
    pub(super) fn acquire(&self, target: Target<'_>, patience: Duration) -> Result<(), ImageError> {
        let mut held = self.held();
        if held.users == 0 {
            held.claim = target.take(patience)?;
        }
        held.users += 1;
        Ok(())
    }

    /// One user less. After the last, `settle` is run and the lock is given back.
    pub(super) fn release(&self, target: Target<'_>, settle: impl FnOnce()) {
        let mut held = self.held();
        assert!(held.users > 0, "the image is released more often than it was acquired");
        held.users -= 1;
        if held.users == 0 {
            settle();
            held.claim = None;
            if let Err(error) = lock::unlock(target.file.as_fd()) {
                tracing::error!("Disk {}: its lock cannot be given back: {error}", target.path.display());
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Target<'_> {
    /// Whether it could be taken now; an error if it is the host itself that has it, which does not pass.
    pub(super) fn is_free(self) -> Result<bool, ImageError> {
        if !lock::is_free(self.file.as_fd(), self.exclusive).map_err(|error| self.open_error(error))? {
            return Ok(false);
        }
        match self.claim() {
            Ok(_) => Ok(true),
            Err(error) => Err(self.claim_error(error)),
        }
    }

    fn take(self, patience: Duration) -> Result<Option<File>, ImageError> {
        let deadline = Instant::now() + patience;
        let mut told = false;
        while !lock::try_lock(self.file.as_fd(), self.exclusive).map_err(|error| self.open_error(error))? {
            if Instant::now() > deadline {
                return Err(ImageError::Locked { path: self.path.to_owned() });
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(
                    "Disk {} is in use by another program, or by what one has left: waiting up to {patience:?}",
                    self.path.display()
                );
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        // The predecessor's claim ends with its process, which may be a moment after its lock.
        loop {
            match self.claim() {
                Ok(claim) => return Ok(claim),
                Err(error) if is_busy(&error) && Instant::now() <= deadline => {
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(error) => {
                    let _ = lock::unlock(self.file.as_fd());
                    return Err(self.claim_error(error));
                }
            }
        }
    }

    /// Readers and files need none.
    fn claim(self) -> io::Result<Option<File>> {
        if !self.is_device || !self.exclusive {
            return Ok(None);
        }
        // by the descriptor: the path may lead elsewhere by now
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        // without O_CREAT it means: not while the host itself uses the device (open(2))
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path).map(Some)
    }

    fn claim_error(self, error: io::Error) -> ImageError {
        let path = self.path.to_owned();
        if is_busy(&error) { ImageError::Busy { path } } else { ImageError::Open { path, error } }
    }

    fn open_error(self, error: io::Error) -> ImageError {
        ImageError::Open { path: self.path.to_owned(), error }
    }
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}
