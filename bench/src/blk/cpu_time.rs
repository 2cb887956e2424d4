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
    use std::time::Instant;

    use super::*;

    #[test]
    fn work_of_every_thread_is_counted() {
        let before = cpu_time(std::process::id()).unwrap();
        let work = || {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(200) {
                std::hint::spin_loop();
            }
            // the thread must live while we count
            cpu_time(std::process::id()).unwrap()
        };
        let after = std::thread::spawn(work).join().unwrap();
        assert!(after - before >= Duration::from_millis(20), "{before:?} to {after:?}");
    }
}
