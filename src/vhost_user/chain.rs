//! A request of the guest: a descriptor chain (virtio 1.2 §2.7.5), read once and checked while it is read.
//!
//! The guest may change its descriptors at any time. So each is copied out of guest memory exactly once; what was
//! checked is what is used, and a [`Chain`] never looks at the table again. (What is fetched ahead into the cache is a
//! guess.) Every buffer is resolved to where it is in this process, with the mapping kept alive by the chain.
#![expect(unsafe_code, reason = "copies between guest memory, which others change, and memory of ours")]

use std::mem::size_of;
use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;

use crate::memory::{HostMap, Piece};

/// A chain with more descriptors breaks its ring, as it does in QEMU. It bounds what a request makes us keep; the
/// specification allows as many as the ring has entries, and no driver uses nearly as many.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;

/// Of a processor's cache.
const LINE_BYTES: u32 = 64;

const DESCRIPTOR_BYTES: u32 = size_of::<Descriptor>() as u32;

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// An index is not one of the table.
    #[error("Descriptor {index} of a table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Length of the table.
        size: u16,
    },
    /// More descriptors than the table has.
    #[error("The chain is a loop")]
    Loop,
    /// More than [`CHAIN_DESCRIPTORS_MAX`].
    #[error("The chain has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    Descriptors,
    /// An indirect table in an indirect table, with a successor, empty, or of a length that is no multiple of 16.
    #[error("An indirect descriptor is malformed")]
    Indirect,
    /// A table or a buffer is not in guest memory.
    #[error("{bytes} bytes at guest address {address:#x} are not in guest memory")]
    Memory {
        /// Where.
        address: u64,
        /// How many.
        bytes: u32,
    },
    /// A buffer for the driver comes before one for the device.
    #[error("A readable descriptor follows a writable one")]
    Order,
    /// More than 2^32 bytes.
    #[error("The chain is longer than 2^32 bytes")]
    TooLong,
}

/// A chain that was popped. Made once and filled again and again, so that popping allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    map: Option<Arc<HostMap>>,
    head: u16,
    pieces: Vec<Piece>,
    /// Readable pieces that were taken off the front.
    front: usize,
    /// The first writable piece.
    writable_from: usize,
    readable_bytes: u32,
    writable_bytes: u32,
    /// Where the status goes, once that was taken off.
    status: Option<Piece>,
}

