//! A TCP stream by position: which bytes are settled, and the SVM's bytes that wait to be compared.
//!
//! Positions are sequence numbers unwrapped to 64 bits, so that order is plain order.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use smallvec::SmallVec;

/// Turns 32-bit sequence numbers into positions. It follows the stream, which must not jump by 2 GiB or more.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Anchor(Option<NonZeroU64>);

impl Anchor {
    /// Begins at `seq`. Room is left below it, for what was sent earlier.
    pub(super) fn at(seq: u32) -> Self {
        Self(NonZeroU64::new((1 << 32) | u64::from(seq)))
    }

    /// The position nearest to the anchor that has this sequence number; the first one asked for becomes the anchor.
    pub(super) fn place(&mut self, seq: u32) -> u64 {
        let anchor = match self.0 {
            Some(anchor) => anchor.get(),
            None => {
                *self = Self::at(seq);
                (1 << 32) | u64::from(seq)
            }
        };
        let distance = seq.wrapping_sub(anchor as u32).cast_signed();
        anchor.saturating_add_signed(i64::from(distance))
    }

    /// Moves on to `position` if that is ahead.
    pub(super) fn advance(&mut self, position: u64) {
        if self.0.is_none_or(|anchor| position > anchor.get()) {
            self.0 = NonZeroU64::new(position);
        }
    }
}

/// A set of positions as ranges, most often one. It may forget its lowest ones: that costs a comparison, nothing else.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges(SmallVec<[(u64, u64); 1]>);

/// More separate ranges than this are not remembered.
const RANGES_MAX: usize = 64;

impl Ranges {
    pub(super) fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let [only] = &mut self.0[..]
            && start <= only.1
            && end >= only.0
        {
            *only = (only.0.min(start), only.1.max(end));
            return;
        }
        let first = self.0.partition_point(|range| range.1 < start);
        let behind = self.0.partition_point(|range| range.0 <= end);
        let merged = match self.0.get(first..behind) {
            Some([only]) => (only.0.min(start), only.1.max(end)),
            Some([lowest, .., highest]) => (lowest.0.min(start), highest.1.max(end)),
            _ => (start, end),
        };
        self.0.drain(first..behind.max(first));
        self.0.insert(first, merged);
        if self.0.len() > RANGES_MAX {
            self.0.remove(0);
        }
    }

    /// The first stretch of `start..end` that is not in the set.
    pub(super) fn first_gap(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let next = match &self.0[..] {
            [only] => usize::from(only.1 <= start),
            ranges => ranges.partition_point(|range| range.1 <= start),
        };
        let (start, next) = match self.0.get(next) {
            Some(range) if range.0 <= start => (range.1, self.0.get(next + 1)),
            other => (start, other),
        };
        let end = next.map_or(end, |range| range.0.min(end));
        (start < end).then_some((start, end))
    }
}

/// How far bytes agree with those in a [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    /// To the end.
    Whole,
    /// So many; the next one is not there yet.
    Until(usize),
    /// So many; the next one differs and is this one in the store.
    Differs(usize, u8),
}

/// Bytes at positions, each at most once.
#[derive(Debug, Default)]
pub(super) struct Store {
    /// In order, none empty, none overlapping.
    chunks: VecDeque<Chunk>,
    bytes: usize,
}

/// A chunk shorter than this takes what follows on it.
const CHUNK_GROWS_BELOW: usize = 16 << 10;
/// Bytes that a chunk costs beside its own.
const CHUNK_COST: usize = 64;

#[derive(Debug)]
struct Chunk {
    start: u64,
    bytes: Vec<u8>,
    /// Bytes at the front that are gone already.
    gone: usize,
}

impl Chunk {
    fn first(&self) -> u64 {
        self.start + self.gone as u64
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn left(&self) -> &[u8] {
        &self.bytes[self.gone..]
    }
}

impl Store {
    /// About how much memory it takes, so that many small pieces count as what they are.
    pub(super) fn cost(&self) -> usize {
        self.bytes + self.chunks.len() * CHUNK_COST
    }

    /// The position behind the highest byte.
    pub(super) fn end(&self) -> Option<u64> {
        self.chunks.back().map(Chunk::end)
    }

    /// Adds `bytes` from `start` on; where there is one already, the old one stays.
    pub(super) fn insert(&mut self, mut start: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let behind = self.chunks.partition_point(|chunk| chunk.end() <= start);
            let next = self.chunks.get(behind).map_or(u64::MAX, Chunk::first);
            if next <= start {
                let covered = (self.chunks[behind].end() - start).min(bytes.len() as u64);
                start += covered;
                bytes = &bytes[covered as usize..];
                continue;
            }
            let piece = (next - start).min(bytes.len() as u64) as usize;
            match behind.checked_sub(1).and_then(|before| self.chunks.get_mut(before)) {
                Some(chunk) if chunk.end() == start && chunk.bytes.len() < CHUNK_GROWS_BELOW => {
                    chunk.bytes.extend_from_slice(&bytes[..piece]);
                }
                _ => self.chunks.insert(behind, Chunk { start, bytes: bytes[..piece].to_vec(), gone: 0 }),
            }
            self.bytes += piece;
            start += piece as u64;
            bytes = &bytes[piece..];
        }
    }

