//! Where a program's log goes: to the journal under systemd, to standard error otherwise.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;

/// The environment variable that says how much is logged, as `debug` or `colo::checkpoint=trace,info`.
pub const VARIABLE: &str = "COLO_LOG";

/// Starts logging, at level `info` unless [`VARIABLE`] says otherwise.
///
/// # Errors
/// A sentence about what is wrong with [`VARIABLE`], or that logging was started already.
pub fn start() -> Result<(), String> {
    let filter = match std::env::var(VARIABLE) {
        Ok(directives) => {
            EnvFilter::try_new(&directives).map_err(|error| format!("{VARIABLE}={directives:?}: {error}"))?
        }
        Err(_) => EnvFilter::new("info"),
    };
    let registry = tracing_subscriber::registry().with(filter);
    let started = match under_systemd().then(tracing_journald::layer) {
        Some(Ok(journal)) => registry.with(journal).try_init(),
        _ => {
            let stderr = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false);
            registry.with(stderr).try_init()
        }
    };
    started.map_err(|error| error.to_string())
}

/// systemd names the socket that standard error is connected to, when that is the journal (systemd.exec(5)).
fn under_systemd() -> bool {
    let Some(named) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    rustix::fs::fstat(std::io::stderr()).is_ok_and(|stat| named == format!("{}:{}", stat.st_dev, stat.st_ino))
}
