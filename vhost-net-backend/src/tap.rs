//! The tap interface on the LAN side: whole Ethernet frames, checksums complete, nothing for us to segment.

#![expect(unsafe_code, reason = "the ioctls of tun and of interface flags have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Why a tap cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Linux allows 15 bytes.
    #[error("Tap name {0:?} is no name for an interface: 1 to 15 bytes, no slash, no space")]
    Name(String),
    /// No tun driver, or no right to it.
    #[error("/dev/net/tun cannot be opened: {0}; load the module tun, or run as a user who may use it")]
    Device(io::Error),
    /// Somebody else has it, or it is something else.
    #[error("Tap {name} cannot be opened: {error}{hint}")]
    Open {
        /// The interface.
        name: String,
        /// What the system says.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// It cannot be brought up.
    #[error("Tap {name} is down and cannot be brought up: {error}; say `ip link set {name} up`")]
    Up {
        /// The interface.
        name: String,
        /// What the system says.
        error: io::Error,
    },
}

/// An open tap. Reading and writing do not block.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Opens the tap of that name, which is made if there is none, and brings it up.
    ///
    /// # Errors
    /// The name is none, the tap is in use, or this process may not do it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = interface_request(name).ok_or_else(|| TapError::Name(name.into()))?;
        let fd = rustix::fs::open(
            "/dev/net/tun",
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| TapError::Device(errno.into()))?;
        // Without IFF_VNET_HDR the kernel completes checksums and segments for us.
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if set < 0 {
            let error = io::Error::last_os_error();
            let hint = match error.raw_os_error() {
                Some(libc::EBUSY) => ": another program has it open",
                Some(libc::EPERM) => ": give this user the tap (`ip tuntap add … user …`), or CAP_NET_ADMIN",
                Some(libc::EINVAL) => ": an interface of that name is no tap, or one with multi_queue",
                _ => "",
            };
            return Err(TapError::Open { name: name.into(), error, hint });
        }
        // A tap outlives its user, and the one before may have left offloads on.
        // SAFETY: TUNSETOFFLOAD takes a number.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, 0) };
        bring_up(name).map_err(|error| TapError::Up { name: name.into(), error })?;
        Ok(Self { fd })
    }

    /// Any descriptor that keeps frames apart and does not block can stand for a tap.
    #[cfg(test)]
    pub(crate) fn from_packets(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Takes one frame that came from the LAN; `None` when there is none.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match rustix::io::read(&self.fd, &mut *frame) {
                // a tap has no end; what stands for it in a test has
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => Ok(Some(bytes)),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Sends one frame to the LAN. Returns false when the kernel does not take it (too short, interface down, no
    /// memory), as on any network.
    pub fn write(&self, frame: &[u8]) -> bool {
        loop {
            match rustix::io::write(&self.fd, frame) {
                Err(rustix::io::Errno::INTR) => {}
                result => return result.is_ok(),
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn interface_request(name: &str) -> Option<libc::ifreq> {
    let valid = !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && !name.bytes().any(|byte| byte == 0 || byte == b'/' || byte == b'%' || byte.is_ascii_whitespace());
    if !valid {
        return None;
    }
    // SAFETY: ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Some(request)
}

fn bring_up(name: &str) -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut request = interface_request(name).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: both calls read and write one ifreq, which lives until they return; the first fills in the flags that
    // are read in between.
    unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        let up = libc::IFF_UP as libc::c_short;
        if request.ifr_ifru.ifru_flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags |= up;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a/b", "sixteen-bytes-it", "a b", "tap%d", "a\0b"] {
            let error = Tap::open(name).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{error}");
        }
    }
}
