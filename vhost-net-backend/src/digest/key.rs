//! The hash: a polynomial with a secret point, over the field of 2^61 − 1 elements.
//!
//! A stream is cut into words of four bytes where its positions are divisible by four, wherever a range begins; a word
//! counts as the little-endian number that it is, with zeros in place of bytes outside of the range. The value of a
//! range is the sum of its words, the *i*-th times the *i*-th power of the secret key. So what ranges that follow on each
//! other come to can be put together: `value(ab) = value(a) + key^w · value(b)`, where *w* words lie between where the
//! two begin. The length, by which ranges that differ in zeros at their end are told apart, comes in last:
//! `digest = length + key · value`.
//!
//! Two ranges of the same beginning and of at most *n* bytes that differ have the same digest for no more than
//! *n*/4 + 2 of all keys: the difference of their digests is a polynomial in the key of that degree, which is not zero.
//! That is less than 2^-52 for a segment of 1448 bytes, and 2^-46 for the longest range. Whoever does not know the key
//! cannot do better: neither a guest nor a client ever sees it, or a digest.

use std::fmt;

/// The field's order, a Mersenne prime.
pub const PRIME: u64 = (1 << 61) - 1;

/// Bytes of a word.
const WORD: usize = 4;
/// Words whose powers stand in a table that stays in the first-level cache.
const BLOCK_WORDS: usize = 512;
/// Bytes of them.
const BLOCK_BYTES: usize = BLOCK_WORDS * WORD;
/// No range is longer, in bytes.
pub const RANGE_BYTES_MAX: usize = 1 << 16;

/// Powers of a whole block of words that the longest range needs, with the first.
const BLOCKS: usize = RANGE_BYTES_MAX / BLOCK_BYTES + 1;

/// The secret of one link, with its powers.
#[derive(Clone)]
pub struct Key {
    /// The powers 0 to 511.
    small: [u64; BLOCK_WORDS],
    /// The powers that are multiples of 512, as far as the longest range needs them.
    large: [u64; BLOCKS],
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// Any number below 2^122, as an element.
fn reduce(number: u128) -> u64 {
    let folded = (number as u64 & PRIME) + (number >> 61) as u64;
    let folded = (folded & PRIME) + (folded >> 61);
    if folded >= PRIME { folded - PRIME } else { folded }
}

fn multiply(a: u64, b: u64) -> u64 {
    reduce(u128::from(a) * u128::from(b))
}

fn add(a: u64, b: u64) -> u64 {
    reduce(u128::from(a) + u128::from(b))
}

/// The little-endian number that up to four bytes are.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

impl Key {
    /// The key that `number` is; `None` unless it is between 1 and 2^61 − 2.
    pub fn new(number: u64) -> Option<Box<Self>> {
        if number == 0 || number >= PRIME {
            return None;
        }
        let mut key = Box::new(Self { small: [1; BLOCK_WORDS], large: [1; BLOCKS] });
        for power in 1..BLOCK_WORDS {
            key.small[power] = multiply(key.small[power - 1], number);
        }
        let block = multiply(key.small[BLOCK_WORDS - 1], number);
        for power in 1..key.large.len() {
            key.large[power] = multiply(key.large[power - 1], block);
        }
        Some(key)
    }

    /// The number that it was made from.
    pub fn number(&self) -> u64 {
        self.small[1]
    }

    /// The key to the power of `words`, which are no more than the longest range touches.
    fn power(&self, words: usize) -> u64 {
        multiply(self.small[words % BLOCK_WORDS], self.large[words / BLOCK_WORDS])
    }

    /// The value of bytes that begin with a whole word.
    fn aligned_value(&self, bytes: &[u8]) -> u64 {
        let blocks = bytes.chunks(BLOCK_BYTES).zip(&self.large);
        blocks.fold(0, |value, (block, power)| add(value, multiply(self.block_value(block), *power)))
    }

    /// The value of a block. Its 512 products of less than 2^93 each are added up without reducing one.
    fn block_value(&self, block: &[u8]) -> u64 {
        let (fours, rest) = block.as_chunks::<{ 4 * WORD }>();
        let (powers, _) = self.small.as_chunks::<4>();
        // four sums, so that none waits for another
        let mut sums = [0u128; 4];
        for (four, powers) in fours.iter().zip(powers) {
            let (words, _) = four.as_chunks::<WORD>();
            for ((sum, word), power) in sums.iter_mut().zip(words).zip(powers) {
                *sum += u128::from(u32::from_le_bytes(*word)) * u128::from(*power);
            }
        }
        let mut sum: u128 = sums.iter().sum();
        for (last, power) in rest.chunks(WORD).zip(&self.small[4 * fours.len()..]) {
            sum += u128::from(word(last)) * u128::from(*power);
        }
        reduce(sum)
    }

    /// The value of at most [`RANGE_BYTES_MAX`] bytes, of which the first is the `phase`-th of its word.
    fn value(&self, phase: usize, bytes: &[u8]) -> u64 {
        if phase == 0 {
            return self.aligned_value(bytes);
        }
        let (first, rest) = bytes.split_at(bytes.len().min(WORD - phase));
        let first = word(first) << (8 * phase);
        add(first, multiply(self.small[1], self.aligned_value(rest)))
    }

