//! A client of a protected VM, in a simulation: two smoltcp stacks as PVM and SVM, the proxy between them, a bad network,
//! checkpoints and failovers at any event.
//!
//! `COLO_SIM_EVENTS=n` runs as many seeds as it takes for so many events, from `COLO_SIM_FIRST` on; with `COLO_SIM_ALL` not
//! only up to the first that fails. `COLO_SIM_SEED=n` runs one seed, and tells the last events if it fails, or as many as
//! `COLO_SIM_LINES` says.

mod app;
mod client;
mod datagrams;
mod guest;
mod oracle;
mod pair;
mod paws;
mod scenario;
mod segment;
mod stack;
mod trace;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Figures, World};

const EVENTS: u64 = 1_000_000;

pub(crate) fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

/// Runs one seed.
///
/// # Errors
/// What did not hold.
fn run(seed: u64) -> Result<Figures, String> {
    catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed);
        world.run();
        world.figures
    }))
    .map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_owned()
    })
}

/// Runs a seed that failed again, to tell how it came to that.
fn tell(seed: u64) -> String {
    trace::keep(true);
    let failure = run(seed).err().unwrap_or_else(|| "it does not fail again".into());
    let lines = trace::lines().join("\n");
    format!("{lines}\n\nCOLO_SIM_SEED={seed} fails: {failure}")
}

#[test]
fn a_client_gets_what_the_application_says_whatever_befalls_the_pair() {
    if let Some(seed) = variable("COLO_SIM_SEED") {
        trace::keep(true);
        match run(seed) {
            Ok(figures) => println!("{figures:#?}"),
            Err(_) => panic!("{}", tell(seed)),
        }
        return;
    }
    let limit = variable("COLO_SIM_EVENTS").unwrap_or(EVENTS);
    let first = variable("COLO_SIM_FIRST").unwrap_or(0);
    let mut total = Figures::default();
    let mut failed = Vec::new();
    let mut seeds = 0;
    while total.events < limit {
        let seed = first + seeds;
        seeds += 1;
        match run(seed) {
            Ok(figures) => total.add(&figures),
            Err(why) if variable("COLO_SIM_ALL").is_some() => {
                println!("{seed}: {}", &why[..why.len().min(150)].replace("\n", " "));
                failed.push(seed);
                total.events += 1000;
            }
            Err(_) => panic!("{}", tell(seed)),
        }
    }
    println!("{seeds} seeds: {total:#?}");
    assert!(failed.is_empty(), "{} of {seeds} seeds fail: {failed:?}", failed.len());
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
}
