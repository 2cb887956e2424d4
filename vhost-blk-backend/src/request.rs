//! What a descriptor chain asks of the disk, understood before any of it is carried out. Not trusted in any way.
//!
//! A request is sixteen bytes of header, then the data; one status byte is the very last that the device may write
//! (virtio 1.2 §5.2.6). The device must not care where descriptors begin and end (§2.7.4).

use colo::vhost_user::Chain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::block_buffer::SECTOR_BYTES;

/// The most data segments that a driver may put into one request (the device's seg_max).
pub const SEGMENTS_MAX: u32 = 126;

/// The most bytes of one segment (the device's size_max).
pub const SEGMENT_BYTES_MAX: u32 = 128 << 10;

/// A request with more data than a driver that minds both limits can ask for fails. It bounds what one request makes
/// the back end allocate.
pub const DATA_BYTES_MAX: usize = 16 << 20;

const _: () = assert!(SEGMENTS_MAX as usize * SEGMENT_BYTES_MAX as usize <= DATA_BYTES_MAX);

/// The most sectors of one range of a discard: 2 GiB.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 22;

/// The most ranges of one discard.
pub const DISCARD_EXTENTS_MAX: u32 = 16;

/// The most sectors of a write of zeros. A primary sends them to its peer as any other write, so they obey its limit.
pub const ZEROES_SECTORS_MAX: u32 = (DATA_BYTES_MAX / SECTOR_BYTES) as u32;

/// The most ranges of a write of zeros.
pub const ZEROES_EXTENTS_MAX: u32 = 1;

const HEADER_BYTES: usize = 16;

/// `struct virtio_blk_discard_write_zeroes`: sector u64, num_sectors u32, flags u32.
const EXTENT_BYTES: usize = 16;

/// How a request ended, as the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// The device or the driver made a mistake.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know the request.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from the disk at this byte into the chain's writable part.
    Read(u64),
    /// Write the chain's readable part to the disk at this byte.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// Put the serial number into the chain's writable part.
    GetId,
    /// Forget the content of the extents.
    Discard,
    /// Make the content of the extents zeros.
    WriteZeroes,
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Its blocks may be given back to the file system.
    pub unmap: bool,
}

/// A chain, understood. Header and status have been taken off it, what is left is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Carry it out, then answer.
    Request(Operation),
    /// Answer with this status at once.
    Refused(Status),
    /// There is no place for a status: return the chain with length 0.
    Unanswerable,
}

/// What the disk allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Its length in bytes.
    pub disk_bytes: u64,
    /// Requests begin and end at multiples of so many bytes.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Limits {
    /// The byte at which `sector` begins, if so many bytes from there on are blocks of the disk.
    fn on_disk(&self, sector: u64, bytes: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES as u64)?;
        let whole =
            offset.is_multiple_of(self.block_bytes.into()) && bytes.is_multiple_of(self.block_bytes.into());
        (whole && offset.checked_add(bytes)? <= self.disk_bytes).then_some(offset)
    }

    fn transfer(&self, sector: u64, bytes: u32) -> Option<u64> {
        if bytes == 0 || bytes as usize > DATA_BYTES_MAX {
            return None;
        }
        self.on_disk(sector, bytes.into())
    }
}

/// Understands a chain. `extents` is filled by a request that has some.
#[inline]
pub fn parse(chain: &mut Chain, limits: Limits, extents: &mut Vec<Extent>) -> Parsed {
    if !chain.take_status() {
        return Parsed::Unanswerable;
    }
    let mut header = [0; HEADER_BYTES];
    if !chain.take_front(&mut header) {
        return Parsed::Refused(Status::IoError);
    }
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    let done = match kind {
        VIRTIO_BLK_T_IN => limits.transfer(sector, chain.writable_bytes()).map(Operation::Read),
        VIRTIO_BLK_T_OUT if limits.read_only => None,
        VIRTIO_BLK_T_OUT => limits.transfer(sector, chain.readable_bytes()).map(Operation::Write),
        VIRTIO_BLK_T_FLUSH => Some(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => (chain.writable_bytes() >= VIRTIO_BLK_ID_BYTES).then_some(Operation::GetId),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            return match read_extents(chain, limits, kind == VIRTIO_BLK_T_DISCARD, extents) {
                Ok(operation) => Parsed::Request(operation),
                Err(status) => Parsed::Refused(status),
            };
        }
        _ => return Parsed::Refused(Status::Unsupported),
    };
    done.map_or(Parsed::Refused(Status::IoError), Parsed::Request)
}

fn read_extents(
    chain: &Chain,
    limits: Limits,
    discard: bool,
    extents: &mut Vec<Extent>,
) -> Result<Operation, Status> {
    let (operation, extents_max, sectors_max, flags_known) = if discard {
        (Operation::Discard, DISCARD_EXTENTS_MAX, DISCARD_SECTORS_MAX, 0)
    } else {
        let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        (Operation::WriteZeroes, ZEROES_EXTENTS_MAX, ZEROES_SECTORS_MAX, unmap)
    };
    let mut data = [0; DISCARD_EXTENTS_MAX as usize * EXTENT_BYTES];
    let bytes = chain.readable_bytes() as usize;
    let whole =
        bytes > 0 && bytes.is_multiple_of(EXTENT_BYTES) && bytes <= extents_max as usize * EXTENT_BYTES;
    if !whole || limits.read_only {
        return Err(Status::IoError);
    }
    chain.copy_to(&mut data[..bytes]);
    extents.clear();
    for extent in data[..bytes].chunks_exact(EXTENT_BYTES) {
        let u32_at = |at: usize| u32::from_le_bytes(extent[at..at + 4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(extent[..8].try_into().expect("8 bytes"));
        let (sectors, flags) = (u32_at(8), u32_at(12));
        // a flag that is not known, and for a discard any (§5.2.6.2)
        if flags & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES as u64;
        let offset =
            limits.on_disk(sector, bytes).filter(|_| sectors <= sectors_max).ok_or(Status::IoError)?;
        if bytes > 0 {
            extents.push(Extent { offset, bytes, unmap: flags != 0 });
        }
    }
    Ok(operation)
}

#[cfg(test)]
mod tests;
