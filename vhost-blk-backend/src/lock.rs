//! The lock on an image: an open-file-description lock over the whole file, which also meets QEMU's own locks.
#![expect(unsafe_code, reason = "no safe wrapper among our crates has F_OFD_SETLK")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes the lock, shared or exclusive, if nobody holds it. It lasts until it is given back or the open file is closed.
pub(crate) fn try_lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    match command(file, libc::F_OFD_SETLK, kind(exclusive)) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the lock could be taken. It is not.
pub(crate) fn is_free(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    command(file, libc::F_OFD_GETLK, kind(exclusive)).map(|found| found == libc::F_UNLCK)
}

/// Gives the lock back.
pub(crate) fn unlock(file: BorrowedFd<'_>) -> io::Result<()> {
    command(file, libc::F_OFD_SETLK, libc::F_UNLCK).map(drop)
}

fn kind(exclusive: bool) -> libc::c_int {
    if exclusive { libc::F_WRLCK } else { libc::F_RDLCK }
}

/// Returns the kind of lock that the kernel has left in the description: for `F_OFD_GETLK`, of one that is in the way.
fn command(file: BorrowedFd<'_>, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
    let mut whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0, // to the end, wherever that comes to be
        l_pid: 0, // demanded by the OFD commands
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `whole` is a valid flock that the call
    // reads and may overwrite with another.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut whole) };
    if result == 0 { Ok(whole.l_type.into()) } else { Err(io::Error::last_os_error()) }
}
