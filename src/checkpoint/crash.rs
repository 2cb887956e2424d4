//! Crash points: a test names a step, and this process dies there as if its host had.

use std::path::PathBuf;
use std::sync::OnceLock;

/// Ends this process with SIGKILL if the environment's `COLO_CRASH_FILE` names a file that holds just this step's name.
/// A file, because a test knows only while it runs which checkpoint it wants to break. Children die with this process
/// (they ask for that at their start), so it is the death of a whole side.
pub fn crash_point(step: &str) {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let file = FILE.get_or_init(|| std::env::var_os("COLO_CRASH_FILE").map(PathBuf::from));
    let Some(file) = file else {
        return;
    };
    if std::fs::read(file).is_ok_and(|wanted| wanted == step.as_bytes()) {
        let myself = rustix::process::getpid();
        rustix::process::kill_process(myself, rustix::process::Signal::KILL)
            .expect("a process may kill itself");
    }
}
