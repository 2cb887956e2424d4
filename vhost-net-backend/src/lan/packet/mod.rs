//! An interface of the host, all of whose frames are the guest's, through packet sockets (packet(7)).
//!
//! A queue pair has a socket to send by and another to receive by. Several that receive are a fanout group: the kernel
//! spreads flows over them. Which is also why there are two sockets: the only way out of a group is to close.
//!
//! The kernel gives a frame as it came, with a virtio-net header that says what was left to the receiver: a checksum, or
//! segmentation. What the guest has negotiated goes straight into its buffers. For the rest the frame is held here and
//! the work done. The header is read apart from the frame, so that its length is nobody else's business and no decision
//! depends on memory that the guest can write to.
#![expect(unsafe_code, reason = "frames are received into guest memory")]

mod held;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use colo::vhost_user::Chain;

use self::held::{Held, TAG_BYTES};
use self::socket::{Incoming, Received, open_outgoing};
use super::pieces::{Outgoing, Sent, Vectors, append_behind, scatter, write_behind};
use super::{LanError, Losses, interface};
use crate::frame::{
    FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Header, LEGACY_HEADER_BYTES, LegacyHeader,
};
use crate::offload::{FrameHeader, Offloads};

/// How often to look whether an interface that is down is gone.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A queue pair's share of an interface. Reading and writing do not block.
#[derive(Debug)]
pub struct Packet {
    name: String,
    index: libc::c_int,
    outgoing: OwnedFd,
    incoming: Option<Incoming>,
    /// The fanout group's number, where there are several queue pairs.
    group: Option<u16>,
    /// The guest has headers; else every frame is whole.
    headers: bool,
    offloads: Offloads,
    header_bytes: usize,
    held: Held,
    vectors: Vectors,
    /// Since when the interface is down, or when it was looked at.
    down: Option<Instant>,
    /// How far into the buffers the last call has written.
    touched: Option<usize>,
    losses: Losses,
}

impl Packet {
    /// Opens the interface of that name for so many queue pairs, of which the first receives, and brings it up.
    ///
    /// # Errors
    /// There is none, it is no Ethernet, or this process may not do it.
    pub fn open(name: &str, pairs: usize, headers: bool) -> Result<Vec<Self>, LanError> {
        interface::request(name).ok_or_else(|| LanError::Name(name.into()))?;
        let failed = |error: io::Error| {
            let hint = match error.raw_os_error() {
                Some(libc::ENODEV) => ": `ip link` shows those of this network namespace",
                Some(libc::EPERM) => ": it takes CAP_NET_RAW",
                Some(libc::ENOPROTOOPT | libc::EINVAL) => ": a newer Linux is needed",
                _ => "",
            };
            LanError::Interface { name: name.into(), error, hint }
        };
        let index = interface::index(name).map_err(failed)? as libc::c_int;
        if !interface::is_ethernet(name).map_err(failed)? {
            return Err(failed(io::Error::other("it is no Ethernet")));
        }
        interface::bring_up(name).map_err(|error| LanError::Up { name: name.into(), error })?;
        if let Some(what) = interface::other_user(name) {
            tracing::warn!("Interface {name} {what}: the host uses what comes for the guest as well");
        }
        let pair = |group| {
            Ok(Self {
                name: name.into(),
                index,
                outgoing: open_outgoing(index)?,
                incoming: None,
                group,
                headers,
                offloads: Offloads::negotiated(0),
                header_bytes: if headers { LEGACY_HEADER_BYTES } else { 0 },
                held: Held::default(),
                vectors: Vectors::default(),
                down: None,
                losses: Losses::default(),
                touched: None,
            })
        };
        let open = || {
            let mut first = pair(None)?;
            let incoming = Incoming::open(index)?;
            if pairs > 1 {
                first.group = Some(incoming.found_group()?);
            }
            first.incoming = Some(incoming);
            let group = first.group;
            std::iter::once(Ok(first)).chain((1..pairs).map(|_| pair(group))).collect::<io::Result<Vec<_>>>()
        };
        open().map_err(failed)
    }

