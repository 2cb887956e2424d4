//! What the comparisons of devices have in common: options, and how their programs begin and end.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use colo_lab::end_on_signals;

use crate::priority;

/// What of two sides is measured, and how.
#[derive(Args, Debug)]
pub struct Sides {
    /// Only the cases whose name has all these words; may be given several times
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// Names of the cases, and nothing more
    #[arg(long)]
    pub list: bool,
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
    /// Those of the cases that are wanted.
    ///
    /// # Errors
    /// None of them is.
    pub fn choose<C>(
        &self,
        cases: impl IntoIterator<Item = C>,
        name: impl Fn(&C) -> String,
    ) -> Result<Vec<C>> {
        let wanted = |case: &C| {
            let name = name(case);
            let has = |word| name.split([' ', ',']).any(|have| have == word);
            self.only.is_empty() || self.only.iter().any(|only| only.split_whitespace().all(has))
        };
        let chosen: Vec<C> = cases.into_iter().filter(wanted).collect();
        ensure!(!chosen.is_empty(), "No case is called {:?}: --list names them", self.only);
        Ok(chosen)
    }

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
