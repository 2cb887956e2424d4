//! Descriptors that the starting process left open for us, named by their numbers on the command line.
#![expect(unsafe_code, reason = "a descriptor known by its number only has no owner that the compiler knows")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};

/// What was left open.
#[derive(Debug)]
pub enum Inherited {
    /// A socket that others connect to.
    Listening(UnixListener),
    /// A connection.
    Connected(UnixStream),
}

/// Takes a Unix stream socket over. To be called once for a number, at start, before anything else of the process is
/// opened.
///
/// # Errors
/// The number is no open descriptor, or not of a Unix stream socket that is listening or connected.
pub fn inherited_socket(number: RawFd) -> io::Result<Inherited> {
    let fd = open_descriptor(number)?;
    let is_unix = socket_domain(fd) == Ok(AddressFamily::UNIX) && socket_type(fd) == Ok(SocketType::STREAM);
    let is_listening = is_unix && socket_acceptconn(fd).unwrap_or(false);
    let is_connected = is_unix && getpeername(fd).is_ok();
    if !is_listening && !is_connected {
        return Err(refused(number, "no Unix stream socket that is listening or connected"));
    }
    ioctl_fionbio(fd, false)?;
    let fd = take(fd)?;
    Ok(if is_listening { Inherited::Listening(fd.into()) } else { Inherited::Connected(fd.into()) })
}

/// Takes any descriptor over, under the same rules.
///
/// # Errors
/// The number is no open descriptor.
pub fn inherited_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    take(open_descriptor(number)?)
}

fn open_descriptor<'a>(number: RawFd) -> io::Result<BorrowedFd<'a>> {
    if number < 3 {
        return Err(refused(number, "one of the standard ones, nothing that was left open for this program"));
    }
    // SAFETY: nothing of ours owns or closes a descriptor yet, so it stays what it is while this module looks at it; the
    // next line tells whether it is open at all.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_getfd(fd).map_err(|_| refused(number, "not open"))?;
    Ok(fd)
}

fn take(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fcntl_setfd(fd, fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and whoever started us left it for this call to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.as_raw_fd()) })
}

/// The same for a socket that must be listening.
///
/// # Errors
/// As above, or it is connected.
pub fn inherited_listener(number: RawFd) -> io::Result<UnixListener> {
    match inherited_socket(number)? {
        Inherited::Listening(listener) => Ok(listener),
        Inherited::Connected(_) => Err(refused(number, "a connected socket: give a listening one")),
    }
}

fn refused(number: RawFd, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("Descriptor {number} is {what}"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn takes_a_listening_or_connected_socket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = inherited_listener(listener.into_raw_fd()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let Inherited::Connected(mut stream) = inherited_socket(theirs.into_raw_fd()).unwrap() else {
            panic!("a connection is no listener");
        };
        ours.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let refused = inherited_listener(stream.into_raw_fd()).unwrap_err().to_string();
        assert!(refused.contains("give a listening one"), "{refused}");
        let file = std::fs::File::open("/dev/null").unwrap();
        let datagram = std::os::unix::net::UnixDatagram::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for number in [file.as_raw_fd(), datagram.0.as_raw_fd(), tcp.as_raw_fd()] {
            let refused = inherited_socket(number).unwrap_err().to_string();
            assert!(refused.contains("no Unix stream socket"), "{refused}");
        }
        let taken = inherited_descriptor(file.into_raw_fd()).unwrap();
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        for refused in [inherited_descriptor(2), inherited_descriptor(i32::MAX)] {
            assert!(refused.is_err());
        }
        assert!(inherited_socket(1).unwrap_err().to_string().contains("standard"));
        assert!(inherited_socket(i32::MAX).unwrap_err().to_string().contains("not open"));
    }
}
