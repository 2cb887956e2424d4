//! How long a worker that has nothing to do looks for work before it sleeps.
//!
//! Polling saves the wake-up when the next request follows soon, and takes the core from everybody else when it does
//! not. So the window follows what sleeping has shown: a sleep that was short would have been worth polling through.

use std::time::{Duration, Instant};

/// The polling policy of one worker.
#[derive(Debug)]
pub struct Polling {
    window_max: Duration,
    window: Duration,
    idle_since: Option<Instant>,
}

impl Polling {
    /// Polls for at most `window_max`; zero is never.
    pub fn new(window_max: Duration) -> Self {
        Self { window_max, window: window_max, idle_since: None }
    }

    /// There was work: the window begins anew with the next idle round.
    pub fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There was no work. Whether to look again at once; otherwise sleep, and tell with [`Polling::slept`].
    pub fn look_again(&mut self) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let now = Instant::now();
        now.duration_since(*self.idle_since.get_or_insert(now)) < self.window
    }

    /// Work came after `idle`, measured from the end of the work before it, most of which was slept through.
    pub fn slept(&mut self, idle: Duration) {
        self.idle_since = None;
        self.window = if idle < self.window_max {
            (self.window * 2).clamp(self.window_max / 8, self.window_max)
        } else if self.window <= self.window_max / 8 {
            Duration::ZERO
        } else {
            self.window / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_how_soon_work_comes() {
        let max = Duration::from_micros(800);
        let mut polling = Polling::new(max);
        assert!(polling.look_again());
        for _ in 0..4 {
            polling.slept(Duration::from_millis(5));
        }
        assert!(!polling.look_again(), "rare work is not polled for");
        polling.slept(Duration::from_micros(50));
        assert_eq!(polling.window, max / 8);
        for _ in 0..4 {
            polling.slept(Duration::from_micros(50));
        }
        assert_eq!(polling.window, max);
        assert!(!Polling::new(Duration::ZERO).look_again());
    }

    #[test]
    fn looking_ends_with_the_window() {
        let mut polling = Polling::new(Duration::from_micros(200));
        let start = Instant::now();
        while polling.look_again() {}
        assert!(start.elapsed() >= Duration::from_micros(200));
        polling.worked();
        assert!(polling.look_again());
    }
}
