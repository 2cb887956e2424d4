//! Patterns that say which bytes of a stream or datagram are not compared.
//!
//! Those bytes are replaced by one and the same before the two VMs' output is compared, by a machine that takes a stream
//! byte by byte and looks neither ahead nor back, so that segmentation cannot matter. As long as the two streams are the
//! same but for masked bytes, the machine goes through the same states on both: it depends on what is compared, and on
//! how many bytes are not.

use std::ops::Range;

use colo::config::policy::{Extent, Pattern};

/// The patterns of one rule.
#[derive(Debug)]
pub struct Mask {
    /// For each byte, the places of all prefixes that it fits: one bit a place, those of one prefix next to each other.
    fits: Box<[u128; 256]>,
    /// The bits of the first bytes of the prefixes.
    first: u128,
    /// The bits of the last ones.
    last: u128,
    /// The first bytes themselves.
    beginnings: Vec<u8>,
    /// In the order of the rule, and so in the order of their bits.
    behind: Vec<Behind>,
    /// Ranges from the start on, in order, apart from each other.
    fixed: Vec<Range<u64>>,
    /// What masked bytes become: in no delimiter.
    fill: u8,
}

/// What a prefix says of the bytes behind it.
#[derive(Debug)]
struct Behind {
    last: u128,
    skip: u16,
    extent: Extent,
    /// Where the search stands when the delimiter is complete, for a prefix may begin with it.
    then: Cursor,
}

/// How far a stream has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cursor {
    /// Prefixes are looked for: the bits of the places up to which one is here.
    Search(u128),
    /// Bytes behind a prefix that are compared.
    Skip { pattern: u8, left: u16 },
    /// Bytes that are not, and how much of the delimiter is here.
    Cover { pattern: u8, left: u16, delimited: u8 },
}

impl Default for Cursor {
    fn default() -> Self {
        Self::Search(0)
    }
}

/// A byte that is seen well where masked bytes are shown.
const FILL_PREFERRED: u8 = b'*';

impl Mask {
    /// Of patterns that the configuration has checked: their prefixes have no more than 128 bytes together.
    pub fn new(patterns: &[Pattern]) -> Self {
        let mut mask = Self {
            fits: Box::new([0; 256]),
            first: 0,
            last: 0,
            beginnings: Vec::new(),
            behind: Vec::new(),
            fixed: Vec::new(),
            fill: FILL_PREFERRED,
        };
        let mut bit = 1_u128;
        for pattern in patterns {
            match pattern {
                Pattern::At { offset, length } => {
                    let start = u64::from(*offset);
                    mask.fixed.push(start..start + u64::from(*length));
                }
                Pattern::After { prefix, skip, extent } => {
                    mask.first |= bit;
                    let mut last = bit;
                    for byte in prefix {
                        match byte {
                            Some(byte) => mask.fits[usize::from(*byte)] |= bit,
                            None => mask.fits.iter_mut().for_each(|fits| *fits |= bit),
                        }
                        (last, bit) = (bit, bit << 1);
                    }
                    mask.last |= last;
                    let then = Cursor::default();
                    mask.behind.push(Behind { last, skip: *skip, extent: extent.clone(), then });
                }
            }
        }
        mask.fixed = merged(mask.fixed);
        let begins = |byte: &u8| mask.fits[usize::from(*byte)] & mask.first != 0;
        mask.beginnings = (0..=u8::MAX).filter(begins).collect();
        let delimiters: Vec<u8> =
            mask.behind.iter().filter_map(Behind::delimiter).flatten().copied().collect();
        let free = |byte: &u8| !delimiters.contains(byte);
        // 16 delimiters of 15 bytes leave some
        mask.fill = std::iter::once(FILL_PREFERRED).chain(0..=u8::MAX).find(free).unwrap_or(FILL_PREFERRED);
        mask.follow_delimiters();
        mask
    }

    /// Finds out where the search stands behind each delimiter. Only a shorter one can be complete within another, behind a
    /// prefix that is there too.
    fn follow_delimiters(&mut self) {
        let length = |behind: &Behind| behind.delimiter().map_or(0, <[u8]>::len);
        let mut order: Vec<usize> = (0..self.behind.len()).collect();
        order.sort_by_key(|index| length(&self.behind[*index]));
        for index in order {
            let mut then = Cursor::default();
            for byte in self.behind[index].delimiter().unwrap_or_default() {
                self.step(&mut then, *byte);
            }
            self.behind[index].then = then;
        }
    }

