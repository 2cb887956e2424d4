//! The tap interface on the LAN side. Without offloads whole Ethernet frames pass, with nothing left to do for us; with
//! them each frame has a virtio-net header, which the kernel reads and writes as the guest does.

#![expect(unsafe_code, reason = "the ioctls of tun, and I/O on guest memory, have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use colo::vhost_user::Chain;
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat};

use super::pieces::{Outgoing, Sent, read_pieces, write_behind};
use super::{LanError, interface};
use crate::frame::{HEADER_BYTES, Header};
use crate::offload::{FrameHeader, Offloads};

/// What a tap has that nobody has asked.
const MTU_DEFAULT: u16 = 1500;

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
    /// Of the header that each frame has.
    header_bytes: usize,
}

impl Tap {
    /// Opens the tap of that name, which is made if there is none, and brings it up. Gives as many queues as were asked for.
    ///
    /// # Errors
    /// The name is none, the tap is in use, or this process may not do it.
    pub fn open(name: &str, options: TapOptions) -> Result<Vec<Self>, LanError> {
        Self::open_queues("/dev/net/tun", name, options, LanError::Device)
    }

    /// Opens the macvtap of that name, which shares the interface below it.
    ///
    /// # Errors
    /// There is none, it is in use, or this process may not do it.
    pub fn open_macvtap(name: &str, options: TapOptions) -> Result<Vec<Self>, LanError> {
        interface::request(name).ok_or_else(|| LanError::Name(name.into()))?;
        let failed = |error, hint| LanError::Open { name: name.into(), error, hint };
        // not from /sys, which may be another network namespace's
        let index = interface::index(name)
            .map_err(|error| failed(error, ": make it with `ip link add … type macvtap`"))?;
        Self::open_queues(&format!("/dev/tap{index}"), name, options, |error| {
            failed(error, ": its device file is /dev/tapINDEX")
        })
    }

    fn open_queues(
        path: &str,
        name: &str,
        options: TapOptions,
        failed: impl Fn(io::Error) -> LanError,
    ) -> Result<Vec<Self>, LanError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let queue = |_| {
            let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
            Self::attach(fd, name, options)
        };
        let taps = (0..options.queues).map(queue).collect::<Result<Vec<_>, _>>()?;
        interface::bring_up(name).map_err(|error| LanError::Up { name: name.into(), error })?;
        Ok(taps)
    }

    fn attach(fd: OwnedFd, name: &str, options: TapOptions) -> Result<Self, LanError> {
        let mut request = interface::request(name).ok_or_else(|| LanError::Name(name.into()))?;
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
            return Err(LanError::Open { name: name.into(), error, hint });
        }
        let mut tap = Self::new(fd, Some(name.into()), options.queues > 1, options.headers);
        // A tap outlives its user, and the one before may have left offloads on.
        tap.set_offloads(Offloads::negotiated(0)).map_err(|error| LanError::Open {
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
    pub fn inherit(number: i32, fd: OwnedFd, options: TapOptions) -> Result<Self, LanError> {
        let failed = |error| LanError::Descriptor { number, error };
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
        let mut tap = Self::new(fd, Some(name), has(libc::IFF_MULTI_QUEUE), options.headers);
        tap.set_offloads(Offloads::negotiated(0)).map_err(failed)?;
        Ok(tap)
    }

    /// Any descriptor that keeps frames apart and does not block can stand for a tap.
    #[doc(hidden)]
    pub fn from_packets(fd: OwnedFd, headers: bool) -> Self {
        Self::new(fd, None, false, headers)
    }

    fn new(fd: OwnedFd, name: Option<String>, multi_queue: bool, headers: bool) -> Self {
        Self { fd, name, multi_queue, headers, header_bytes: if headers { HEADER_BYTES } else { 0 } }
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
    pub fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        if self.headers {
            self.header_bytes = offloads.header_bytes();
        }
        if self.name.is_none() {
            return Ok(());
        }
        if self.headers {
            let bytes = self.header_bytes as libc::c_int;
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
        self.name.as_deref().and_then(|name| interface::mtu(name).ok()).unwrap_or(MTU_DEFAULT)
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
            // SAFETY: the caller's promise.
            match unsafe { read_pieces(self.fd.as_fd(), buffers) } {
                // a tap has no end; what stands for it in a test has
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends what can be read of the chain as one frame, with this header.
    pub(crate) fn send(&self, header: &Header, chain: &Chain, outgoing: &mut Outgoing) -> Sent {
        outgoing.send(self.fd.as_fd(), &header[..self.header_bytes], chain)
    }

    /// Takes one frame that came from the LAN; `None` when there is none.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let buffer = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: the buffer is a slice that is borrowed for ourselves alone.
        unsafe { self.receive(&[buffer]) }
    }

    /// Sends one frame to the LAN, with its header if there are headers. Returns false when the kernel does not take it (too
    /// short, interface down, no memory), as on any network.
    pub fn write(&self, frame: &[u8]) -> bool {
        write_behind(self.fd.as_fd(), &[], frame)
    }

    /// Sends a frame behind this header, as far as there are headers.
    pub(crate) fn write_headed(&self, header: FrameHeader, frame: &[u8]) -> bool {
        let mut whole = [0; HEADER_BYTES];
        whole[..FrameHeader::BYTES].copy_from_slice(header.bytes());
        write_behind(self.fd.as_fd(), &whole[..self.header_bytes], frame)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a/b", "sixteen-bytes-it", "a b", "tap%d", "a\0b"] {
            let error = Tap::open(name, TapOptions { queues: 1, headers: true }).unwrap_err();
            assert!(matches!(error, LanError::Name(_)), "{error}");
        }
    }
}
