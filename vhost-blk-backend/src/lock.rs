//! The lock on an image: an open-file-description lock over the whole file, which also meets QEMU's own locks.
#![expect(unsafe_code, reason = "no safe wrapper among our crates has F_OFD_SETLK")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes the lock, shared or exclusive, if nobody holds it. It lasts until the open file is closed.
pub(crate) fn try_lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0, // to the end, wherever that comes to be
        l_pid: 0, // demanded by F_OFD_SETLK
    };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `whole` is a valid flock that the call
    // only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
