//! How long requests took, and the longest silence among them.

use std::time::{Duration, Instant};

/// Durations of requests, with the moments of their replies.
#[derive(Clone, Debug, Default)]
pub struct Stalls {
    replies: Vec<(Instant, Duration)>,
}

impl Stalls {
    /// A reply to what was asked at `began` has just come.
    pub fn record(&mut self, began: Instant) {
        let now = Instant::now();
        self.replies.push((now, now - began));
    }

    /// Number of replies.
    pub fn count(&self) -> usize {
        self.replies.len()
    }

    /// How long the requests took that were answered after `since`, in order of time.
    pub fn latencies(&self, since: Instant) -> Vec<Duration> {
        self.since(since).map(|(_, latency)| *latency).collect()
    }

    /// The longest time that a request answered after `since` had to wait.
    pub fn longest(&self, since: Instant) -> Duration {
        self.since(since).map(|(_, latency)| *latency).max().unwrap_or_default()
    }

    /// When the last reply came.
    pub fn last(&self) -> Option<Instant> {
        self.replies.last().map(|(at, _)| *at)
    }

    fn since(&self, since: Instant) -> impl Iterator<Item = &(Instant, Duration)> {
        self.replies.iter().filter(move |(at, _)| *at > since)
    }
}

/// The value that `percent` of all are not above (nearest rank); zero for none.
pub fn percentile(values: &[Duration], percent: f64) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank"
    )]
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&values, 50.0), Duration::from_millis(50));
        assert_eq!(percentile(&values, 99.0), Duration::from_millis(99));
        assert_eq!(percentile(&values[..1], 99.0), Duration::from_millis(100));
        assert_eq!(percentile(&[], 50.0), Duration::ZERO);
    }
}
