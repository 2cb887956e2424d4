//! Pieces of the SVM's stream of which only digests are here. Each is compared when the PVM has said the whole of it.

use std::collections::VecDeque;

use super::stream::Ranges;
use crate::digest::{Key, Range};

/// Pieces before a position that are looked at for one that reaches over it: senders do not let them overlap.
const OVERLAPPING_MAX: usize = 4;

/// What the pieces at a position say of the PVM's stream from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// The same, up to this position.
    Same(u64),
    /// Nothing: no piece reaches over the position.
    Nothing,
    /// The PVM has not said the whole piece yet: the bytes are needed if it does not go on.
    Short {
        /// Where the piece ends.
        end: u64,
        /// That has been told before.
        known: bool,
    },
    /// The bytes from the position on are needed: the PVM's differ, or have gone in part.
    Bytes {
        /// Where the piece ends.
        end: u64,
        /// That has been told before.
        known: bool,
    },
}

/// What has been told about the bytes of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Quiet,
    /// They are needed if the PVM does not go on.
    Short,
    /// They are needed.
    Asked,
}

#[derive(Debug)]
struct Piece {
    start: u64,
    bytes: u16,
    state: State,
    digest: u64,
    /// The PVM's bytes, as far as they have been seen.
    seen: Range,
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + u64::from(self.bytes)
    }

    /// Takes in what the PVM says from where it ended last.
    fn see<'a>(&mut self, key: &Key, said: impl Iterator<Item = Said<'a>>) {
        for Said { at, bytes } in said {
            let (next, end) = (self.start + self.seen.bytes() as u64, at + bytes.len() as u64);
            if next == self.end() {
                break;
            }
            if at <= next && next <= end {
                let to = end.min(self.end());
                self.seen.extend(key, &bytes[(next - at) as usize..(to - at) as usize]);
            }
        }
    }

    fn needs_bytes(&mut self) -> Finding {
        let known = self.state == State::Asked;
        self.state = State::Asked;
        Finding::Bytes { end: self.end(), known }
    }
}

/// A segment of the PVM that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said<'a> {
    /// Position of its first byte.
    pub(super) at: u64,
    pub(super) bytes: &'a [u8],
}

/// All pieces of a stream, by where they start.
#[derive(Debug, Default)]
pub(super) struct Pending(VecDeque<Piece>);

impl Pending {
    /// About how much memory it takes.
    pub(super) fn cost(&self) -> usize {
        self.0.len() * size_of::<Piece>()
    }

    /// Whether a piece reaches beyond this position.
    pub(super) fn reaches_beyond(&self, position: u64) -> bool {
        self.0.back().is_some_and(|piece| piece.end() > position)
    }

    /// Adds a piece; one that is here already stays as it is.
    pub(super) fn insert(&mut self, start: u64, bytes: u16, digest: u64) {
        let place = |piece: &Piece| (piece.start, piece.bytes);
        let index = match self.0.back() {
            Some(last) if place(last) >= (start, bytes) => {
                self.0.partition_point(|piece| place(piece) < (start, bytes))
            }
            _ => self.0.len(),
        };
        if self.0.get(index).is_none_or(|piece| place(piece) != (start, bytes)) {
            let seen = Range::at(start as u32);
            self.0.insert(index, Piece { start, bytes, state: State::Quiet, digest, seen });
        }
    }

    /// Drops pieces that are settled, in order up to the first that is not.
    pub(super) fn remove_settled(&mut self, settled: &Ranges) {
        while let Some(first) = self.0.front()
            && settled.first_gap(first.start, first.end()).is_none()
        {
            self.0.pop_front();
        }
    }

    /// Compares what the PVM says from `position` on, given what waits of it in order.
    pub(super) fn compare<'a>(
        &mut self,
        position: u64,
        key: &Key,
        said: &(impl Iterator<Item = Said<'a>> + Clone),
    ) -> Finding {
        let first = self.0.partition_point(|piece| piece.start < position);
        let mut finding = Finding::Nothing;
        for piece in self.0.range_mut(first..).take_while(|piece| piece.start == position) {
            piece.see(key, said.clone());
            if piece.seen.bytes() < usize::from(piece.bytes) {
                let known = piece.state != State::Quiet;
                if !known {
                    piece.state = State::Short;
                }
                return Finding::Short { end: piece.end(), known };
            }
            if piece.seen.digest(key) == piece.digest {
                return Finding::Same(piece.end());
            }
            finding = piece.needs_bytes();
        }
        if finding == Finding::Nothing {
            // the PVM's bytes that stood at its beginning are not here any more
            let mut before = self.0.range_mut(..first).rev().take(OVERLAPPING_MAX);
            if let Some(piece) = before.find(|piece| piece.end() > position) {
                finding = piece.needs_bytes();
            }
        }
        finding
    }

