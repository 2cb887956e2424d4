//! How long a process has run.

use std::time::Duration;

use anyhow::{Context, Result};

/// Processor time that all living threads of a process have used so far, in the kernel and outside.
///
/// # Errors
/// There is no such process, or the kernel keeps no such statistics.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("Process {pid}"))? {
        let path = entry.with_context(|| format!("Process {pid}"))?.path().join("schedstat");
        // a thread may end while we look
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let first = text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
        nanoseconds += first.with_context(|| format!("{} says {text:?}", path.display()))?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::Instant;

    use super::*;

    /// Killed also when the test fails.
    struct Busy(Child);

    impl Drop for Busy {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn the_time_of_another_process_grows_with_its_work() {
        let busy = Busy(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap());
        let pid = busy.0.id();
        let before = cpu_time(pid).unwrap();
        let began = Instant::now();
        while cpu_time(pid).unwrap() - before < Duration::from_millis(20) {
            assert!(began.elapsed() < Duration::from_secs(60), "no time is counted");
            std::thread::yield_now();
        }
        // it has one thread, which cannot have run longer than we have waited
        let all = cpu_time(pid).unwrap();
        assert!(all - before <= began.elapsed() + Duration::from_millis(1), "{before:?} to {all:?}");
    }

    #[test]
    fn a_process_that_has_ended_has_none() {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(cpu_time(child.id()).is_err());
    }
}