    /// Whether the kernel of this host segments UDP for a packet socket (Linux 6.2): it is asked on the loopback interface,
    /// whose stack ignores a frame that is for another address. It is taken not to when that is down.
    pub fn segments_udp(&self) -> bool {
        let probe = || -> io::Result<()> {
            let socket = open_outgoing(interface::index("lo")? as libc::c_int)?;
            // a checksum at 34 + 6, segments of 4 bytes
            let header = [1, 5, 42, 0, 4, 0, 34, 0, 6, 0];
            let mut frame = [0; 14 + 20 + 8 + 8];
            // from 02:00:00:00:00:01 to :02; IPv4 from 192.0.2.1 to .2 (RFC 5737), UDP to port 9
            frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
            frame[14..24].copy_from_slice(&[0x45, 0, 0, 36, 0, 0, 0, 0, 1, 17]);
            frame[26..34].copy_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
            frame[34..40].copy_from_slice(&[0, 9, 0, 9, 0, 16]);
            let taken = write_behind(socket.as_fd(), &header, &frame);
            taken.then_some(()).ok_or_else(io::Error::last_os_error)
        };
        probe().is_ok()
    }

    pub(super) fn incoming(&self) -> Option<BorrowedFd<'_>> {
        self.incoming.as_ref().map(|incoming| incoming.fd.as_fd())
    }

    pub(super) fn outgoing(&self) -> BorrowedFd<'_> {
        self.outgoing.as_fd()
    }

    /// Whether there is more of a frame that was received.
    pub(super) fn has_frame(&self) -> bool {
        !self.held.is_empty()
    }

    pub(super) fn sleep_max(&self) -> Option<Duration> {
        self.down.map(|_| LOOK_INTERVAL)
    }

    pub(super) fn mtu(&self) -> u16 {
        // one that is gone, or nearly
        interface::mtu(&self.name).unwrap_or(1500)
    }

    /// What the guest has negotiated.
    pub(super) fn set_offloads(&mut self, offloads: Offloads) {
        if self.headers {
            self.offloads = offloads;
            self.header_bytes = offloads.header_bytes();
        }
        // it was made for another driver
        self.held.clear();
    }

    /// The kernel spreads what comes from the LAN over the queues that receive. The first one goes on to when the guest does
    /// not, so that frames wait for one that is only paused; what came before the guest was there does not wait.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_receiving(&mut self, receiving: bool) -> io::Result<()> {
        if receiving {
            let incoming = match self.incoming.take() {
                Some(incoming) => incoming,
                None => {
                    let incoming = Incoming::open(self.index)?;
                    if let Some(group) = self.group {
                        incoming.join_group(group)?;
                    }
                    incoming
                }
            };
            return self.incoming.insert(incoming).listen();
        }
        self.losses();
        self.incoming = None;
        self.held.clear();
        Ok(())
    }

    pub(super) fn losses(&mut self) -> Losses {
        if let Some(incoming) = &self.incoming {
            self.losses.missed += incoming.dropped();
        }
        self.losses
    }

    pub(super) fn send(&self, header: &Header, chain: &Chain, outgoing: &mut Outgoing) -> Sent {
        outgoing.send(self.outgoing.as_fd(), &header[..LEGACY_HEADER_BYTES], chain)
    }

    /// Sends one frame that leaves nothing to anybody. Returns false when the kernel does not take it.
    pub fn write(&self, frame: &[u8]) -> bool {
        self.write_headed(FrameHeader::default(), frame)
    }

    pub(super) fn write_headed(&self, header: FrameHeader, frame: &[u8]) -> bool {
        write_behind(self.outgoing.as_fd(), header.bytes(), frame)
    }

    /// Takes one frame, with a header if the guest has headers; `None` when there is none.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn read(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let buffer = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: the buffer is a slice that is borrowed for ourselves alone.
        unsafe { self.receive(&[buffer]) }
    }

    /// As [`super::Port::take_touched`].
    pub(super) fn take_touched(&mut self) -> Option<usize> {
        self.touched.take()
    }

    /// As [`super::Port::receive`].
    ///
    /// # Safety
    /// The buffers are mapped and stay so, and no reference to them exists.
    pub(super) unsafe fn receive(&mut self, buffers: &[libc::iovec]) -> io::Result<Option<usize>> {
        if self.has_frame() {
            // SAFETY: the caller's promise.
            return Ok(Some(unsafe { self.give_held(buffers) }));
        }
        let Some(incoming) = &self.incoming else {
            return Ok(None);
        };
        let mut header: LegacyHeader = [0; LEGACY_HEADER_BYTES];
        let Vectors(vectors) = &mut self.vectors;
        vectors.clear();
        vectors.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
        append_behind(vectors, buffers, self.header_bytes);
        // SAFETY: a header of our own, and the caller's promise.
        let received = match unsafe { incoming.receive(vectors) } {
            Ok(received) => received,
            Err(error) => return self.failed(error),
        };
        self.down = None;
        let Received { bytes, cut, tag } = received;
        let bytes = bytes.saturating_sub(LEGACY_HEADER_BYTES);
        self.touched = Some(self.header_bytes + bytes);
        if cut || !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX - TAG_BYTES).contains(&bytes) {
            self.losses.unusable += 1;
            return Ok(Some(0));
        }
        if tag.is_none() && self.offloads.accept(&mut header) {
            // SAFETY: the caller's promise.
            unsafe { self.put_header(buffers, &header) };
            return Ok(self.touched.take());
        }
        // SAFETY: the caller's promise; the pieces are those buffers, without the room for the header.
        unsafe { self.held.take(&self.vectors.0[1..], bytes, tag) };
        if !self.held.prepare(header, tag.is_some(), self.offloads) {
            self.losses.unusable += 1;
            return Ok(Some(0));
        }
        // SAFETY: the caller's promise.
        Ok(Some(unsafe { self.give_held(buffers) }))
    }

    /// There is no frame: why?
    fn failed(&mut self, error: io::Error) -> io::Result<Option<usize>> {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => {}
            Some(libc::ENETDOWN) => self.down = Some(Instant::now()),
            // a frame whose kind of segmentation the kernel has no word for
            Some(libc::EINVAL) => {
                self.losses.unusable += 1;
                return Ok(Some(0));
            }
            _ => return Err(error),
        }
        // It says only once that the interface is down, which is also the first step to being gone.
        if self.down.is_some_and(|since| since.elapsed() >= LOOK_INTERVAL) {
            self.down = Some(Instant::now());
            if let Some(incoming) = &self.incoming
                && incoming.is_orphan()?
            {
                return Err(io::Error::other(format!("Interface {} was removed", self.name)));
            }
        }
        Ok(None)
    }

    /// Puts the frame that is held, or its next segment, into the buffers. Returns its length with its header.
    ///
    /// # Safety
    /// As for [`Packet::receive`].
    unsafe fn give_held(&mut self, buffers: &[libc::iovec]) -> usize {
        // SAFETY: the caller's promise, for both.
        unsafe {
            let Some((bytes, header)) = self.held.give(buffers, self.header_bytes) else {
                return 0;
            };
            self.put_header(buffers, &header);
            self.header_bytes + bytes
        }
    }

    /// # Safety
    /// As for [`Packet::receive`].
    unsafe fn put_header(&self, buffers: &[libc::iovec], header: &LegacyHeader) {
        let mut whole = [0; HEADER_BYTES];
        whole[..LEGACY_HEADER_BYTES].copy_from_slice(header);
        // SAFETY: the caller's promise.
        unsafe { scatter(buffers, 0, &whole[..self.header_bytes]) };
    }
}
