//! Random choices that a printed seed repeats.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

/// A number nobody foresees.
pub fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// A sequence of choices (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The sequence of the seed in the environment variable `COLO_TEST_SEED`, else a random one. Says which.
    pub fn announced() -> Self {
        let given = std::env::var("COLO_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| random() % 1_000_000);
        println!("COLO_TEST_SEED={seed}");
        Self::new(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number of the range, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// Data of which no two places are the same, a multiple of eight bytes.
    pub fn bytes(&mut self, bytes: usize) -> Vec<u8> {
        (0..bytes / 8).flat_map(|_| self.next().to_ne_bytes()).collect()
    }

    /// One of several.
    ///
    /// # Panics
    /// When there is none.
    pub fn one_of<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        &things[self.next() as usize % things.len()]
    }
}