// SAFETY: the pointers in it are into the mapping that `map` keeps alive, wherever the chain is.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of its first descriptor, by which the used ring names it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read, in order, as far as it was not taken.
    pub fn readable(&self) -> &[Piece] {
        &self.pieces[self.front..self.writable_from]
    }

    /// What the device may write, in order.
    pub fn writable(&self) -> &[Piece] {
        &self.pieces[self.writable_from..]
    }

    /// Bytes in [`Chain::readable`].
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Bytes in [`Chain::writable`].
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Takes the first `into.len()` readable bytes off; `false`, and nothing taken, when there are fewer.
    pub fn take_front(&mut self, into: &mut [u8]) -> bool {
        if (self.readable_bytes as usize) < into.len() {
            return false;
        }
        let mut filled = 0;
        while filled < into.len() {
            let piece = &mut self.pieces[self.front];
            let bytes = (into.len() - filled).min(piece.bytes as usize);
            copy_from(piece, &mut into[filled..filled + bytes]);
            piece.advance(bytes as u32);
            self.front += usize::from(piece.bytes == 0);
            filled += bytes;
        }
        self.readable_bytes -= filled as u32;
        true
    }

    /// Takes the last writable byte off, where block and SCSI devices put their status. `false`: nothing is writable.
    pub fn take_status(&mut self) -> bool {
        let Some(last) = self.pieces[self.writable_from..].last_mut() else {
            return false;
        };
        last.bytes -= 1;
        let bytes = last.bytes;
        self.status = Some(Piece {
            host: last.host.wrapping_add(bytes as usize),
            guest: last.guest.wrapping_add(u64::from(bytes)),
            bytes: 1,
        });
        if bytes == 0 {
            self.pieces.pop();
        }
        self.writable_bytes -= 1;
        true
    }

    /// Writes and marks the byte that [`Chain::take_status`] took off, if it did.
    pub fn put_status(&self, status: u8) {
        if let (Some(map), Some(at)) = (&self.map, self.status) {
            // SAFETY: a byte of this chain, whose mapping `map` keeps alive; volatile, since the guest may look at it
            // at any time.
            unsafe { at.host.write_volatile(status) };
            map.mark(at.guest, 1);
        }
    }

    /// Copies the readable bytes to `into`, as far as there is room. Returns how many.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let mut filled = 0;
        for piece in self.readable() {
            let bytes = (into.len() - filled).min(piece.bytes as usize);
            copy_from(piece, &mut into[filled..filled + bytes]);
            filled += bytes;
        }
        filled
    }

    /// Fills the writable part with `parts`, one after the other, as far as there is room, and marks it. Returns how
    /// many bytes were written.
    #[inline]
    pub fn fill(&self, parts: &[&[u8]]) -> usize {
        parts.iter().fold(0, |written, part| written + self.write_at(written, part))
    }

    /// Marks all of the writable part as written, after the kernel has done so.
    pub fn mark_written(&self) {
        self.mark_front(usize::MAX);
    }

    /// Marks the first bytes of the writable part as written, after the kernel has done so.
    pub fn mark_front(&self, mut bytes: usize) {
        let Some(map) = &self.map else {
            return;
        };
        for piece in self.writable() {
            if bytes == 0 {
                return;
            }
            let here = bytes.min(piece.bytes as usize);
            map.mark(piece.guest, here);
            bytes -= here;
        }
    }

    /// Writes `data` from `offset` of the writable part on, as far as there is room, and marks it. Returns how many bytes
    /// were written.
    #[inline]
    pub fn write_at(&self, mut offset: usize, data: &[u8]) -> usize {
        let Some(map) = &self.map else {
            return 0;
        };
        let mut written = 0;
        for piece in self.writable() {
            if written == data.len() {
                break;
            }
            let skipped = offset.min(piece.bytes as usize);
            offset -= skipped;
            let left = &data[written..];
            let bytes = left.len().min(piece.bytes as usize - skipped);
            let host = piece.host.wrapping_add(skipped);
            // SAFETY: inside a piece of guest memory that `map` keeps mapped; it is no memory of ours, so it does not
            // overlap with `data`. No reference to guest memory exists.
            unsafe { std::ptr::copy_nonoverlapping(left.as_ptr(), host, bytes) };
            map.mark(piece.guest + skipped as u64, bytes);
            written += bytes;
        }
        written
    }

    /// Forgets everything, the mapping included. A chain that is kept for later otherwise keeps the guest's memory.
    pub fn clear(&mut self) {
        *self = Self { pieces: std::mem::take(&mut self.pieces), ..Self::default() };
        self.pieces.clear();
    }

    /// Reads the chain that begins at descriptor `head` of the table at `table` with `size` entries.
    #[inline]
    pub(super) fn read(&mut self, map: &Arc<HostMap>, table: Table, head: u16) -> Result<(), ChainError> {
        if !self.map.as_ref().is_some_and(|known| Arc::ptr_eq(known, map)) {
            self.map = Some(map.clone());
        }
        self.head = head;
        self.pieces.clear();
        (self.front, self.writable_from) = (0, 0);
        (self.readable_bytes, self.writable_bytes, self.status) = (0, 0, None);
        let mut index = head;
        for _ in 0..usize::from(table.size).min(CHAIN_DESCRIPTORS_MAX) {
            if index >= table.size {
                return Err(ChainError::Index { index, size: table.size });
            }
            let descriptor = table.descriptor(index);
            if descriptor.refers_to_indirect_table() {
                return self.read_indirect(map, descriptor);
            }
            self.add(map, descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(endless(table.size))
    }

    /// An indirect table stands alone or last (§2.7.5.3.1 wants it alone; the kernel's vhost takes it last, so we do).
    fn read_indirect(&mut self, map: &HostMap, descriptor: Descriptor) -> Result<(), ChainError> {
        let (address, bytes) = (descriptor.addr().0, descriptor.len());
        let size = u16::try_from(bytes / DESCRIPTOR_BYTES).map_err(|_| ChainError::Indirect)?;
        if descriptor.has_next() || size == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::Indirect);
        }
        let mut index = 0;
        for _ in 0..usize::from(size).min(CHAIN_DESCRIPTORS_MAX) {
            if index >= size {
                return Err(ChainError::Index { index, size });
            }
            let at = address.wrapping_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES));
            let outside = ChainError::Memory { address: at, bytes: DESCRIPTOR_BYTES };
            let piece = map.contiguous(at, DESCRIPTOR_BYTES).ok_or(outside)?;
            // SAFETY: the piece is that long, and `map` keeps it mapped.
            let descriptor = unsafe { read_descriptor(piece.host) };
            if descriptor.refers_to_indirect_table() {
                return Err(ChainError::Indirect);
            }
            self.add(map, descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(endless(size))
    }

    #[inline]
    fn add(&mut self, map: &HostMap, descriptor: Descriptor) -> Result<(), ChainError> {
        let (mut address, mut bytes) = (descriptor.addr().0, descriptor.len());
        let writable = descriptor.is_write_only();
        if !writable && self.writable_from < self.pieces.len() {
            return Err(ChainError::Order);
        }
        let total =
            self.readable_bytes.checked_add(self.writable_bytes).and_then(|sum| sum.checked_add(bytes));
        total.ok_or(ChainError::TooLong)?;
        if writable {
            self.writable_bytes += bytes;
        } else {
            self.readable_bytes += bytes;
        }
        // An empty buffer is none, wherever it claims to be. One piece, unless it crosses into another region.
        while bytes > 0 {
            let piece = map.piece(address, bytes).ok_or(ChainError::Memory { address, bytes })?;
            if self.pieces.len() == CHAIN_DESCRIPTORS_MAX {
                return Err(ChainError::Descriptors);
            }
            self.pieces.push(piece);
            address = address.wrapping_add(u64::from(piece.bytes));
            bytes -= piece.bytes;
        }
        if !writable {
            self.writable_from = self.pieces.len();
        }
        Ok(())
    }
}

