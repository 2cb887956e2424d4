//! What a descriptor chain asks of the disk: virtio-blk requests, laid out over descriptors in any way.
//!
//! A request is sixteen bytes of header, then the data; one status byte is the very last that the device may write
//! (virtio 1.2 §5.2.6). The device must not care where descriptors begin and end (§2.7.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::block_buffer::SECTOR_BYTES;

/// The most data segments that a driver may put into one request (the device's seg_max).
pub const SEGMENTS_MAX: u32 = 126;

/// The most bytes of one segment (the device's size_max).
pub const SEGMENT_BYTES_MAX: u32 = 128 << 10;

/// A request with more data than a driver that minds both limits can ask for fails. It bounds what one request makes
/// the back end allocate.
pub const DATA_BYTES_MAX: usize = 16 << 20;

const _: () = assert!(SEGMENTS_MAX as usize * SEGMENT_BYTES_MAX as usize <= DATA_BYTES_MAX);

const HEADER_BYTES: u32 = 16;

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

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its length in bytes, never 0.
    pub bytes: u32,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read from the disk at this byte into the segments.
    Read(u64),
    /// Write the segments to the disk at this byte.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// Put the serial number into the segments.
    GetId,
}

/// Where the status byte goes, and the lengths for the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    status_at: GuestAddress,
    /// Bytes that the device may write before the status byte.
    writable_bytes: u32,
}

impl Answer {
    /// Puts the status where the driver looks for it, and returns the length for the used ring: how many bytes from
    /// the first writable one on were written (virtio 1.2 §2.7.8.2). `written` tells whether all writable bytes
    /// before the status were. A status address outside of guest memory gives 0.
    pub fn give(&self, memory: &impl GuestMemoryBackend, status: Status, written: bool) -> u32 {
        if memory.write_obj(status as u8, self.status_at).is_err() {
            return 0;
        }
        if written || self.writable_bytes == 0 { self.writable_bytes + 1 } else { 0 }
    }
}

/// A chain, understood. The data segments are in the vector that was given to [`parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Carry it out, then answer.
    Request(Operation, Answer),
    /// Answer with this status at once.
    Refused(Status, Answer),
    /// There is no place for a status: return the chain with length 0.
    Unanswerable,
}

/// What the disk allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Its length in bytes.
    pub disk_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Understands a chain. `segments` is emptied and then filled with the data part, in order.
pub fn parse(
    chain: impl Iterator<Item = Descriptor>,
    memory: &impl GuestMemoryBackend,
    limits: Limits,
    segments: &mut Vec<Segment>,
) -> Parsed {
    segments.clear();
    let Some(layout) = Layout::read(chain, memory, segments) else {
        return Parsed::Unanswerable;
    };
    let Layout { header, readable, writable_from, writable_bytes, in_order } = layout;
    let last = segments.last_mut().expect("a layout has a writable byte");
    let status_at = GuestAddress(last.address.0.wrapping_add(u64::from(last.bytes - 1)));
    last.bytes -= 1;
    if last.bytes == 0 {
        segments.pop();
    }
    let answer = Answer { status_at, writable_bytes: writable_bytes - 1 };
    let refuse = |status| Parsed::Refused(status, answer);
    let Some(header) = header.filter(|_| in_order) else {
        return refuse(Status::IoError);
    };
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
    let on_disk = |bytes: u32| {
        let offset = sector.checked_mul(SECTOR_BYTES as u64)?;
        let whole =
            bytes > 0 && (bytes as usize).is_multiple_of(SECTOR_BYTES) && bytes as usize <= DATA_BYTES_MAX;
        (whole && offset.checked_add(u64::from(bytes))? <= limits.disk_bytes).then_some(offset)
    };
    match u32_at(0) {
        VIRTIO_BLK_T_IN => {
            segments.drain(..writable_from);
            match on_disk(answer.writable_bytes) {
                Some(offset) => Parsed::Request(Operation::Read(offset), answer),
                None => refuse(Status::IoError),
            }
        }
        VIRTIO_BLK_T_OUT => {
            segments.truncate(writable_from);
            match on_disk(readable - HEADER_BYTES) {
                Some(offset) if !limits.read_only => Parsed::Request(Operation::Write(offset), answer),
                _ => refuse(Status::IoError),
            }
        }
        VIRTIO_BLK_T_FLUSH => Parsed::Request(Operation::Flush, answer),
        VIRTIO_BLK_T_GET_ID => {
            segments.drain(..writable_from);
            if answer.writable_bytes < VIRTIO_BLK_ID_BYTES {
                return refuse(Status::IoError);
            }
            Parsed::Request(Operation::GetId, answer)
        }
        _ => refuse(Status::Unsupported),
    }
}

/// The parts of a chain that has a place for the status.
struct Layout {
    /// `None`: too short, or not in guest memory.
    header: Option<[u8; HEADER_BYTES as usize]>,
    /// All readable bytes, those of the header included.
    readable: u32,
    /// Index of the first writable segment.
    writable_from: usize,
    /// All writable bytes, at least one.
    writable_bytes: u32,
    /// Nothing readable came after something writable (§2.7.4.2).
    in_order: bool,
}

impl Layout {
    /// Collects data segments (without the header) and lengths. `None`: the chain is broken, or nothing is writable.
    fn read(
        chain: impl Iterator<Item = Descriptor>,
        memory: &impl GuestMemoryBackend,
        segments: &mut Vec<Segment>,
    ) -> Option<Self> {
        let mut header = [0; HEADER_BYTES as usize];
        let mut header_sound = true;
        let mut layout =
            Self { header: None, readable: 0, writable_from: 0, writable_bytes: 0, in_order: true };
        let mut ended = false;
        let mut last_is_writable = false;
        for descriptor in chain {
            // The iterator ends early at whatever is wrong with a chain; a last descriptor that names a next one
            // tells. Sums cannot overflow: it ends where the chain exceeds 2^32 bytes.
            ended = !descriptor.has_next();
            let mut segment = Segment { address: descriptor.addr(), bytes: descriptor.len() };
            if segment.bytes == 0 {
                continue;
            }
            last_is_writable = descriptor.is_write_only();
            if last_is_writable {
                layout.writable_bytes += segment.bytes;
                segments.push(segment);
                continue;
            }
            layout.in_order &= layout.writable_bytes == 0;
            let have = layout.readable.min(HEADER_BYTES);
            layout.readable += segment.bytes;
            let take = segment.bytes.min(HEADER_BYTES - have);
            let part = &mut header[have as usize..(have + take) as usize];
            header_sound &= memory.read_slice(part, segment.address).is_ok();
            segment.address = GuestAddress(segment.address.0.wrapping_add(u64::from(take)));
            segment.bytes -= take;
            if segment.bytes > 0 {
                segments.push(segment);
            }
            if layout.writable_bytes == 0 {
                layout.writable_from = segments.len();
            }
        }
        layout.header = (header_sound && layout.readable >= HEADER_BYTES).then_some(header);
        (ended && last_is_writable).then_some(layout)
    }
}

#[cfg(test)]
mod tests;