    /// What masked bytes become.
    pub fn fill(&self) -> u8 {
        self.fill
    }

    /// Goes on through a stream and tells which of its next `bytes` are masked, as ranges in order. `at` is how many there
    /// were before them, if the start is known.
    pub(crate) fn cover(
        &self,
        cursor: &mut Cursor,
        at: Option<u64>,
        bytes: &[u8],
        mut masked: impl FnMut(Range<usize>),
    ) {
        let mut from = 0;
        if let Some(at) = at {
            let within = |position: u64| position.saturating_sub(at).min(bytes.len() as u64) as usize;
            for fixed in &self.fixed {
                let (start, end) = (within(fixed.start), within(fixed.end));
                if start < end {
                    self.search(cursor, bytes, from..start, &mut masked);
                    masked(start..end);
                    from = end;
                }
            }
        }
        self.search(cursor, bytes, from..bytes.len(), &mut masked);
    }

    fn search(
        &self,
        cursor: &mut Cursor,
        bytes: &[u8],
        within: Range<usize>,
        masked: &mut impl FnMut(Range<usize>),
    ) {
        let mut at = within.start;
        while at < within.end {
            if *cursor == Cursor::Search(0) {
                // most bytes begin no prefix
                match self.next_beginning(&bytes[at..within.end]) {
                    Some(skipped) => at += skipped,
                    None => return,
                }
            }
            let run = bytes[at..within.end].iter().take_while(|byte| self.step(cursor, **byte)).count();
            if run > 0 {
                masked(at..at + run);
            }
            // and the one behind, which is not masked
            at += run + 1;
        }
    }

    /// The first byte that may begin a prefix.
    fn next_beginning(&self, bytes: &[u8]) -> Option<usize> {
        match self.beginnings[..] {
            [] => None,
            [a] => memchr::memchr(a, bytes),
            [a, b] => memchr::memchr2(a, b, bytes),
            [a, b, c] => memchr::memchr3(a, b, c, bytes),
            _ => bytes.iter().position(|byte| self.fits[usize::from(*byte)] & self.first != 0),
        }
    }

    /// Takes the next byte. Whether it is masked.
    fn step(&self, cursor: &mut Cursor, byte: u8) -> bool {
        match *cursor {
            Cursor::Search(places) => {
                let places = (places << 1 | self.first) & self.fits[usize::from(byte)];
                *cursor = match places & self.last {
                    0 => Cursor::Search(places),
                    complete => self.found(complete),
                };
                false
            }
            Cursor::Skip { pattern, left } => {
                *cursor = match left {
                    1 => self.covers(pattern),
                    left => Cursor::Skip { pattern, left: left - 1 },
                };
                false
            }
            Cursor::Cover { pattern, left, delimited } => {
                let behind = &self.behind[usize::from(pattern)];
                let delimited = behind.delimited(delimited, byte);
                *cursor = match left {
                    _ if delimited > 0 && behind.is_delimiter(delimited) => behind.then,
                    1 => Cursor::default(),
                    left => Cursor::Cover { pattern, left: left - 1, delimited },
                };
                // what may be the delimiter is compared
                delimited == 0
            }
        }
    }

    /// Prefixes are complete: the first of them in the rule counts.
    fn found(&self, complete: u128) -> Cursor {
        let index = self.behind.iter().position(|behind| behind.last & complete != 0).unwrap_or(0);
        match self.behind[index].skip {
            0 => self.covers(index as u8),
            skip => Cursor::Skip { pattern: index as u8, left: skip },
        }
    }

    fn covers(&self, pattern: u8) -> Cursor {
        let (Extent::Bytes(left) | Extent::Until { max: left, .. }) =
            self.behind[usize::from(pattern)].extent;
        Cursor::Cover { pattern, left, delimited: 0 }
    }
}

impl Behind {
    fn delimiter(&self) -> Option<&[u8]> {
        match &self.extent {
            Extent::Until { delimiter, .. } => Some(delimiter),
            Extent::Bytes(_) => None,
        }
    }

    fn is_delimiter(&self, bytes: u8) -> bool {
        self.delimiter().is_some_and(|delimiter| delimiter.len() == usize::from(bytes))
    }

