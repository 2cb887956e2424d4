//! A listening socket that a parent process left open for us, named by its number on the command line.
#![expect(unsafe_code, reason = "a descriptor known by its number only has no owner that the compiler knows")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

/// Takes the socket over. To be called once, at start, before anything else of the process is opened.
///
/// # Errors
/// The number is no open descriptor, or not of a listening Unix socket.
pub(super) fn inherited_listener(number: RawFd) -> io::Result<UnixListener> {
    let refused =
        |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("Descriptor {number} is {what}"));
    if number < 3 {
        return Err(refused("one of the standard ones, no socket that was left open for this program"));
    }
    // SAFETY: nothing of ours owns or closes a descriptor yet, so it stays what it is for this borrow; the first use
    // tells whether it is open at all.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(fd).map_err(|_| refused("not open"))?;
    let listening = socket_acceptconn(fd).unwrap_or(false);
    if !listening || socket_domain(fd)? != AddressFamily::UNIX {
        return Err(refused("no listening Unix socket"));
    }
    fcntl_setfd(fd, flags | FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and whoever started us left it for this call to own.
    Ok(unsafe { UnixListener::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn takes_a_listening_socket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let number = UnixListener::bind(&path).unwrap().into_raw_fd();
        let listener = inherited_listener(number).unwrap();
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(inherited_listener(file.as_raw_fd()).unwrap_err().to_string().contains("no listening"));
        assert!(inherited_listener(1).unwrap_err().to_string().contains("standard"));
        assert!(inherited_listener(i32::MAX).unwrap_err().to_string().contains("not open"));
    }
}
