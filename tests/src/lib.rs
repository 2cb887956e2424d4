//! Runs end-to-end tests one after the other and prints what `cargo test` prints, so that the same eyes and tools read
//! it. Unlike the harness that comes with Rust it knows tests that cannot run on this machine: these are counted as
//! ignored, with the reason beside them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A test: its name, which reads like what it shows, and the code.
pub type Test = (&'static str, fn() -> anyhow::Result<()>);

/// Runs the tests that the command line asks for (`--list`, `--exact`, names or parts of names; other options are
/// ignored). Every test of this package needs a laboratory, so where none can be built all are ignored.
pub fn run(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let names: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |test: &str| {
        names.is_empty()
            || names.iter().any(|name| if flag("--exact") { test == *name } else { test.contains(*name) })
    };
    let chosen: Vec<&Test> = tests.iter().filter(|(name, _)| wanted(name)).collect();
    if flag("--list") {
        for (name, _) in chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }

    let missing = colo_lab::missing();
    let began = Instant::now();
    let (mut passed, mut failed, mut ignored) = (0, Vec::new(), 0);
    println!("\nrunning {} test{}", chosen.len(), if chosen.len() == 1 { "" } else { "s" });
    for (name, test) in &chosen {
        if let Some(reason) = &missing {
            println!("test {name} ... ignored, {reason}");
            ignored += 1;
            continue;
        }
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(test));
        let logs = colo_lab::last_logs();
        let problem = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some("it panicked, see above".to_owned()),
        };
        let took = seconds(started.elapsed());
        match problem {
            None => {
                println!("test {name} ... ok ({took})");
                passed += 1;
            }
            Some(problem) => {
                println!("test {name} ... FAILED ({took})\n{problem}\n\n{logs}");
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:");
        for name in &failed {
            println!("    {name}");
        }
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {ignored} ignored; 0 measured; {} filtered out; finished in {}\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len(),
        tests.len() - chosen.len(),
        seconds(began.elapsed())
    );
    // the number that Rust's own harness gives
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
}

fn seconds(duration: Duration) -> String {
    format!("{:.2}s", duration.as_secs_f64())
}