    /// How much of the delimiter is here when `before` of it were and `byte` follows.
    fn delimited(&self, before: u8, byte: u8) -> u8 {
        let Some(delimiter) = self.delimiter() else {
            return 0;
        };
        let before = &delimiter[..usize::from(before)];
        let fits =
            |kept: &usize| delimiter[*kept] == byte && delimiter[..*kept] == before[before.len() - kept..];
        (0..=before.len()).rev().find(fits).map_or(0, |kept| kept as u8 + 1)
    }
}

/// The same ranges in order, without overlaps.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(prefix: &str, skip: u16, extent: Extent) -> Pattern {
        Pattern::After {
            prefix: prefix.bytes().map(|byte| (byte != b'?').then_some(byte)).collect(),
            skip,
            extent,
        }
    }

    fn until(delimiter: &str, max: u16) -> Extent {
        Extent::Until { delimiter: delimiter.into(), max }
    }

    /// The stream with what is masked filled, taken in pieces of these sizes and then whole.
    fn masked(patterns: &[Pattern], stream: &[u8], pieces: &[usize]) -> Vec<u8> {
        let mask = Mask::new(patterns);
        let (mut cursor, mut at, mut out) = (Cursor::default(), 0, stream.to_vec());
        for piece in pieces.iter().copied().chain([stream.len()]) {
            let end = (at + piece).min(stream.len());
            mask.cover(&mut cursor, Some(at as u64), &stream[at..end], |range| {
                out[at + range.start..at + range.end].fill(mask.fill());
            });
            at = end;
        }
        out
    }

    fn told(patterns: &[Pattern], text: &str) -> String {
        String::from_utf8(masked(patterns, text.as_bytes(), &[])).unwrap()
    }

    #[test]
    fn bytes_behind_a_prefix_are_masked() {
        let date = [after("\r\nDate: ", 0, until("\r\n", 9))];
        assert_eq!(told(&date, "a\r\nDate: now\r\nb"), "a\r\nDate: ***\r\nb");
        assert_eq!(told(&date, "\r\nDate: 0123456789"), "\r\nDate: *********9");
        assert_eq!(told(&date, "\r\nDate: 012345678\r\n"), "\r\nDate: *********\r\n");
        // the delimiter of one is the beginning of the next
        assert_eq!(told(&date, "\r\nDate: a\r\nDate: b\r\n"), "\r\nDate: *\r\nDate: *\r\n");
        // what looks like it is compared
        assert_eq!(told(&date, "\r\nDate: a\rb\nc\r\nd"), "\r\nDate: *\r***\r\nd");
        assert_eq!(told(&[after("k", 2, Extent::Bytes(3))], "kabcdefk"), "kab***fk");
        assert_eq!(told(&[after("a?c", 0, Extent::Bytes(1))], "aaxcdabcab"), "aaxc*abc*b");
        assert_eq!(told(&[after("aab", 0, Extent::Bytes(1))], "aaaaabx"), "aaaaab*");
        let several = [after("bc", 0, Extent::Bytes(1)), after("abc", 0, Extent::Bytes(2))];
        assert_eq!(told(&several, "abcxy"), "abc*y");
    }

    #[test]
    fn bytes_at_a_place_are_masked() {
        let at = |offset, length| Pattern::At { offset, length };
        assert_eq!(told(&[at(4, 2), at(0, 1), at(5, 3)], "0123456789"), "*123****89");
        assert_eq!(told(&[at(2, 2), after("1", 0, Extent::Bytes(2))], "012345"), "01****");
        let mask = Mask::new(&[at(0, 1)]);
        mask.cover(&mut Cursor::default(), None, b"abc", |_| panic!("the start is unknown"));
        mask.cover(&mut Cursor::default(), Some(1), b"abc", |_| panic!("the start is over"));
    }

    #[test]
    fn a_masked_byte_becomes_none_of_a_delimiter() {
        assert_eq!(Mask::new(&[after("a", 0, until("*", 3))]).fill(), 0);
        assert_eq!(Mask::new(&[after("a", 0, until("\0*", 3))]).fill(), 1);
    }

    /// Patterns over few letters, so that they meet often.
    pub(crate) fn pattern() -> impl Strategy<Value = Pattern> {
        let extent = prop_oneof![
            (1u16..6).prop_map(Extent::Bytes),
            ("[abc]{1,3}", 1u16..6).prop_map(|(delimiter, max)| until(&delimiter, max)),
        ];
        prop_oneof![
            4 => ("[abcd][abc?]{0,3}", 0u16..3, extent).prop_map(|(prefix, skip, extent)| after(&prefix, skip, extent)),
            1 => (0u16..20, 1u16..5).prop_map(|(offset, length)| Pattern::At { offset, length }),
        ]
    }

    /// What the documentation says, said again without a machine: a list of all bytes and where they lead.
    fn by_the_book(patterns: &[Pattern], stream: &[u8]) -> Vec<u8> {
        let fixed = |at: usize| {
            patterns.iter().any(|pattern| {
                matches!(pattern, Pattern::At { offset, length }
                    if (usize::from(*offset)..usize::from(*offset + *length)).contains(&at))
            })
        };
        let rest: Vec<usize> = (0..stream.len()).filter(|at| !fixed(*at)).collect();
        let mut out: Vec<u8> =
            stream.iter().enumerate().map(|(at, byte)| if fixed(at) { b'*' } else { *byte }).collect();
        let text: Vec<u8> = rest.iter().map(|at| stream[*at]).collect();
        // prefixes are looked for in what has been read since `from`
        let (mut at, mut from) = (0, 0);
        while at < text.len() {
            at += 1;
            let found = patterns.iter().find_map(|pattern| match pattern {
                Pattern::After { prefix, skip, extent } => {
                    let read = &text[from..at];
                    let tail = read.len().checked_sub(prefix.len()).map(|start| &read[start..])?;
                    let fits =
                        tail.iter().zip(prefix).all(|(byte, place)| place.is_none_or(|place| place == *byte));
                    fits.then_some((*skip, extent))
                }
                Pattern::At { .. } => None,
            });
            let Some((skip, extent)) = found else { continue };
            at = (at + usize::from(skip)).min(text.len());
            let start = at;
            from = match extent {
                Extent::Bytes(length) => {
                    at = (at + usize::from(*length)).min(text.len());
                    (start..at).for_each(|masked| out[rest[masked]] = b'*');
                    at
                }
                Extent::Until { delimiter, max } => {
                    let most = (start + usize::from(*max)).min(text.len());
                    let mut ends = most;
                    let mut next = most;
                    while at < most {
                        at += 1;
                        let read = &text[start..at];
                        if read.ends_with(delimiter) {
                            (ends, next) = (at, at - delimiter.len());
                            break;
                        }
                        // a beginning of the delimiter stays
                        if !(1..delimiter.len()).any(|length| read.ends_with(&delimiter[..length])) {
                            out[rest[at - 1]] = b'*';
                        }
                    }
                    at = ends;
                    next
                }
            };
            if from < at {
                // the delimiter itself is read again, for what may begin there
                at = from;
            }
        }
        out
    }

    proptest! {
        #[test]
        fn segmentation_does_not_matter_and_the_book_is_followed(
            patterns in prop::collection::vec(pattern(), 1..6),
            stream in "[abcd]{0,60}",
            pieces in prop::collection::vec(0usize..7, 0..30),
        ) {
            let whole = masked(&patterns, stream.as_bytes(), &[]);
            prop_assert_eq!(&masked(&patterns, stream.as_bytes(), &pieces), &whole);
            let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            // a pattern that begins within a delimiter does not mask it
            let delimiters_hold_prefixes = patterns.iter().any(|one| matches!(one, Pattern::After { extent: Extent::Until { delimiter, .. }, .. }
                if patterns.iter().any(|other| matches!(other, Pattern::After { prefix, .. } if prefix.len() <= delimiter.len()))));
            if !delimiters_hold_prefixes {
                prop_assert_eq!(shown(&by_the_book(&patterns, stream.as_bytes())), shown(&whole));
            }
        }

        #[test]
        fn only_what_is_masked_may_differ(
            patterns in prop::collection::vec(pattern(), 1..4),
            stream in "[abcd]{1,60}",
            changed in any::<prop::sample::Index>(),
        ) {
            let whole = masked(&patterns, stream.as_bytes(), &[]);
            // a letter of no delimiter
            let other: Vec<u8> = stream
                .bytes()
                .zip(&whole)
                .map(|(byte, masked)| if *masked == b'*' { b'e' } else { byte })
                .collect();
            prop_assert_eq!(&masked(&patterns, &other, &[]), &whole);
            let at = changed.index(stream.len());
            if whole[at] != b'*' {
                let mut other = stream.into_bytes();
                other[at] = b'a' + (other[at] - b'a' + 1) % 4;
                let other = masked(&patterns, &other, &[]);
                prop_assert_eq!(&other[..at], &whole[..at]);
                prop_assert_ne!(other[at], whole[at]);
            }
        }
    }
}
