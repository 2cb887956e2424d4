//! One frame on a link: a fixed header with a checksum, then the payload.

use std::io::{self, IoSlice, Read, Write};

use xxhash_rust::xxh3::Xxh3;

/// Bytes of a frame's header on the wire.
pub const HEADER_BYTES: usize = 32;

/// No frame of any channel carries more than this; a longer one is malformed.
pub const PAYLOAD_BYTES_MAX: usize = 2 << 20;

const MAGIC: u32 = u32::from_be_bytes(*b"COLO");

/// The header of a frame. What `kind` means is the channel's own affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message this is, in the numbering of the channel.
    pub kind: u16,
    /// The epoch that the message belongs to, or a number that its kind defines.
    pub epoch: u64,
    /// Bytes of payload that follow.
    pub payload_bytes: u32,
    checksum: u64,
}

/// What makes a frame malformed. The link that carried it is closed.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream does not hold frames: another program is at the other end, or bytes were lost.
    #[error("The peer does not speak the COLO link protocol (magic {found:#010x})")]
    Magic {
        /// What stood in place of the magic number.
        found: u32,
    },
    /// Bytes that this version keeps zero are not.
    #[error("A frame has reserved bits set: the peer speaks another version, or the link corrupts data")]
    Reserved,
    /// A frame announces more payload than any frame has.
    #[error("A frame announces {bytes} bytes of payload, {PAYLOAD_BYTES_MAX} are the most")]
    TooLong {
        /// Announced payload.
        bytes: u32,
    },
    /// The checksum over header and payload does not match.
    #[error("A frame of kind {kind} has a wrong checksum: the link corrupts data")]
    Checksum {
        /// The frame's kind.
        kind: u16,
    },
    /// Reading or writing failed; an orderly close by the peer is `UnexpectedEof`.
    #[error("The link failed: {0}")]
    Io(#[from] io::Error),
}

impl Header {
    fn new(kind: u16, epoch: u64, payload: &[IoSlice<'_>]) -> Self {
        let payload_bytes: usize = payload.iter().map(|part| part.len()).sum();
        assert!(payload_bytes <= PAYLOAD_BYTES_MAX, "a frame of {payload_bytes} bytes");
        let mut header = Self { kind, epoch, payload_bytes: payload_bytes as u32, checksum: 0 };
        header.checksum = header.sum(payload);
        header
    }

    fn sum(&self, payload: &[IoSlice<'_>]) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(&self.to_bytes()[..HEADER_BYTES - 8]);
        for part in payload {
            hash.update(part);
        }
        hash.digest()
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.kind.to_be_bytes());
        // bytes 6..8 are reserved and zero
        bytes[8..12].copy_from_slice(&self.payload_bytes.to_be_bytes());
        // bytes 12..16 are reserved and zero
        bytes[16..24].copy_from_slice(&self.epoch.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.checksum.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if u32_at(0) != MAGIC {
            return Err(FrameError::Magic { found: u32_at(0) });
        }
        if bytes[6..8] != [0; 2] || bytes[12..16] != [0; 4] {
            return Err(FrameError::Reserved);
        }
        let header = Self {
            kind: u16::from_be_bytes([bytes[4], bytes[5]]),
            epoch: u64_at(16),
            payload_bytes: u32_at(8),
            checksum: u64_at(24),
        };
        if header.payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: header.payload_bytes });
        }
        Ok(header)
    }

    fn check(&self, payload: &[u8]) -> Result<(), FrameError> {
        if self.sum(&[IoSlice::new(payload)]) != self.checksum {
            return Err(FrameError::Checksum { kind: self.kind });
        }
        Ok(())
    }
}

