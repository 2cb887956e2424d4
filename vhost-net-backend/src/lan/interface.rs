//! What an interface is asked and told, by ioctl, in the network namespace that this process is in; /sys may show another
//! one's.
#![expect(unsafe_code, reason = "the ioctls of interfaces have no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A request that names the interface. `None` when that is no name: 1 to 15 bytes, no slash, no space.
pub(super) fn request(name: &str) -> Option<libc::ifreq> {
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

/// Any socket will do to ask.
fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn ask(which: libc::Ioctl, name: &str) -> io::Result<libc::ifreq> {
    let socket = socket()?;
    let mut request = request(name).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: those that are used here read and write one ifreq, which lives until the call returns.
    match unsafe { libc::ioctl(socket.as_raw_fd(), which, &raw mut request) } {
        0.. => Ok(request),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Its number.
pub(super) fn index(name: &str) -> io::Result<u32> {
    Ok(name_to_index(&socket()?, name)?)
}

/// The longest packet without its Ethernet header, in bytes.
pub(super) fn mtu(name: &str) -> io::Result<u16> {
    let request = ask(libc::SIOCGIFMTU, name)?;
    // SAFETY: the call has filled it in.
    Ok(u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(u16::MAX))
}

/// Whether its frames are those of Ethernet.
pub(super) fn is_ethernet(name: &str) -> io::Result<bool> {
    let request = ask(libc::SIOCGIFHWADDR, name)?;
    // SAFETY: the call has filled it in.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr }.sa_family == libc::ARPHRD_ETHER)
}

/// Why the host's own stack or bridge uses the interface as well, if it does.
pub(super) fn other_user(name: &str) -> Option<&'static str> {
    if ask(libc::SIOCGIFADDR, name).is_ok() || has_global_ipv6(name) {
        return Some("has an address of this host");
    }
    // only a warning depends on it, so that another namespace's /sys does no harm
    let in_bridge = std::path::Path::new("/sys/class/net").join(name).join("brport").exists();
    in_bridge.then_some("is a port of a bridge")
}

/// An address that is no link-local one, which every interface has: the fourth field is the scope (proc(5)).
fn has_global_ipv6(name: &str) -> bool {
    let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    addresses.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.last() == Some(&name) && fields.get(3) == Some(&"00")
    })
}

/// Brings it up if it is down.
pub(super) fn bring_up(name: &str) -> io::Result<()> {
    let mut request = ask(libc::SIOCGIFFLAGS, name)?;
    let up = libc::IFF_UP as libc::c_short;
    // SAFETY: the call has filled in the flags; the next one reads and writes one ifreq, which lives until it returns.
    unsafe {
        if request.ifr_ifru.ifru_flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags |= up;
        if libc::ioctl(socket()?.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
