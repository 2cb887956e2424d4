//! Crash points: a test names one, and this process dies there as if its host had.

use std::sync::OnceLock;

/// Ends this process with SIGKILL if the environment says `COLO_CRASH_AT=STEP:EPOCH` and this is that step of that
/// epoch. Children die with it (they ask for that at their start), so it is the death of a whole side.
pub fn crash_point(step: &str, epoch: u64) {
    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("COLO_CRASH_AT").ok()?;
        let (step, epoch) = text.rsplit_once(':')?;
        Some((step.to_owned(), epoch.parse().ok()?))
    });
    if wanted.as_ref().is_some_and(|(at, of)| at == step && *of == epoch) {
        let myself = rustix::process::getpid();
        rustix::process::kill_process(myself, rustix::process::Signal::KILL)
            .expect("a process may kill itself");
    }
}
