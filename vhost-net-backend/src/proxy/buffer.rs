//! Memory for one frame each, taken from a pool and given back to it, so that a frame is copied once on its way from the
//! guest to the LAN, however long it waits, and nothing is allocated for it.

use std::ops::{Deref, DerefMut};

use crate::offload::FrameHeader;

/// What a small buffer holds: a frame of an ordinary MTU.
const SMALL_BYTES: usize = 2048;
/// Buffers of either size that a pool keeps.
const SPARE_SMALL_MAX: usize = 4096;
const SPARE_LARGE_MAX: usize = 64;

/// The bytes of one frame, what it leaves to whoever gets it, and what else travels with it. In one pointer, for it is
/// moved often.
#[derive(Debug, Default)]
pub struct Buffer(Box<Content>);

#[derive(Debug, Default)]
struct Content {
    header: FrameHeader,
    /// As long as the longest frame that was here: never shortened, so that nothing is cleared twice.
    storage: Vec<u8>,
    /// Where the frame begins, behind what travels with it.
    start: usize,
    end: usize,
}

impl Buffer {
    /// What it leaves to whoever gets it.
    #[inline]
    pub fn header(&self) -> FrameHeader {
        self.0.header
    }

    /// From now on it leaves this.
    #[inline]
    pub fn set_header(&mut self, header: FrameHeader) {
        self.0.header = header;
    }

    /// Makes it so long. The content is arbitrary, and nothing travels with it.
    #[inline]
    pub fn resize(&mut self, bytes: usize) {
        if self.0.storage.len() < bytes {
            self.0.storage.resize(bytes, 0);
        }
        (self.0.start, self.0.end) = (0, bytes);
    }

    /// What travels with the frame and is no part of it.
    pub fn luggage(&self) -> &[u8] {
        &self.0.storage[..self.0.start]
    }
}

impl From<&[u8]> for Buffer {
    fn from(frame: &[u8]) -> Self {
        let header = FrameHeader::default();
        Self(Box::new(Content { header, storage: frame.to_vec(), start: 0, end: frame.len() }))
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self.0.header == other.0.header && **self == **other
    }
}

impl Eq for Buffer {}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.0.storage[self.0.start..self.0.end]
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0.storage[self.0.start..self.0.end]
    }
}

/// Buffers that are not in use.
#[derive(Debug, Default)]
pub struct Pool {
    small: Vec<Buffer>,
    large: Vec<Buffer>,
}

impl Pool {
    /// A buffer of so many bytes, of arbitrary content.
    #[inline]
    pub fn take(&mut self, bytes: usize) -> Buffer {
        let spare = if bytes <= SMALL_BYTES { &mut self.small } else { &mut self.large };
        let mut buffer = spare.pop().unwrap_or_default();
        buffer.resize(bytes);
        buffer.set_header(FrameHeader::default());
        buffer
    }

    /// A copy of `frame`.
    #[inline]
    pub fn copy_of(&mut self, frame: &[u8]) -> Buffer {
        let mut buffer = self.take(frame.len());
        buffer.copy_from_slice(frame);
        buffer
    }

    /// A copy of `frame` with which `luggage` travels.
    pub fn copy_with(&mut self, luggage: &[u8], frame: &[u8]) -> Buffer {
        let mut buffer = self.take(luggage.len() + frame.len());
        buffer[..luggage.len()].copy_from_slice(luggage);
        buffer[luggage.len()..].copy_from_slice(frame);
        buffer.0.start = luggage.len();
        buffer
    }

    /// Takes a buffer back.
    #[inline]
    pub fn give(&mut self, buffer: Buffer) {
        let (spare, max) = if buffer.0.storage.len() <= SMALL_BYTES {
            (&mut self.small, SPARE_SMALL_MAX)
        } else {
            (&mut self.large, SPARE_LARGE_MAX)
        };
        if spare.len() < max {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again() {
        let mut pool = Pool::default();
        let small = pool.copy_of(&[1; 60]);
        assert_eq!(&small[..], [1; 60]);
        let place = small.as_ptr();
        pool.give(small);
        let large = pool.take(9000);
        assert_ne!(large.as_ptr(), place);
        assert_eq!(large.len(), 9000);
        pool.give(large);
        let shorter = pool.copy_of(&[2; 50]);
        assert_eq!((shorter.as_ptr(), &shorter[..]), (place, &[2; 50][..]));
    }

    #[test]
    fn what_travels_with_a_frame_is_no_part_of_it() {
        let mut pool = Pool::default();
        let mut buffer = pool.copy_with(&[7; 12], &[1; 60]);
        buffer[0] = 9;
        assert_eq!((buffer.luggage(), buffer.len(), buffer[0]), (&[7; 12][..], 60, 9));
        pool.give(buffer);
        assert!(pool.copy_of(&[3; 10]).luggage().is_empty());
    }
}
