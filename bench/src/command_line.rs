//! What the comparisons of devices have in common: options, and how their programs begin and end.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use colo_lab::end_on_signals;

use crate::priority;

/// How two sides are measured.
#[derive(Args, Debug)]
pub struct Sides {
    /// How often each is measured, in turn
    #[arg(long, default_value_t = 5, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// How long each time
    #[arg(long, default_value_t = 0.6, value_name = "SECONDS")]
    seconds: f64,
    /// The client's core
    #[arg(long, default_value_t = 1, value_name = "CORE")]
    pub client_core: usize,
    /// The servers' core
    #[arg(long, default_value_t = 0, value_name = "CORE")]
    pub server_core: usize,
    /// More arguments for our back end, to try them
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true, default_value = "")]
    ours: String,
}

impl Sides {
    /// How long each is measured each time.
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// More arguments for our back end.
    pub fn ours(&self) -> Vec<String> {
        self.ours.split_whitespace().map(str::to_owned).collect()
    }
}

/// Does a program's work, before other programs of the machine unless `no_priority`. Call it before any thread is started.
pub fn run(no_priority: bool, work: impl FnOnce() -> Result<()>) -> ExitCode {
    end_on_signals();
    if !no_priority {
        priority::take();
    }
    if let Err(error) = work() {
        eprintln!("FAILED: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
