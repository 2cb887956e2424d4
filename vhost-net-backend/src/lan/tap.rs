//! The tap interface on the LAN side. Without offloads whole Ethernet frames pass, with nothing left to do for us; with
//! them each frame has a virtio-net header, which the kernel reads and writes as the guest does.

#![expect(
    unsafe_code,
    reason = "the ioctls of tun and of interface flags, and I/O on guest memory, have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use colo::vhost_user::Chain;
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::offload::Offloads;

/// Linux gives no more in one call (limits.h, UIO_MAXIOV).
pub(crate) const IOVECS_MAX: usize = 1024;

/// A frame with its header that is no longer is copied: that costs less than what the kernel does for each piece (measured
/// with 76 and 1526 bytes in one piece beside the header: 12 and 4 % more frames a second).
const SMALL_BYTES: usize = 2048;

/// What a tap has that nobody has asked.
const MTU_DEFAULT: u16 = 1500;

/// Why a tap cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Linux allows 15 bytes.
    #[error("Tap name {0:?} is no name for an interface: 1 to 15 bytes, no slash, no space")]
    Name(String),
    /// No tun driver, or no right to it.
    #[error("/dev/net/tun cannot be opened: {0}; load the module tun, or run as a user who may use it")]
    Device(io::Error),
    /// What was handed over is none.
    #[error("Descriptor {number} is no tap: {error}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What the system says.
        error: io::Error,
    },
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

/// Room for a frame on its way to the kernel, used again and again.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Its pieces; what they point to matters during a call only.
    vectors: Vec<libc::iovec>,
    /// Or all of it.
    small: Box<[u8; SMALL_BYTES]>,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self { vectors: Vec::new(), small: Box::new([0; SMALL_BYTES]) }
    }
}

// SAFETY: nobody follows its pointers but the call that they were put in for.
unsafe impl Send for Outgoing {}

/// How to open a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapOptions {
    /// How many queues of it are wanted. With more than one it has to have been made with `multi_queue`, or is.
    pub queues: usize,
    /// Each frame has a virtio-net header.
    pub headers: bool,
}

impl TapOptions {
    fn flags(self) -> libc::c_int {
        let multi_queue = if self.queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let headers = if self.headers { libc::IFF_VNET_HDR } else { 0 };
        libc::IFF_TAP | libc::IFF_NO_PI | multi_queue | headers
    }
}

/// An open queue of a tap. Reading and writing do not block.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: Option<String>,
    multi_queue: bool,
    headers: bool,
}

impl Tap {
    /// Opens the tap of that name, which is made if there is none, and brings it up. Gives as many queues as were asked for.
    ///
    /// # Errors
    /// The name is none, the tap is in use, or this process may not do it.
    pub fn open(name: &str, options: TapOptions) -> Result<Vec<Self>, TapError> {
        Self::open_queues("/dev/net/tun", name, options, TapError::Device)
    }

    /// Opens the macvtap of that name, which shares the interface below it.
    ///
    /// # Errors
    /// There is none, it is in use, or this process may not do it.
    pub fn open_macvtap(name: &str, options: TapOptions) -> Result<Vec<Self>, TapError> {
        interface_request(name).ok_or_else(|| TapError::Name(name.into()))?;
        let failed = |error, hint| TapError::Open { name: name.into(), error, hint };
        // not from /sys, which may be another network namespace's
        let index = socket()
            .and_then(|socket| Ok(name_to_index(&socket, name)?))
            .map_err(|error| failed(error, ": make it with `ip link add … type macvtap`"))?;
        Self::open_queues(&format!("/dev/tap{index}"), name, options, |error| {
            failed(error, ": its device file is /dev/tapINDEX")
        })
    }