    /// How far `bytes`, which stand at `start`, agree with what is here.
    pub(super) fn agreement(&self, start: u64, bytes: &[u8]) -> Agreement {
        let first = self.chunks.partition_point(|chunk| chunk.end() <= start);
        let mut done = 0;
        for chunk in self.chunks.range(first..) {
            if done == bytes.len() {
                break;
            }
            let position = start + done as u64;
            if chunk.first() > position {
                return Agreement::Until(done);
            }
            let theirs = &chunk.bytes[(position - chunk.start) as usize..];
            let length = theirs.len().min(bytes.len() - done);
            let ours = &bytes[done..done + length];
            if ours != &theirs[..length] {
                let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
                return Agreement::Differs(done + same, theirs[same]);
            }
            done += length;
        }
        if done == bytes.len() { Agreement::Whole } else { Agreement::Until(done) }
    }

    /// The bytes that stand next to each other from `start` on, at most so many.
    pub(super) fn copy(&self, start: u64, bytes_max: usize) -> Vec<u8> {
        let first = self.chunks.partition_point(|chunk| chunk.end() <= start);
        let mut copy = Vec::new();
        for chunk in self.chunks.range(first..) {
            let position = start + copy.len() as u64;
            if chunk.first() > position || copy.len() == bytes_max {
                break;
            }
            let bytes = &chunk.bytes[(position - chunk.start) as usize..];
            copy.extend_from_slice(&bytes[..bytes.len().min(bytes_max - copy.len())]);
        }
        copy
    }

    /// Takes the bytes in `start..end` out.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        if self.chunks.is_empty() {
            return;
        }
        let mut index = self.chunks.partition_point(|chunk| chunk.end() <= start);
        while let Some(chunk) = self.chunks.get_mut(index) {
            if chunk.first() >= end {
                break;
            }
            let before = chunk.left().len();
            let (first, last) = (chunk.first(), chunk.end());
            if start <= first && end >= last {
                self.chunks.remove(index);
                self.bytes -= before;
                continue;
            }
            if start <= first {
                chunk.gone = (end - chunk.start) as usize;
                self.bytes -= before - chunk.left().len();
                break;
            }
            // the front part stays; what lies behind the hole becomes a chunk of its own
            let tail = (end < last).then(|| chunk.bytes[(end - chunk.start) as usize..].to_vec());
            chunk.bytes.truncate((start - chunk.start) as usize);
            self.bytes -= before - chunk.left().len();
            index += 1;
            if let Some(bytes) = tail {
                self.bytes += bytes.len();
                self.chunks.insert(index, Chunk { start: end, bytes, gone: 0 });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn positions_follow_the_stream_over_the_wrap() {
        let mut anchor = Anchor::default();
        let first = anchor.place(0xffff_fff0);
        assert_eq!(anchor.place(0x10), first + 0x20);
        assert_eq!(anchor.place(0xffff_ff00), first - 0xf0);
        anchor.advance(first + 0x20);
        anchor.advance(first);
        assert_eq!(anchor.place(0x7000_0010), first + 0x20 + 0x7000_0000);
        assert_eq!(Anchor::at(5).place(4), (1 << 32) | 4);
    }

    proptest! {
        #[test]
        fn ranges_are_a_set_of_positions(
            ranges in prop::collection::vec((0u64..200, 0u64..20), 0..30),
            asked in (0u64..220, 0u64..40),
        ) {
            let mut set = Ranges::default();
            let mut model = BTreeSet::new();
            for (start, length) in ranges {
                set.insert(start, start + length);
                model.extend(start..start + length);
            }
            let (start, end) = (asked.0, asked.0 + asked.1);
            let first = (start..end).find(|position| !model.contains(position));
            let gap = first.map(|first| {
                (first, (first..end).find(|position| model.contains(position)).unwrap_or(end))
            });
            prop_assert_eq!(set.first_gap(start, end), gap);
        }

        #[test]
        fn a_store_is_a_map_from_position_to_byte(
            steps in prop::collection::vec(
                (any::<bool>(), 0u64..100, prop::collection::vec(0u8..3, 0..20)),
                0..40,
            ),
            asked in (0u64..110, prop::collection::vec(0u8..3, 0..20)),
        ) {
            let mut store = Store::default();
            let mut model = BTreeMap::new();
            for (add, start, bytes) in steps {
                let end = start + bytes.len() as u64;
                if add {
                    store.insert(start, &bytes);
                    for (position, byte) in (start..).zip(bytes) {
                        model.entry(position).or_insert(byte);
                    }
                } else {
                    store.remove(start, end);
                    model.retain(|position, _| !(start..end).contains(position));
                }
                prop_assert_eq!(store.bytes, model.len());
                prop_assert_eq!(store.end(), model.keys().next_back().map(|last| last + 1));
            }
            let mut expected = Agreement::Whole;
            for (index, byte) in asked.1.iter().enumerate() {
                match model.get(&(asked.0 + index as u64)) {
                    Some(theirs) if theirs == byte => continue,
                    Some(theirs) => expected = Agreement::Differs(index, *theirs),
                    None => expected = Agreement::Until(index),
                }
                break;
            }
            prop_assert_eq!(store.agreement(asked.0, &asked.1), expected);
            let there: Vec<u8> = (asked.0..asked.0 + 9).map_while(|position| model.get(&position).copied()).collect();
            prop_assert_eq!(store.copy(asked.0, 9), there);
        }
    }
}
