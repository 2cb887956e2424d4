//! Whether a descriptor chain is one (virtio 1.2 §2.7.5).
//!
//! The iterator of virtio-queue ends early at a malformed descriptor, which looks like a short chain. So a chain is
//! checked before a device sees it. The guest may still change it afterwards; then the iterator's own checks keep every
//! access inside guest memory, and the guest gets what it asked for.

use std::mem::size_of;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMemory;

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
    /// More descriptors than the table has: the chain is a loop.
    #[error("The chain is a loop")]
    Loop,
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

/// Walks the chain that begins at descriptor `head` of the table at `table` with `size` entries.
pub(super) fn check_chain(
    memory: &GuestMemory,
    table: GuestAddress,
    size: u16,
    head: u16,
) -> Result<(), ChainError> {
    let mut walk = Walk { memory, bytes: 0, writable: false };
    let mut index = head;
    for _ in 0..size {
        let descriptor = walk.read(table, size, index)?;
        if descriptor.refers_to_indirect_table() {
            return if descriptor.has_next() { Err(ChainError::Indirect) } else { walk.indirect(descriptor) };
        }
        walk.buffer(descriptor)?;
        if !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
    }
    Err(ChainError::Loop)
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    bytes: u32,
    writable: bool,
}

impl Walk<'_> {
    fn read(&self, table: GuestAddress, size: u16, index: u16) -> Result<Descriptor, ChainError> {
        const BYTES: u32 = size_of::<Descriptor>() as u32;
        if index >= size {
            return Err(ChainError::Index { index, size });
        }
        let offset = u64::from(index) * u64::from(BYTES);
        let outside = || ChainError::Memory { address: table.0.saturating_add(offset), bytes: BYTES };
        let address = table.checked_add(offset).ok_or_else(outside)?;
        self.memory.read_obj(address).map_err(|_| outside())
    }

    fn indirect(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let entries = descriptor.len() / size_of::<Descriptor>() as u32;
        let size = u16::try_from(entries).map_err(|_| ChainError::Indirect)?;
        if size == 0 || !descriptor.len().is_multiple_of(size_of::<Descriptor>() as u32) {
            return Err(ChainError::Indirect);
        }
        let mut index = 0;
        for _ in 0..size {
            let inner = self.read(descriptor.addr(), size, index)?;
            if inner.refers_to_indirect_table() {
                return Err(ChainError::Indirect);
            }
            self.buffer(inner)?;
            if !inner.has_next() {
                return Ok(());
            }
            index = inner.next();
        }
        Err(ChainError::Loop)
    }

    fn buffer(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        if self.writable && !descriptor.is_write_only() {
            return Err(ChainError::Order);
        }
        self.writable = descriptor.is_write_only();
        let (address, bytes) = (descriptor.addr(), descriptor.len());
        self.bytes = self.bytes.checked_add(bytes).ok_or(ChainError::TooLong)?;
        if bytes != 0 && !self.memory.check_range(address, bytes as usize) {
            return Err(ChainError::Memory { address: address.0, bytes });
        }
        Ok(())
    }
}
