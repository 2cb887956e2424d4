//! One host dies and the clients do not notice more than a short stall.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::{Clients, Death, Dice, Pair, PairOptions, Side, Survival, kill, percentile};

/// The steps of a checkpoint at which a primary can die, in their order (see `colo::checkpoint::crash_point`).
const STEPS: [&str; 8] = ["begin", "paused", "marked", "saved", "sending", "sent", "committed", "released"];

/// The steps of the secondary's half.
const SECONDARY_STEPS: [&str; 7] = [
    "secondary-begin",
    "secondary-paused",
    "secondary-complete",
    "secondary-committed",
    "secondary-copied",
    "secondary-loaded",
    "secondary-forgotten",
];

/// A stall that no client should see, even on a machine with two cores that emulates both guests.
const STALL_MAX: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    colo_tests::run(&[
        ("killing_host_a_breaks_no_connection_and_loses_no_write", killing_host_a_breaks_no_connection),
        ("killing_host_b_costs_less_than_the_heartbeat_limit_and_a_second", killing_host_b_costs_little),
    ])
}

/// At random times and at each step of a checkpoint. `COLO_TEST_ROUNDS` says how often.
fn killing_host_a_breaks_no_connection() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let mut dice = Dice::announced();
    let first_step = dice.within(0..STEPS.len() as u64) as usize;
    let mut stalls = Vec::new();
    for round in 0..rounds {
        let death = if round % 2 == 1 {
            Death::AtStep(STEPS[(first_step + round / 2) % STEPS.len()])
        } else {
            *dice.one_of(&[Death::Killed, Death::PowerOff])
        };
        let options =
            PairOptions { checkpoint_interval_ms: dice.within(200..2000), ..PairOptions::default() };
        let at = Duration::from_millis(dice.within(500..4000));
        let survival = round_of(&options, Side::A, death, at)
            .with_context(|| format!("Round {round}: {death:?} after {at:?}, {options:?}"))?;
        tell(&format!("round {round}, {death:?} after {at:?}"), &survival);
        stalls.push(survival.stall);
    }
    println!(
        "stall at failover, {rounds} kills: median {:?}, p99 {:?}",
        percentile(&stalls, 50.0),
        percentile(&stalls, 99.0)
    );
    ensure!(
        percentile(&stalls, 100.0) < STALL_MAX,
        "A client stalled for longer than {STALL_MAX:?}: {stalls:?}"
    );
    Ok(())
}

fn killing_host_b_costs_little() -> Result<()> {
    let limit = Duration::from_millis(500) + Duration::from_secs(1);
    let step = *Dice::announced().one_of(&SECONDARY_STEPS);
    for death in [Death::Killed, Death::PowerOff, Death::AtStep(step)] {
        let survival = round_of(&PairOptions::default(), Side::B, death, Duration::from_secs(2))?;
        tell(&format!("host-b, {death:?}"), &survival);
        ensure!(
            survival.stall < limit,
            "The client stalled for {:?}, the limit is {limit:?}",
            survival.stall
        );
    }
    Ok(())
}

fn round_of(options: &PairOptions, victim: Side, death: Death, at: Duration) -> Result<Survival> {
    let pair = Pair::start(options)?;
    let clients = Clients::start(&pair)?;
    clients.await_progress().context("Before the failover")?;
    std::thread::sleep(at);
    kill(pair, clients, victim, death)
}

fn tell(what: &str, survival: &Survival) {
    let Survival { stall, work } = survival;
    println!(
        "{what}: stall {stall:?}; {} increments, {} files, {} numbers from the guest; \
         UDP asked again {} of {}, ping lost {} of {}",
        work.redis.increments,
        work.files,
        work.numbers_from_guest,
        work.udp.lost,
        work.udp.sent,
        work.ping.sent - work.ping.received,
        work.ping.sent,
    );
}
