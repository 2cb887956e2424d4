//! Latencies: counts in buckets whose width grows with the value, so that each percentile is within 1 %.

/// Buckets to a power of two.
const STEPS: u64 = 128;
const STEPS_BITS: u32 = STEPS.trailing_zeros();
/// Values of 2^40 ticks (minutes) and more count as the largest.
const OCTAVES: u32 = 40 - STEPS_BITS;
const BUCKETS: usize = (STEPS * (OCTAVES as u64 + 1)) as usize;

/// How often each latency occurred. Values have no unit here.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u32]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into() }
    }
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        // values below STEPS have a bucket each; above, the octave and the STEPS_BITS bits behind the leading one
        let octave = (value | (STEPS - 1)).ilog2() + 1 - STEPS_BITS;
        let bucket =
            if octave == 0 { value } else { (u64::from(octave - 1) * STEPS) + (value >> (octave - 1)) };
        let last = self.counts.len() - 1;
        self.counts[(bucket as usize).min(last)] += 1;
    }

    /// Adds the counts of another.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to += from;
        }
    }

    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().copied().map(u64::from).sum()
    }

    /// The value that `percent` of all do not exceed (the largest of its bucket); 0 when there are none.
    #[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "counts of one run, a percentage")]
    pub fn percentile(&self, percent: f64) -> u64 {
        let wanted = ((self.count() as f64 * percent / 100.0).ceil() as u64).max(1);
        let mut below = 0;
        for (bucket, &count) in (0..).zip(&self.counts) {
            below += u64::from(count);
            if below >= wanted {
                return Self::largest(bucket);
            }
        }
        0
    }

    /// The largest value of a bucket.
    fn largest(bucket: u64) -> u64 {
        if bucket < 2 * STEPS {
            return bucket;
        }
        let shift = bucket / STEPS - 1;
        ((bucket - shift * STEPS + 1) << shift) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_one_percent() {
        let mut histogram = Histogram::default();
        for value in 1..=100_000 {
            histogram.record(value);
        }
        assert_eq!(histogram.count(), 100_000);
        for percent in [0.1, 1.0, 50.0, 99.0, 100.0] {
            let (found, exact) = (histogram.percentile(percent) as f64, percent * 1000.0);
            assert!((exact..=exact * 1.01).contains(&found), "{percent} %: {found}, not {exact}");
        }
    }

    #[test]
    fn small_and_huge_values_have_their_place() {
        assert_eq!(Histogram::default().percentile(50.0), 0);
        for value in 0..2 * STEPS {
            let mut histogram = Histogram::default();
            histogram.record(value);
            assert_eq!(histogram.percentile(50.0), value);
        }
        let mut histogram = Histogram::default();
        histogram.record(u64::MAX);
        assert!(histogram.percentile(50.0) > 1 << 39);
    }
}