/// Appends one frame to `out`, for a writer that does not block.
///
/// # Panics
/// When the payload is longer than [`PAYLOAD_BYTES_MAX`].
pub fn encode(kind: u16, epoch: u64, payload: &[&[u8]], out: &mut Vec<u8>) {
    let slices: Vec<IoSlice<'_>> = payload.iter().map(|part| IoSlice::new(part)).collect();
    out.extend_from_slice(&Header::new(kind, epoch, &slices).to_bytes());
    for part in payload {
        out.extend_from_slice(part);
    }
}

/// Writes one frame with as few system calls as the stream allows; the parts of the payload are not copied.
///
/// # Errors
/// What the writer says.
///
/// # Panics
/// When the payload is longer than [`PAYLOAD_BYTES_MAX`].
pub fn write_frame(writer: &mut impl Write, kind: u16, epoch: u64, payload: &[&[u8]]) -> io::Result<()> {
    let parts: Vec<IoSlice<'_>> = payload.iter().map(|part| IoSlice::new(part)).collect();
    let header = Header::new(kind, epoch, &parts).to_bytes();
    let mut all = Vec::with_capacity(parts.len() + 1);
    all.push(IoSlice::new(&header));
    all.extend(parts);
    let mut left = &mut all[..];
    while !left.is_empty() {
        match writer.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads one frame; its payload replaces what `payload` held.
///
/// # Errors
/// A malformed frame, or what the reader says.
pub fn read_frame(reader: &mut impl Read, payload: &mut Vec<u8>) -> Result<Header, FrameError> {
    let mut bytes = [0; HEADER_BYTES];
    reader.read_exact(&mut bytes)?;
    let header = Header::from_bytes(&bytes)?;
    payload.resize(header.payload_bytes as usize, 0);
    reader.read_exact(payload)?;
    header.check(payload)?;
    Ok(header)
}

/// Cuts a stream that is read without blocking into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Decoder {
    /// Reads once from `reader`. Returns the number of bytes; 0 is the end of the stream.
    ///
    /// # Errors
    /// What the reader says, `WouldBlock` included.
    pub fn fill(&mut self, reader: &mut impl Read) -> io::Result<usize> {
        const READ_BYTES: usize = 256 << 10;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        if self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.buffer.len() - self.end < READ_BYTES {
                self.buffer.resize(self.end + READ_BYTES, 0);
            }
        }
        let read = reader.read(&mut self.buffer[self.end..])?;
        self.end += read;
        Ok(read)
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// A malformed frame: the stream is unusable from here on.
    pub fn next_frame(&mut self) -> Result<Option<(Header, &[u8])>, FrameError> {
        let held = &self.buffer[self.start..self.end];
        let Some(bytes) = held.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::from_bytes(bytes)?;
        let frame_bytes = HEADER_BYTES + header.payload_bytes as usize;
        if held.len() < frame_bytes {
            return Ok(None);
        }
        let payload = self.start + HEADER_BYTES..self.start + frame_bytes;
        self.start += frame_bytes;
        let payload = &self.buffer[payload];
        header.check(payload)?;
        Ok(Some((header, payload)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            frames in prop::collection::vec((any::<u16>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..3000)), 1..20),
            cut in 1usize..5000,
        ) {
            let mut wire = Vec::new();
            for (kind, epoch, payload) in &frames {
                encode(*kind, *epoch, &[&payload[..payload.len() / 2], &payload[payload.len() / 2..]], &mut wire);
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.fill(&mut &piece[..]).unwrap();
                while let Some((header, payload)) = decoder.next_frame().unwrap() {
                    seen.push((header.kind, header.epoch, payload.to_vec()));
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn a_changed_byte_is_noticed(payload in prop::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut wire = Vec::new();
            write_frame(&mut wire, 7, 9, &[&payload]).unwrap();
            let at = at.index(wire.len());
            wire[at] ^= 1 << bit;
            let mut got = Vec::new();
            prop_assert!(read_frame(&mut &wire[..], &mut got).is_err());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.fill(&mut &bytes[..]).unwrap();
            while let Ok(Some(_)) = decoder.next_frame() {}
        }
    }
}
