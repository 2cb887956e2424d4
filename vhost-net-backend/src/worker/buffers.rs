//! Buffers that were taken from the guest's receive ring before it is known how long the next frame is.
#![expect(unsafe_code, reason = "the kernel reads frames into guest memory")]

use std::collections::VecDeque;
use std::io;

use colo::vhost_user::{Chain, Ring};

use crate::control_queue::{FILTERED_BYTES, Filter};
use crate::frame::{HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::lan::{IOVECS_MAX, Port, gather, scatter};
use crate::offload::FrameHeader;

/// A frame with its header that is no longer is small: it came from a LAN of ordinary Ethernet and is in one piece.
const SMALL_BYTES: usize = 2048;
/// After so many of them the next is expected to be small as well.
const SMALL_FRAMES: u32 = 16;

/// The kernel takes no more pieces in one call than [`IOVECS_MAX`], and the last one is for what does not fit.
const PIECES_MAX: usize = IOVECS_MAX - 1;

/// Chains in the order of the ring, and where they are.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    chains: VecDeque<Chain>,
    /// Made once, and used again.
    spare: Vec<Chain>,
    /// The pieces of all chains, after those of chains that were used.
    iovecs: Vec<libc::iovec>,
    first: usize,
    bytes: usize,
    /// How many frames in a row were no longer than [`SMALL_BYTES`].
    small_frames: u32,
}

