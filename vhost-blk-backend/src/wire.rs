//! What the two block back ends say to each other: frames on the block link.
//!
//! Primary to secondary: WRITE and MARKER. Secondary to primary: APPLIED, by which the primary limits what is under
//! way to [`WINDOW_BYTES`]. The limit is what lets a secondary whose buffer is full go on reading until it sees the
//! marker that will empty the buffer, in bounded memory.

use colo::link::Header;

use crate::block_buffer::SECTOR_BYTES;
use crate::request::DATA_BYTES_MAX;

/// The most bytes of writes that the primary lets be under way to the secondary's disk.
pub const WINDOW_BYTES: u64 = 32 << 20;

/// The most bytes of data in one WRITE frame; a longer write takes several.
pub const WRITE_BYTES_MAX: usize = 1 << 20;

const WRITE: u16 = 1;
const MARKER: u16 = 2;
const APPLIED: u16 = 3;

const _: () = assert!(DATA_BYTES_MAX as u64 <= WINDOW_BYTES);

/// A frame on the block link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Write `data` at `offset`. The frame's epoch is the one that is running.
    Write {
        /// Bytes from the start of the disk, a multiple of a sector.
        offset: u64,
        /// Whole sectors, at least one.
        data: &'a [u8],
    },
    /// All writes of the frame's epoch have been sent.
    Marker,
    /// So many bytes of writes have been taken off the link and applied, since the link was attached.
    Applied {
        /// The sum.
        bytes: u64,
    },
}

/// Why a frame is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No such kind.
    #[error("The peer sent a block frame of unknown kind {0}: it runs another version")]
    Kind(u16),
    /// The payload does not fit the kind.
    #[error(
        "The peer sent a block frame of kind {kind} with a payload of {bytes} bytes, which it cannot have"
    )]
    Payload {
        /// Its kind.
        kind: u16,
        /// Its payload.
        bytes: usize,
    },
    /// Not on a sector boundary.
    #[error("The peer sent a write at byte {0}, which is no sector boundary")]
    Offset(u64),
}

impl<'a> Message<'a> {
    /// Understands a frame.
    ///
    /// # Errors
    /// It is none of ours or malformed.
    pub fn parse(header: &Header, payload: &'a [u8]) -> Result<Self, WireError> {
        let malformed = WireError::Payload { kind: header.kind, bytes: payload.len() };
        match header.kind {
            WRITE => {
                let (offset, data) = payload.split_first_chunk().ok_or(malformed)?;
                let offset = u64::from_be_bytes(*offset);
                if data.is_empty() || data.len() > WRITE_BYTES_MAX || !data.len().is_multiple_of(SECTOR_BYTES)
                {
                    return Err(malformed);
                }
                if !offset.is_multiple_of(SECTOR_BYTES as u64) {
                    return Err(WireError::Offset(offset));
                }
                Ok(Self::Write { offset, data })
            }
            MARKER if payload.is_empty() => Ok(Self::Marker),
            APPLIED => {
                let bytes = payload.try_into().map_err(|_| malformed)?;
                Ok(Self::Applied { bytes: u64::from_be_bytes(bytes) })
            }
            MARKER => Err(malformed),
            kind => Err(WireError::Kind(kind)),
        }
    }

    /// Sends the message as one frame.
    ///
    /// # Errors
    /// What the stream says.
    pub fn send(&self, stream: &mut impl std::io::Write, epoch: u64) -> std::io::Result<()> {
        match self {
            Self::Write { offset, data } => {
                colo::link::write_frame(stream, WRITE, epoch, &[&offset.to_be_bytes(), data])
            }
            Self::Marker => colo::link::write_frame(stream, MARKER, epoch, &[]),
            Self::Applied { bytes } => {
                colo::link::write_frame(stream, APPLIED, epoch, &[&bytes.to_be_bytes()])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use colo::link::{read_frame, write_frame};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let data = [7; 2 * SECTOR_BYTES];
        for message in [
            Message::Write { offset: 5 << 9, data: &data },
            Message::Marker,
            Message::Applied { bytes: u64::MAX },
        ] {
            let mut wire = Vec::new();
            message.send(&mut wire, 3).unwrap();
            let mut payload = Vec::new();
            let header = read_frame(&mut &wire[..], &mut payload).unwrap();
            assert_eq!((header.epoch, Message::parse(&header, &payload)), (3, Ok(message)));
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_refused(kind in 0u16..6, mut payload in prop::collection::vec(any::<u8>(), 0..2000), grow in 0usize..3) {
            payload.resize(payload.len() + grow * WRITE_BYTES_MAX, 0);
            payload.truncate(colo::link::PAYLOAD_BYTES_MAX);
            let mut wire = Vec::new();
            write_frame(&mut wire, kind, 1, &[&payload]).unwrap();
            let mut got = Vec::new();
            let header = read_frame(&mut &wire[..], &mut got).unwrap();
            match Message::parse(&header, &got) {
                Ok(Message::Write { offset, data }) => {
                    prop_assert!(offset % 512 == 0 && data.len() % 512 == 0 && (512..=WRITE_BYTES_MAX).contains(&data.len()));
                }
                Ok(Message::Marker) => prop_assert!(got.is_empty()),
                Ok(Message::Applied { .. }) => prop_assert_eq!(got.len(), 8),
                Err(_) => {}
            }
        }
    }
}