    fn open_queues(
        path: &str,
        name: &str,
        options: TapOptions,
        failed: impl Fn(io::Error) -> TapError,
    ) -> Result<Vec<Self>, TapError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let queue = |_| {
            let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
            Self::attach(fd, name, options)
        };
        let taps = (0..options.queues).map(queue).collect::<Result<Vec<_>, _>>()?;
        bring_up(name).map_err(|error| TapError::Up { name: name.into(), error })?;
        Ok(taps)
    }

    fn attach(fd: OwnedFd, name: &str, options: TapOptions) -> Result<Self, TapError> {
        let mut request = interface_request(name).ok_or_else(|| TapError::Name(name.into()))?;
        request.ifr_ifru.ifru_flags = options.flags() as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
        let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if set < 0 {
            let error = io::Error::last_os_error();
            let hint = match error.raw_os_error() {
                Some(libc::EBUSY) => ": another program has it open",
                Some(libc::EPERM) => ": give this user the tap (`ip tuntap add … user …`), or CAP_NET_ADMIN",
                Some(libc::EINVAL) if options.queues > 1 => {
                    ": an interface of that name is no tap, or one without multi_queue"
                }
                Some(libc::EINVAL) => ": an interface of that name is no tap, or one with multi_queue",
                _ => "",
            };
            return Err(TapError::Open { name: name.into(), error, hint });
        }
        let tap =
            Self { fd, name: Some(name.into()), multi_queue: options.queues > 1, headers: options.headers };
        // A tap outlives its user, and the one before may have left offloads on.
        tap.set_offloads(Offloads::negotiated(0)).map_err(|error| TapError::Open {
            name: name.into(),
            error,
            hint: "",
        })?;
        Ok(tap)
    }

    /// A queue that another program has opened, as a manager of virtual machines hands it over. It must be as the options
    /// say.
    ///
    /// # Errors
    /// It is no tap, or another one.
    pub fn inherit(number: i32, fd: OwnedFd, options: TapOptions) -> Result<Self, TapError> {
        let failed = |error| TapError::Descriptor { number, error };
        if FileType::from_raw_mode(fstat(&fd).map_err(|errno| failed(errno.into()))?.st_mode)
            != FileType::CharacterDevice
        {
            return Err(failed(io::Error::other("it is another kind of file")));
        }
        // SAFETY: ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one ifreq, which lives until the call returns.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the call has filled in the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let has = |flag| flags & flag == flag;
        let wrong = if !has(libc::IFF_TAP | libc::IFF_NO_PI) {
            Some("it must be opened with IFF_TAP and IFF_NO_PI")
        } else if has(libc::IFF_VNET_HDR) != options.headers {
            Some(if options.headers {
                "it must be opened with IFF_VNET_HDR"
            } else {
                "it must be opened without IFF_VNET_HDR"
            })
        } else if options.queues > 1 && !has(libc::IFF_MULTI_QUEUE) {
            Some("several queues must be opened with IFF_MULTI_QUEUE")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, wrong)));
        }
        let set = || fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK);
        set().map_err(|errno| failed(errno.into()))?;
        let name: String = request
            .ifr_name
            .iter()
            .take_while(|byte| **byte != 0)
            .map(|byte| char::from(*byte as u8))
            .collect();
        let tap =
            Self { fd, name: Some(name), multi_queue: has(libc::IFF_MULTI_QUEUE), headers: options.headers };
        tap.set_offloads(Offloads::negotiated(0)).map_err(failed)?;
        Ok(tap)
    }

    /// Any descriptor that keeps frames apart and does not block can stand for a tap.
    #[cfg(test)]
    pub(crate) fn from_packets(fd: OwnedFd, headers: bool) -> Self {
        Self { fd, name: None, multi_queue: false, headers }
    }

    /// Whether the kernel of this host segments UDP for a tap (Linux 6.2).
    pub fn segments_udp(&self) -> bool {
        let udp = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let can = self.offload(udp).is_ok();
        can && self.offload(0).is_ok()
    }

    fn offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What the guest has negotiated: how long the headers are, and what may be left to it. It concerns all queues.
    ///
    /// # Errors
    /// The kernel does not know one of them.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if self.name.is_none() {
            return Ok(());
        }
        if self.headers {
            let bytes = offloads.header_bytes() as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int, which lives until the call returns.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.offload(if self.headers { offloads.tap_flags() } else { 0 })
    }

    /// The kernel spreads what comes from the LAN over the queues that are attached. One that the guest does not receive
    /// from must not get any.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn set_receiving(&self, receiving: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        // SAFETY: ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = if receiving { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq, which lives until the call returns.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // it is so already
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(error),
        }
    }

    /// The longest packet of the LAN without its Ethernet header, in bytes.
    pub(crate) fn mtu(&self) -> u16 {
        self.name.as_deref().and_then(|name| interface_mtu(name).ok()).unwrap_or(MTU_DEFAULT)
    }

    /// Takes one frame that came from the LAN, with its header, into the buffers. Returns its length, header included, and
    /// cuts off what does not fit; `None` when there is none.
    ///
    /// # Errors
    /// The tap is gone.
    ///
    /// # Safety
    /// The buffers are mapped and stay so, and no reference to them exists.
    pub(crate) unsafe fn receive(&self, buffers: &[libc::iovec]) -> io::Result<Option<usize>> {
        loop {
            let count = buffers.len().min(IOVECS_MAX) as libc::c_int;
            // SAFETY: the buffers are the caller's promise.
            let bytes = unsafe { libc::readv(self.fd.as_raw_fd(), buffers.as_ptr(), count) };
            if bytes > 0 {
                return Ok(Some(bytes as usize));
            }
            if bytes == 0 {
                // a tap has no end; what stands for it in a test has
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }

    /// Sends a header and what can be read of the chain as one frame. Returns false when the kernel does not take it, as
    /// [`Tap::write`], or it is in too many pieces.
    pub(crate) fn send(&self, header: &[u8], chain: &Chain, outgoing: &mut Outgoing) -> bool {
        let Outgoing { vectors, small } = outgoing;
        let bytes = header.len() + chain.readable_bytes() as usize;
        if bytes <= SMALL_BYTES {
            small[..header.len()].copy_from_slice(header);
            chain.copy_to(&mut small[header.len()..bytes]);
            return self.write(&small[..bytes]);
        }
        vectors.clear();
        // a write only reads it
        vectors.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
        vectors.extend(
            chain
                .readable()
                .iter()
                .map(|piece| libc::iovec { iov_base: piece.host().cast(), iov_len: piece.bytes() as usize }),
        );
        if vectors.len() > IOVECS_MAX {
            return false;
        }
        loop {
            // SAFETY: the buffers are a slice that is borrowed and pieces of guest memory that the chain keeps mapped.
            let bytes =
                unsafe { libc::writev(self.fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
            if bytes >= 0 {
                return true;
            }
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return false;
            }
        }
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

/// Any, to ask about interfaces of the network namespace that this process is in.
fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn interface_mtu(name: &str) -> io::Result<u16> {
    let socket = socket()?;
    let mut request = interface_request(name).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the call reads and writes one ifreq, which lives until it returns, and fills in what is read then.
    let mtu = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_mtu
    };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

fn bring_up(name: &str) -> io::Result<()> {
    let socket = socket()?;
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
            let error = Tap::open(name, TapOptions { queues: 1, headers: true }).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{error}");
        }
    }
}
