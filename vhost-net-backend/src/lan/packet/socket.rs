//! Packet sockets of one interface, and the options that they take.
#![expect(unsafe_code, reason = "options of packet sockets, and I/O on guest memory, have no safe wrapper")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::held::Tag;
use crate::lan::pieces::IOVECS_MAX;

/// Room for frames that wait for the guest, and for those that wait for the interface. Linux counts what they occupy: about
/// 1800 of 1500 bytes, or 60 of 64 KiB. A tap has room for 1000.
const RECEIVE_BYTES: libc::c_int = 4 << 20;
const SEND_BYTES: libc::c_int = 1 << 20;

const TPID_DEFAULT: u16 = 0x8100;

/// A frame that has come.
pub(super) struct Received {
    /// With its header.
    pub(super) bytes: usize,
    /// There was more of it.
    pub(super) cut: bool,
    pub(super) tag: Option<Tag>,
}

/// The socket by which frames come.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) fd: OwnedFd,
}

/// Room for the auxiliary data of a frame.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

// SAFETY: CMSG_SPACE only calculates.
const CONTROL_BYTES: usize =
    unsafe { libc::CMSG_SPACE(size_of::<libc::tpacket_auxdata>() as libc::c_uint) } as usize;

impl Incoming {
    /// Of an interface. It is deaf until [`Incoming::listen`]: a socket gets everything between being bound and being in its
    /// group, what others in the group get as well.
    pub(super) fn open(index: libc::c_int) -> io::Result<Self> {
        let fd = open_socket()?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1)?;
        // what is sent through the interface, by us above all
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
        set_room(&fd, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BYTES)?;
        // SAFETY: packet_mreq is plain data, for which zeros are valid.
        let mut membership: libc::packet_mreq = unsafe { std::mem::zeroed() };
        (membership.mr_ifindex, membership.mr_type) = (index, libc::PACKET_MR_PROMISC as libc::c_ushort);
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        let mut nothing =
            libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
        let filter = libc::sock_fprog { len: 1, filter: &raw mut nothing };
        set_option(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)?;
        bind(&fd, index, libc::ETH_P_ALL as u16)?;
        Ok(Self { fd })
    }

    /// Founds a group, whose number the kernel chooses.
    pub(super) fn found_group(&self) -> io::Result<u16> {
        let flags = libc::PACKET_FANOUT_FLAG_UNIQUEID | GROUP_FLAGS;
        set_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &(flags << 16))?;
        let mut made: libc::c_uint = 0;
        get_option(&self.fd, libc::PACKET_FANOUT, &mut made)?;
        Ok(made as u16)
    }

    pub(super) fn join_group(&self, number: u16) -> io::Result<()> {
        let group = GROUP_FLAGS << 16 | libc::c_uint::from(number);
        set_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &group)
    }

    /// Frames are taken from now on, if they were not.
    pub(super) fn listen(&self) -> io::Result<()> {
        match set_option(&self.fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// How many frames the kernel has dropped since the last time for want of room.
    pub(super) fn dropped(&self) -> u64 {
        let mut figures = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        match get_option(&self.fd, libc::PACKET_STATISTICS, &mut figures) {
            Ok(()) => figures.tp_drops.into(),
            Err(_) => 0,
        }
    }

    /// Whether its interface is gone.
    pub(super) fn is_orphan(&self) -> io::Result<bool> {
        let mut address = socket_address(0, 0);
        let mut bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the call writes an address that is no longer, which lives until it returns.
        match unsafe { libc::getsockname(self.fd.as_raw_fd(), (&raw mut address).cast(), &raw mut bytes) } {
            0 => Ok(address.sll_ifindex <= 0),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes one frame with its header.
    ///
    /// # Safety
    /// The pieces are mapped and stay so, and no reference to them exists.
    pub(super) unsafe fn receive(&self, pieces: &mut [libc::iovec]) -> io::Result<Received> {
        let mut control = Control([0; CONTROL_BYTES]);
        // SAFETY: msghdr is plain data, for which zeros are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len().min(IOVECS_MAX);
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_BYTES;
        // SAFETY: the pieces are the caller's promise; message and control live until the call returns.
        let bytes = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if bytes < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has filled in the control data, as long as it says, in memory aligned for it.
        let tag = unsafe { tag_in(&message) };
        Ok(Received { bytes: bytes as usize, cut: message.msg_flags & libc::MSG_TRUNC != 0, tag })
    }
}

/// By flow, and nothing of what is sent. The one of each socket does not count in a group.
const GROUP_FLAGS: libc::c_uint = libc::PACKET_FANOUT_HASH | libc::PACKET_FANOUT_FLAG_IGNORE_OUTGOING;

/// # Safety
/// The message's control data are the kernel's.
unsafe fn tag_in(message: &libc::msghdr) -> Option<Tag> {
    // SAFETY: the caller's promise.
    let found = unsafe {
        let control = libc::CMSG_FIRSTHDR(message).as_ref()?;
        if (control.cmsg_level, control.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            return None;
        }
        libc::CMSG_DATA(control).cast::<libc::tpacket_auxdata>().read_unaligned()
    };
    let has = |flag| found.tp_status & flag != 0;
    has(libc::TP_STATUS_VLAN_VALID).then(|| Tag {
        protocol: if has(libc::TP_STATUS_VLAN_TPID_VALID) { found.tp_vlan_tpid } else { TPID_DEFAULT },
        control: found.tp_vlan_tci,
    })
}

/// A packet socket that gets nothing: without a protocol, until it is bound.
fn open_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes numbers.
    match unsafe { libc::socket(libc::AF_PACKET, kind, 0) } {
        // SAFETY: the call has made it, and nobody else has it.
        fd @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A socket to send by.
pub(super) fn open_outgoing(index: libc::c_int) -> io::Result<OwnedFd> {
    let fd = open_socket()?;
    set_option(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
    set_room(&fd, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BYTES)?;
    bind(&fd, index, 0)?;
    Ok(fd)
}

fn socket_address(index: libc::c_int, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: sockaddr_ll is plain data, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_ifindex = index;
    address.sll_protocol = protocol.to_be();
    address
}

fn bind(fd: &OwnedFd, index: libc::c_int, protocol: u16) -> io::Result<()> {
    let address = socket_address(index, protocol);
    let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the call reads an address of that length, which lives until it returns.
    match unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// More room than the system's limit where this process may (CAP_NET_ADMIN), else up to it.
fn set_room(fd: &OwnedFd, force: libc::c_int, within: libc::c_int, bytes: libc::c_int) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, force, &bytes)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, within, &bytes))
}

fn set_option<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the call reads so many bytes of the value, which lives until it returns.
    match unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const *value).cast(), bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Of a packet socket.
fn get_option<T>(fd: &OwnedFd, name: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut bytes = size_of::<T>() as libc::socklen_t;
    let to = (&raw mut *value).cast();
    // SAFETY: the call writes no more bytes than the value has, which lives until it returns; any bits are valid in those
    // that are asked for here.
    match unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, name, to, &raw mut bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
