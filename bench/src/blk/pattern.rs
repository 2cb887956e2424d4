//! Which block comes next, and whether it is read or written.

/// What kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Of 100 requests so many write.
    pub write_percent: u8,
    /// At random places, else one after the other.
    pub random: bool,
}

impl Access {
    /// Random reads only.
    pub const READ: Self = Self { write_percent: 0, random: true };
    /// Random writes only.
    pub const WRITE: Self = Self { write_percent: 100, random: true };
}

/// The endless sequence of accesses to a disk of so many blocks.
#[derive(Clone, Debug)]
pub struct Pattern {
    access: Access,
    blocks: u64,
    next: u64,
    state: u64,
}

impl Pattern {
    /// A sequence; another `seed` gives another one, and begins elsewhere when it is sequential.
    ///
    /// # Panics
    /// When there are no blocks, or 2^32 or more.
    pub fn new(access: Access, blocks: u64, seed: u64) -> Self {
        assert!((1..1 << 32).contains(&blocks), "a disk of {blocks} blocks");
        let state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { access, blocks, next: state % blocks, state }
    }

    /// Whether to write, and which block. A linear congruential generator: its high bits are random enough for this
    /// and cost two nanoseconds.
    #[inline]
    pub fn next_access(&mut self) -> (bool, u64) {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let high = self.state >> 32;
        let block = if self.access.random {
            (high * self.blocks) >> 32
        } else {
            let block = self.next;
            self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
            block
        };
        let write = match self.access.write_percent {
            0 => false,
            100.. => true,
            // other bits than those that chose the block
            percent => (((self.state >> 16) & 0xffff) * 100) >> 16 < u64::from(percent),
        };
        (write, block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_accesses_cover_the_disk_and_keep_the_mix() {
        let mut pattern = Pattern::new(Access { write_percent: 30, random: true }, 100, 7);
        let mut hits = [0; 100];
        let mut writes = 0;
        for _ in 0..100_000 {
            let (write, block) = pattern.next_access();
            hits[block as usize] += 1;
            writes += usize::from(write);
        }
        assert!(hits.iter().all(|&hits| (800..1200).contains(&hits)), "{hits:?}");
        assert!((29_000..31_000).contains(&writes), "{writes}");
    }

    #[test]
    fn sequential_accesses_wrap() {
        let mut pattern = Pattern::new(Access { write_percent: 0, random: false }, 3, 1);
        let blocks: Vec<u64> = (0..6).map(|_| pattern.next_access().1).collect();
        for pair in blocks.windows(2) {
            assert_eq!(pair[1], (pair[0] + 1) % 3);
        }
    }
}
