//! What is said on the checkpoint channel. `docs/link-protocol.md` describes it for other readers.

use std::io;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::link::PAYLOAD_BYTES_MAX;
use crate::memory::PAGE_BYTES;

/// Primary: checkpoint `epoch` begins, pause the SVM. Payload: the cause, UTF-8.
pub(super) const BEGIN: u16 = 2;
/// Primary: pages. Payload: their count (u32), their numbers (u64 each), their contents.
pub(super) const PAGES: u16 = 3;
/// Primary: the next piece of the device state.
pub(super) const DEVICES: u16 = 4;
/// Primary: everything has been sent. Payload: [`End`] as JSON.
pub(super) const END: u16 = 5;
/// Secondary: `epoch` is committed. From here on the death of the primary loses nothing of it.
pub(super) const COMMITTED: u16 = 6;
/// Secondary, with `--verify`: digests of its pages, in order. Payload: the first page's number (u64), u64 each.
pub(super) const DIGESTS: u16 = 7;
/// Primary, with `--verify`: the digests are equal, go on.
pub(super) const VERIFIED: u16 = 8;
/// Secondary: its VM runs again. Payload: `SecondarySteps` as JSON.
pub(super) const RESUMED: u16 = 9;
/// Either: protection ends in order. Payload: why, UTF-8.
pub(super) const GOODBYE: u16 = 10;

/// Secondary: it needs a checkpoint. Payload: the cause, a line feed, details; UTF-8.
pub(super) const WANTED: u16 = 11;

/// Secondary: it has claimed the next generation, and takes over once the primary has let go. No payload.
pub(super) const STEP_DOWN: u16 = 12;

/// Pages in one frame at most.
pub(super) const PAGES_MAX: usize = 256;
const _: () = assert!(4 + PAGES_MAX * (8 + PAGE_BYTES) <= PAYLOAD_BYTES_MAX);

/// Device state in one frame at most.
pub(super) const DEVICES_BYTES_MAX: usize = 1 << 20;

/// Device state of one checkpoint at most: a peer that sends more is broken.
pub(super) const STATE_BYTES_MAX: usize = 64 << 20;

/// What the secondary checks before it commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    /// Pages sent.
    pub(super) pages: u64,
    /// Bytes of device state sent.
    pub(super) device_bytes: u64,
    /// Digest over the page numbers in the order sent and the device state.
    pub(super) digest: u64,
    /// Whether the secondary has to send digests and wait for `VERIFIED`.
    pub(super) verify: bool,
}

/// Counts what goes over the channel in one checkpoint, on either side.
#[derive(Default)]
pub(super) struct Tally {
    pages: u64,
    device_bytes: u64,
    hash: Xxh3,
}

impl Tally {
    pub(super) fn pages(&mut self, numbers: &[u8]) {
        self.pages += numbers.len() as u64 / 8;
        self.hash.update(numbers);
    }

    pub(super) fn devices(&mut self, state: &[u8]) {
        self.device_bytes += state.len() as u64;
        self.hash.update(state);
    }

    pub(super) fn end(&self, verify: bool) -> End {
        End { pages: self.pages, device_bytes: self.device_bytes, digest: self.hash.digest(), verify }
    }
}

/// Splits the payload of a `PAGES` frame into numbers and contents.
pub(super) fn split_pages(payload: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a malformed frame of pages");
    let (count, rest) = payload.split_first_chunk::<4>().ok_or_else(malformed)?;
    let count = u32::from_be_bytes(*count) as usize;
    if count > PAGES_MAX || rest.len() != count * (8 + PAGE_BYTES) {
        return Err(malformed());
    }
    Ok(rest.split_at(count * 8))
}

/// The page numbers of a `PAGES` frame.
pub(super) fn page_numbers(numbers: &[u8]) -> impl Iterator<Item = u64> + '_ {
    numbers.chunks_exact(8).map(|bytes| u64::from_be_bytes(bytes.try_into().expect("8 bytes")))
}
