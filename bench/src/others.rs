//! How busy other programs kept the machine during a measurement: a reader of the figures wants to know.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// Ticks of the kernel's statistics in a second (USER_HZ, fixed for programs on every architecture that we run on).
const TICKS_PER_SECOND: f64 = 100.0;

/// Since when.
#[derive(Debug)]
pub struct Others {
    began: Instant,
    busy: u64,
    ours: u64,
}

impl Others {
    /// From now on.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn watch() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let own = fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
        let busy = busy_ticks(&stat).context("/proc/stat is malformed")?;
        let ours = own_ticks(&own).context("/proc/self/stat is malformed")?;
        Ok(Self { began: Instant::now(), busy, ours })
    }

    /// How many cores everything but this program and its ended children kept busy, on average.
    ///
    /// # Errors
    /// The kernel does not tell.
    #[expect(clippy::cast_precision_loss, reason = "ticks of one run")]
    pub fn busy_cores(&self) -> Result<f64> {
        let now = Self::watch()?;
        let others = now.busy.saturating_sub(self.busy).saturating_sub(now.ours - self.ours);
        Ok(others as f64 / TICKS_PER_SECOND / self.began.elapsed().as_secs_f64())
    }
}

/// All cores together: user, nice, system, irq, softirq and steal (proc(5)).
fn busy_ticks(stat: &str) -> Option<u64> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let numbers: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
    [0, 1, 2, 5, 6, 7].iter().map(|&at| numbers.get(at).copied()).sum()
}

/// Of this process and of the children that it has waited for, in user mode and in the kernel.
fn own_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    // utime is the 14th field, and `rest` begins with the third
    rest.split_whitespace().skip(11).take(4).map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn fields_are_found() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 2000 8 16 32 0 0\ncpu0 5 5\n"), Some(63));
        assert_eq!(own_ticks("7 (a b) c) S 1 1 1 0 -1 0 0 0 0 0 1 2 4 8 20 0"), Some(15));
        assert_eq!(own_ticks("7"), None);
    }

    #[test]
    fn our_own_work_is_seen() {
        let before = Others::watch().unwrap();
        let limit = Instant::now() + Duration::from_secs(60);
        // a tick is 10 ms, and on a busy machine it takes a while to get one
        while Others::watch().unwrap().ours == before.ours {
            assert!(Instant::now() < limit, "no time is counted");
        }
        assert!(before.busy_cores().unwrap() >= 0.0);
    }
}