// SAFETY: the pointers are into guest memory that the chains, which are here as well, keep mapped.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Whether a frame may be asked for that has `bytes` bytes at most, header included. Where buffers may be merged it
    /// waits for enough of them, since the kernel cuts off what does not fit. But not for more than a quarter of the ring,
    /// because drivers fill it up again only when it is half empty.
    fn enough(&self, ring: &Ring, mergeable: bool, bytes: usize) -> bool {
        match self.chains.len() {
            0 => false,
            chains if mergeable => {
                self.bytes >= bytes
                    || chains >= usize::from(ring.size() / 4)
                    || self.iovecs.len() - self.first >= IOVECS_MAX / 2
            }
            _ => true,
        }
    }

    /// Takes buffers, only one unless they may be merged. Returns whether there are [`Self::enough`].
    pub(super) fn take(&mut self, ring: &mut Ring, mergeable: bool, bytes: usize) -> bool {
        while !self.enough(ring, mergeable, bytes) {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !ring.pop(&mut chain) {
                self.spare.push(chain);
                return false;
            }
            if self.first > IOVECS_MAX {
                self.iovecs.drain(..std::mem::take(&mut self.first));
            }
            let pieces = chain.writable().iter();
            self.iovecs.extend(
                pieces.map(|piece| libc::iovec {
                    iov_base: piece.host().cast(),
                    iov_len: piece.bytes() as usize,
                }),
            );
            self.bytes += chain.writable_bytes() as usize;
            self.chains.push_back(chain);
        }
        true
    }

    /// Reads a frame with its header into them. It has `bytes_max` at most, unless the LAN has changed. Returns the length of
    /// all of it, which is more than [`Self::room`] when it does not fit; `None` when there is no frame.
    ///
    /// # Errors
    /// The tap or the interface is gone.
    pub(super) fn receive(
        &mut self,
        port: &mut Port,
        spill: &mut [u8],
        bytes_max: usize,
    ) -> io::Result<Option<usize>> {
        let (pieces, bytes) = self.direct();
        let received = if bytes > bytes_max && !port.may_exceed() {
            // SAFETY: the buffers are pieces of chains that are here and keep them mapped, as guest memory, to which no
            // references exist.
            let received = unsafe { port.receive(&self.iovecs[self.first..][..pieces]) }?;
            // one that fills them is longer than it may be, and was perhaps cut off
            received.map(|frame| if frame < bytes { frame } else { frame.max(self.bytes + 1) })
        } else {
            self.receive_beyond(pieces, bytes, port, spill)?
        };
        if let Some(touched) = port.take_touched() {
            self.mark(touched);
        }
        if let Some(frame) = received {
            self.small_frames = if frame <= SMALL_BYTES { self.small_frames.saturating_add(1) } else { 0 };
        }
        Ok(received)
    }

    /// The first of the pieces, into which a frame is read, and their bytes. The kernel looks at each piece that it is given,
    /// so while frames are small it gets few of them.
    fn direct(&self) -> (usize, usize) {
        let pieces = &self.iovecs[self.first..];
        if pieces.len() > PIECES_MAX {
            let bytes = pieces[..PIECES_MAX].iter().map(|piece| piece.iov_len).sum();
            return (PIECES_MAX, bytes);
        }
        if self.small_frames >= SMALL_FRAMES {
            let mut bytes = 0;
            for (at, piece) in pieces.iter().enumerate() {
                bytes += piece.iov_len;
                if bytes >= SMALL_BYTES {
                    return (at + 1, bytes);
                }
            }
        }
        (pieces.len(), self.bytes)
    }

    /// Reads a frame into the first `pieces`, which have `bytes`, and what does not fit into `spill`, from where it is copied
    /// into the other pieces, as far as there is room.
    fn receive_beyond(
        &mut self,
        pieces: usize,
        bytes: usize,
        port: &mut Port,
        spill: &mut [u8],
    ) -> io::Result<Option<usize>> {
        let end = self.first + pieces;
        let beyond = libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
        // it stands in the place of the next piece meanwhile
        let next = self.iovecs.get(end).copied();
        match next {
            Some(_) => self.iovecs[end] = beyond,
            None => self.iovecs.push(beyond),
        }
        // SAFETY: as in `receive`, and a slice that is borrowed for ourselves alone.
        let received = unsafe { port.receive(&self.iovecs[self.first..=end]) };
        match next {
            Some(next) => self.iovecs[end] = next,
            None => self.iovecs.truncate(end),
        }
        let received = received?;
        if let Some(spilled) = received.and_then(|frame| frame.checked_sub(bytes)).filter(|_| next.is_some())
        {
            // SAFETY: as in `receive`.
            unsafe { scatter(&self.iovecs[end..], 0, &spill[..spilled.min(spill.len())]) };
        }
        Ok(received)
    }

    /// Writes a header of so many bytes and a frame, for which there is room.
    pub(super) fn write(&self, header: FrameHeader, header_bytes: usize, frame: &[u8]) {
        let mut whole = [0; HEADER_BYTES];
        whole[..FrameHeader::BYTES].copy_from_slice(header.bytes());
        let pieces = &self.iovecs[self.first..];
        // SAFETY: as in `receive`.
        unsafe {
            scatter(pieces, 0, &whole[..header_bytes]);
            scatter(pieces, header_bytes, frame);
        }
    }

    /// The frame's bytes that fit.
    pub(super) fn room(&self) -> usize {
        self.bytes
    }

    /// Gives a frame that was received, of `bytes` bytes with its header, to the guest: says in the header how many buffers
    /// it takes if that has room for it, marks them, and notes them as used (virtio 1.2 §5.1.6.4).
    pub(super) fn give(&mut self, ring: &mut Ring, header_bytes: usize, mut bytes: usize) {
        let mut count = 0u16;
        let mut left = bytes;
        for chain in &self.chains {
            count += 1;
            left = left.saturating_sub(chain.writable_bytes() as usize);
            if left == 0 {
                break;
            }
        }
        if header_bytes > LEGACY_HEADER_BYTES
            && let Some(front) = self.chains.front()
        {
            front.write_at(LEGACY_HEADER_BYTES, &count.to_le_bytes());
        }
        for _ in 0..count {
            let Some(chain) = self.chains.pop_front() else { break };
            let room = chain.writable_bytes() as usize;
            let here = bytes.min(room);
            chain.mark_front(here);
            ring.add_used(chain.head(), here as u32);
            bytes -= here;
            self.forget(chain, room);
        }
    }

    /// Whether the driver wants the frame that was received, of `bytes` bytes with its header, for which there is room.
    pub(super) fn are_wanted(&self, filter: &Filter, header_bytes: usize, bytes: usize) -> bool {
        let mut front = [0; FILTERED_BYTES];
        let front = &mut front[..FILTERED_BYTES.min(bytes - header_bytes)];
        // SAFETY: as in `receive`.
        unsafe { gather(&self.iovecs[self.first..], header_bytes, front) };
        filter.admits(front)
    }

    /// Marks what a frame that is not given to the guest has left in its memory.
    pub(super) fn mark(&self, mut bytes: usize) {
        for chain in &self.chains {
            let here = bytes.min(chain.writable_bytes() as usize);
            chain.mark_front(here);
            bytes -= here;
        }
    }

    fn forget(&mut self, chain: Chain, room: usize) {
        self.first += chain.writable().len();
        self.bytes -= room;
        self.spare.push(chain);
    }

    /// Puts all of them back into the ring, and forgets the guest's memory.
    pub(super) fn put_back(&mut self, ring: &mut Ring) {
        while let Some(chain) = self.chains.pop_back() {
            ring.undo_pop(&chain);
        }
        *self = Self::default();
    }
}