    /// Whether the piece at `position` is to be asked for now, as it was to be soon. Where it ends, then.
    pub(super) fn ask_now(&mut self, position: u64) -> Option<u64> {
        let first = self.0.partition_point(|piece| piece.start < position);
        let mut here = self.0.range_mut(first..).take_while(|piece| piece.start == position);
        let piece = here.find(|piece| piece.state == State::Short)?;
        piece.state = State::Asked;
        Some(piece.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Box<Key> {
        Key::new(0x0fed_cba9_8765_4321).unwrap()
    }

    fn byte(position: u64) -> u8 {
        (position * 7 % 251) as u8
    }

    fn bytes(from: u64, to: u64) -> Vec<u8> {
        (from..to).map(byte).collect()
    }

    fn pending(pieces: &[(u64, u64)]) -> Pending {
        let mut pending = Pending::default();
        for (start, end) in pieces {
            let digest = key().digest(*start as u32, &bytes(*start, *end));
            pending.insert(*start, (end - start) as u16, digest);
        }
        pending
    }

    fn compare(pending: &mut Pending, position: u64, said: &[(u64, u64)]) -> Finding {
        let said: Vec<_> = said.iter().map(|(from, to)| (*from, bytes(*from, *to))).collect();
        pending.compare(position, &key(), &said.iter().map(|(at, bytes)| Said { at: *at, bytes }))
    }

    #[test]
    fn a_piece_is_compared_when_all_of_it_is_said() {
        let mut pending = pending(&[(1001, 1100), (1100, 1200)]);
        assert_eq!(compare(&mut pending, 1000, &[(1000, 1001)]), Finding::Nothing);
        let short = |known| Finding::Short { end: 1100, known };
        assert_eq!(compare(&mut pending, 1001, &[(1000, 1050)]), short(false));
        assert_eq!(compare(&mut pending, 1001, &[(1000, 1050), (1060, 1099)]), short(true), "a hole");
        assert_eq!(compare(&mut pending, 1001, &[(1000, 1050), (1050, 1060)]), short(true));
        // what was seen once need not be said again
        assert_eq!(compare(&mut pending, 1001, &[(1060, 1200)]), Finding::Same(1100));
        assert_eq!(compare(&mut pending, 1100, &[(1060, 1200)]), Finding::Same(1200));
        let mut settled = Ranges::default();
        settled.insert(1001, 1150);
        pending.remove_settled(&settled);
        assert!(pending.cost() > 0 && pending.reaches_beyond(1199) && !pending.reaches_beyond(1200));
        settled.insert(1150, 1200);
        pending.remove_settled(&settled);
        assert_eq!(pending.cost(), 0);
    }

    #[test]
    fn what_does_not_go_on_is_asked_for_once() {
        let mut pending = pending(&[(0, 100)]);
        assert_eq!(pending.ask_now(0), None, "nobody waits for it");
        compare(&mut pending, 0, &[(0, 50)]);
        assert_eq!(pending.ask_now(0), Some(100));
        assert_eq!(pending.ask_now(0), None);
        assert_eq!(compare(&mut pending, 0, &[(0, 60)]), Finding::Short { end: 100, known: true });
    }

    #[test]
    fn of_pieces_that_overlap_the_one_that_is_said_counts() {
        // in any order, and each once
        let mut pending = pending(&[(100, 200), (0, 150), (0, 100), (0, 150)]);
        assert_eq!(pending.0.len(), 3);
        assert_eq!(compare(&mut pending, 0, &[(0, 120)]), Finding::Same(100));
        let mut settled = Ranges::default();
        settled.insert(0, 100);
        pending.remove_settled(&settled);
        assert_eq!(compare(&mut pending, 100, &[(100, 200)]), Finding::Same(200));
        settled.insert(100, 120);
        let begun = Finding::Bytes { end: 200, known: false };
        assert_eq!(compare(&mut pending, 120, &[(100, 200)]), begun, "its beginning has gone");
    }

    #[test]
    fn bytes_that_differ_are_asked_for_once() {
        let mut pending = Pending::default();
        pending.insert(0, 100, 12345);
        assert_eq!(compare(&mut pending, 0, &[(0, 100)]), Finding::Bytes { end: 100, known: false });
        assert_eq!(compare(&mut pending, 0, &[(0, 100)]), Finding::Bytes { end: 100, known: true });
    }
}
