//! Buffers that were taken from the guest's receive ring before it is known how long the next frame is.
#![expect(unsafe_code, reason = "the kernel reads frames into guest memory")]

use std::collections::VecDeque;
use std::io;

use colo::vhost_user::{Chain, Ring};

use crate::control_queue::{FILTERED_BYTES, Filter};
use crate::frame::LEGACY_HEADER_BYTES;
use crate::lan::{IOVECS_MAX, Port};

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

    /// Reads a frame with its header into them, and what does not fit into `spill`. Returns the length of all of it;
    /// `None` when there is no frame.
    ///
    /// # Errors
    /// The tap or the interface is gone.
    pub(super) fn receive(&mut self, port: &mut Port, spill: &mut [u8]) -> io::Result<Option<usize>> {
        self.iovecs.push(libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() });
        // SAFETY: the buffers are pieces of chains that are here and keep them mapped, as guest memory, to which no
        // references exist, and a slice that is borrowed for ourselves alone.
        let received = unsafe { port.receive(&self.iovecs[self.first..]) };
        self.iovecs.pop();
        received
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

    /// Whether the driver wants the frame that was received, of `bytes` bytes with its header.
    pub(super) fn are_wanted(&self, filter: &Filter, header_bytes: usize, bytes: usize) -> bool {
        let mut front = [0; FILTERED_BYTES];
        let front = &mut front[..FILTERED_BYTES.min(bytes - header_bytes)];
        let (mut offset, mut filled) = (header_bytes, 0);
        for chain in &self.chains {
            if filled == front.len() {
                break;
            }
            filled += chain.copy_written(offset, &mut front[filled..]);
            offset = offset.saturating_sub(chain.writable_bytes() as usize);
        }
        filter.admits(&front[..filled])
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