/// A chain that has not ended with the last descriptor that was looked at, in a table of `size`.
fn endless(size: u16) -> ChainError {
    if usize::from(size) > CHAIN_DESCRIPTORS_MAX { ChainError::Descriptors } else { ChainError::Loop }
}

/// A descriptor table that is contiguous in this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    host: *const u8,
    size: u16,
}

impl Table {
    /// `piece` is where the `size` descriptors are.
    ///
    /// # Safety
    /// The [`HostMap`] that gave the piece outlives the value.
    ///
    /// # Panics
    /// When the piece is too short.
    pub(super) unsafe fn new(piece: Piece, size: u16) -> Self {
        assert!(piece.bytes >= u32::from(size) * DESCRIPTOR_BYTES, "a table is as long as it says");
        Self { host: piece.host, size }
    }

    #[inline]
    fn descriptor(self, index: u16) -> Descriptor {
        assert!(index < self.size, "the caller has looked");
        // SAFETY: inside the table, which `new` was promised to be mapped.
        unsafe { read_descriptor(self.at(index)) }
    }

    #[inline]
    fn at(self, index: u16) -> *const u8 {
        self.host.wrapping_add(usize::from(index) * DESCRIPTOR_BYTES as usize)
    }

    /// Tells the processor that what a descriptor points to will be wanted soon.
    #[inline]
    pub(super) fn prefetch_buffer(self, map: &HostMap, index: u16) {
        if index >= self.size {
            return;
        }
        let descriptor = self.descriptor(index);
        if let Some(piece) = map.piece(descriptor.addr().0, descriptor.len()) {
            prefetch(piece.host, descriptor.is_write_only());
            // of a frame with its header; what comes then is found by the processor itself
            if piece.bytes > LINE_BYTES {
                prefetch(piece.host.wrapping_add(LINE_BYTES as usize), descriptor.is_write_only());
            }
        }
    }

    /// Tells the processor that a descriptor will be wanted soon.
    #[inline]
    pub(super) fn prefetch(self, index: u16) {
        prefetch(self.at(index), false);
    }
}

/// Tells the processor that memory will be wanted soon; to be written, other processors are to forget it. Any address
/// will do: a prefetch never faults.
#[inline]
pub(super) fn prefetch(host: *const u8, to_write: bool) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        if to_write {
            _mm_prefetch::<_MM_HINT_ET0>(host.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(host.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (host, to_write);
}

/// Copies the descriptor at `host`.
///
/// # Safety
/// It is in mapped guest memory as a whole.
#[inline]
unsafe fn read_descriptor(host: *const u8) -> Descriptor {
    let words: [u64; 2] = if host.addr().is_multiple_of(align_of::<u64>()) {
        // SAFETY: aligned, 16 bytes in mapped guest memory; volatile, since the guest may write there meanwhile.
        unsafe { [host.cast::<u64>().read_volatile(), host.cast::<u64>().add(1).read_volatile()] }
    } else {
        // §2.7.5.3 asks for no alignment of an indirect table
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        // SAFETY: 16 bytes in mapped guest memory, and an array of ours.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        [word(0), word(8)]
    };
    let rest = u64::from_le(words[1]);
    Descriptor::new(u64::from_le(words[0]), rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
}

fn copy_from(piece: &Piece, into: &mut [u8]) {
    debug_assert!(into.len() <= piece.bytes as usize, "the caller has cut it");
    // SAFETY: a piece is that long and mapped as long as its chain lives, which the callers borrow; `into` is memory
    // of ours. The guest may write there meanwhile: whatever is read is the guest's fault and only bytes.
    unsafe { std::ptr::copy_nonoverlapping(piece.host, into.as_mut_ptr(), into.len()) };
}