    /// The digest of the bytes that stand at the sequence number `seq`.
    ///
    /// # Panics
    /// When they are more than [`RANGE_BYTES_MAX`].
    pub fn digest(&self, seq: u32, bytes: &[u8]) -> u64 {
        let mut range = Range::at(seq);
        range.extend(self, bytes);
        range.digest(self)
    }
}

/// A range of a stream as far as its bytes have been seen, from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Which byte of its word the first one is.
    phase: u8,
    bytes: u32,
    value: u64,
}

impl Range {
    /// An empty one at the sequence number `seq`.
    pub fn at(seq: u32) -> Self {
        Self { phase: (seq % WORD as u32) as u8, bytes: 0, value: 0 }
    }

    /// Bytes seen so far.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// Sees the bytes that follow.
    ///
    /// # Panics
    /// When it becomes longer than [`RANGE_BYTES_MAX`].
    pub fn extend(&mut self, key: &Key, bytes: &[u8]) {
        let end = usize::from(self.phase) + self.bytes();
        assert!(self.bytes() + bytes.len() <= RANGE_BYTES_MAX, "a range of more than 64 KiB");
        let value = key.value(end % WORD, bytes);
        self.value = add(self.value, multiply(key.power(end / WORD), value));
        self.bytes += bytes.len() as u32;
    }

    /// The digest of what has been seen.
    pub fn digest(&self, key: &Key) -> u64 {
        add(self.bytes.into(), multiply(key.small[1], self.value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the module's comment says, byte by byte.
    fn plainly(number: u64, seq: u32, bytes: &[u8]) -> u64 {
        let prime = u128::from(PRIME);
        let mut digest = bytes.len() as u128;
        let first = u64::from(seq % 4);
        for (index, byte) in (first..).zip(bytes) {
            let mut weight = 256u128.pow((index % 4) as u32);
            for _ in 0..=index / 4 {
                weight = weight * u128::from(number) % prime;
            }
            digest = (digest + weight * u128::from(*byte)) % prime;
        }
        digest as u64
    }

    fn numbers() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 1..PRIME, 1 => Just(1), 1 => Just(PRIME - 1)]
    }

    /// Bytes that make the largest numbers, or any.
    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        let ones = (0..most).prop_map(|count| vec![0xff; count]);
        prop_oneof![1 => ones, 4 => prop::collection::vec(any::<u8>(), 0..most)]
    }

    #[test]
    fn keys_are_elements_and_not_zero() {
        for wrong in [0, PRIME, PRIME + 1, u64::MAX] {
            assert!(Key::new(wrong).is_none(), "{wrong}");
        }
        assert_eq!(Key::new(7).unwrap().number(), 7);
    }

    #[test]
    fn the_longest_range_has_a_digest() {
        let key = Key::new(PRIME - 2).unwrap();
        for seq in 0..4 {
            let ones = vec![0xff; RANGE_BYTES_MAX];
            let mut range = Range::at(seq);
            range.extend(&key, &ones[..5]);
            range.extend(&key, &ones[5..]);
            assert_eq!(range.digest(&key), key.digest(seq, &ones));
        }
    }

    proptest! {
        #[test]
        fn a_digest_is_what_it_is_said_to_be(number in numbers(), seq in any::<u32>(), bytes in bytes(300)) {
            prop_assert_eq!(Key::new(number).unwrap().digest(seq, &bytes), plainly(number, seq, &bytes));
        }

        #[test]
        fn ranges_put_together_are_one(
            number in numbers(),
            seq in any::<u32>(),
            bytes in bytes(9000),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let key = Key::new(number).unwrap();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut range = Range::at(seq);
            for cut in cuts.windows(2) {
                range.extend(&key, &bytes[cut[0]..cut[1]]);
            }
            prop_assert_eq!(range.bytes(), bytes.len());
            prop_assert_eq!(range.digest(&key), key.digest(seq, &bytes));
        }

        #[test]
        fn a_changed_byte_a_swap_and_another_length_are_seen(
            number in 2..PRIME - 1,
            seq in any::<u32>(),
            bytes in prop::collection::vec(any::<u8>(), 1..5000),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
        ) {
            let key = Key::new(number).unwrap();
            let digest = key.digest(seq, &bytes);
            let at = at.index(bytes.len());
            let mut other = bytes.clone();
            other[at] ^= change;
            prop_assert_ne!(key.digest(seq, &other), digest);
            let mut longer = bytes.clone();
            longer.push(0);
            prop_assert_ne!(key.digest(seq, &longer), digest);
            let mut swapped = bytes.clone();
            swapped.swap(0, at);
            prop_assert_eq!(key.digest(seq, &swapped) == digest, swapped == bytes);
            prop_assert_ne!(Key::new(number + 1).unwrap().digest(seq, &[bytes, vec![1]].concat()), digest);
        }
    }
}
