//! Listens at the LAN switch for what comes from the guest's hardware address, and by which host's port.
#![expect(unsafe_code, reason = "packet sockets have no safe interface in our dependencies")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use crate::topology::lan_port;
use crate::{Lab, MAC, Side};

/// A frame from the guest that entered the LAN.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    /// The host that it came from.
    pub side: Side,
    /// When we took it from the kernel, which keeps them in order.
    pub at: Instant,
}

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Vec<Sighting>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Capture {
    /// Starts listening.
    ///
    /// # Errors
    /// The kernel gives no packet socket.
    pub fn start(lab: &Lab) -> Result<Self> {
        let (socket, ports) = lab.switch().run(|| {
            let socket = packet_socket().context("Cannot open a packet socket")?;
            let mut ports = Vec::new();
            for side in [Side::A, Side::B] {
                ports.push((interface_index(&lan_port(side))?, side));
            }
            anyhow::Ok((socket, ports))
        })??;
        let mac = MAC.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopping) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                let Some((index, source)) = next_frame(&socket)? else {
                    continue;
                };
                if let Some((_, side)) = ports.iter().find(|(port, _)| *port == index)
                    && source == mac[..]
                {
                    let sighting = Sighting { side: *side, at: Instant::now() };
                    theirs.lock().unwrap_or_else(PoisonError::into_inner).push(sighting);
                }
            }
            ensure!(dropped(&socket)? == 0, "The capture has missed frames");
            Ok(())
        });
        Ok(Self { seen, stop, thread })
    }

    /// What was seen up to now.
    pub fn seen(&self) -> Vec<Sighting> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it and returns all that was seen.
    ///
    /// # Errors
    /// The capture was not complete.
    pub fn stop(self) -> Result<Vec<Sighting>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("The capture panicked"))??;
        Ok(std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn interface_index(name: &str) -> Result<i32> {
    // /sys shows the namespace in which it was mounted, so ask by name in the thread's own
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a pointer to a string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    ensure!(index != 0, "There is no interface {name:?}: {}", io::Error::last_os_error());
    Ok(index.cast_signed())
}

/// A socket for all frames of all interfaces of the thread's namespace, which wakes up now and then.
fn packet_socket() -> io::Result<OwnedFd> {
    let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    set_option(&socket, libc::SO_RCVBUFFORCE, &(32_i32 << 20))?;
    set_option(&socket, libc::SO_RCVTIMEO, &libc::timeval { tv_sec: 0, tv_usec: 20_000 })?;
    Ok(socket)
}

fn set_option<T>(socket: &OwnedFd, option: i32, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: value points to that many bytes for the time of the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(value).cast(),
            bytes,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The interface and the source address of the next frame that came in from a cable; none after a while.
fn next_frame(socket: &OwnedFd) -> io::Result<Option<(i32, [u8; 6])>> {
    let mut frame = [0_u8; 14];
    // SAFETY: plain data, valid when zeroed.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut from_bytes = size_of_val(&from) as libc::socklen_t;
    // SAFETY: buffer and address are locals with the lengths given.
    let received = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            frame.as_mut_ptr().cast(),
            frame.len(),
            0,
            (&raw mut from).cast(),
            &raw mut from_bytes,
        )
    };
    if received < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    }
    if from.sll_pkttype == libc::PACKET_OUTGOING {
        return Ok(None);
    }
    let mut source = [0; 6];
    source.copy_from_slice(&frame[6..12]);
    Ok(Some((from.sll_ifindex, source)))
}

/// Frames that did not fit into the socket's buffer.
fn dropped(socket: &OwnedFd) -> io::Result<u32> {
    let mut statistics = [0_u32; 2];
    let mut bytes = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: a local of the length given (struct tpacket_stats: packets, drops).
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    if result == 0 { Ok(statistics[1]) } else { Err(io::Error::last_os_error()) }
}
