//! A connection that the guest opened, to a server on the client's host, survives the failover as well.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use colo_lab::{GuestConnection, Pair, PairOptions, Side};

fn main() -> ExitCode {
    colo_tests::run(&[(
        "a_connection_that_the_guest_opened_survives",
        a_connection_that_the_guest_opened_survives,
    )])
}

fn a_connection_that_the_guest_opened_survives() -> Result<()> {
    // no checkpoint by the clock: a connection younger than the last one needs its sequence numbers translated
    let options = PairOptions { checkpoint_interval_ms: 600_000, ..PairOptions::default() };
    let mut pair = Pair::start(&options)?;
    let old = pair.agent()?.dial(pair.lab().client())?;
    pair.ask(Side::A, "checkpoint")?;
    let young = pair.agent()?.dial(pair.lab().client())?;
    await_numbers(&[&old, &young], 20)?;

    pair.lab().power_off(Side::A)?;
    await_numbers(&[&old, &young], 100)?;
    pair.await_status(Side::B, "side that goes on alone", Duration::from_secs(1), |s| {
        s.text("/role") == "alone"
    })?;
    // and one that it opens now
    let new = pair.agent()?.dial(pair.lab().client())?;
    await_numbers(&[&old, &young, &new], 20)?;
    for connection in [old, young, new] {
        connection.stop()?;
    }
    Ok(())
}

/// Waits until each connection has carried `more` numbers.
fn await_numbers(connections: &[&GuestConnection], more: u64) -> Result<()> {
    let wanted: Vec<u64> = connections.iter().map(|connection| connection.numbers() + more).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    while connections.iter().zip(&wanted).any(|(connection, wanted)| connection.numbers() < *wanted) {
        let numbers: Vec<u64> = connections.iter().map(|connection| connection.numbers()).collect();
        ensure!(
            Instant::now() < deadline,
            "The guest's connections stand still at {numbers:?}, wanted {wanted:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
