//! A VM with two network cards is one: a checkpoint is of both, and so is a failover.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::{GUEST, GUEST_SECOND, Pair, PairOptions, Redis, RedisLoad, Reply, Side};

/// How long a client may stand still before the test gives up on its card.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    colo_tests::run(&[("both_cards_outlive_host_a", both_cards_outlive_host_a)])
}

/// A client over each card, each with a database of its own, writes before, during and after the failover.
fn both_cards_outlive_host_a() -> Result<()> {
    let options = PairOptions { two_cards: true, ..PairOptions::default() };
    let mut pair = Pair::start(&options)?;
    let loads = [GUEST, GUEST_SECOND].iter().zip(["0", "1"]).map(|(address, database)| {
        let mut redis = Redis::connect(pair.lab().client(), address, PATIENCE)?;
        select(&mut redis, database)?;
        RedisLoad::start(redis, Duration::ZERO)
    });
    let loads = loads.collect::<Result<Vec<_>>>()?;
    let before = pair.status(Side::A)?.checkpoints();
    let status = pair
        .await_status(Side::A, "some checkpoints", PATIENCE, |status| status.checkpoints() >= before + 5)?;
    for card in 0..2 {
        let compared = status.number(&format!("/net/{card}/pair/proxy/compare/pvm_packets"));
        ensure!(compared > 20, "Card {card}: {compared} packets compared");
    }
    pair.lab().kill_host(Side::A)?;
    pair.await_status(Side::B, "side that goes on alone", Duration::from_secs(15), |status| {
        status.text("/role") == "alone"
    })?;
    for (card, load) in loads.iter().enumerate() {
        load.await_increments(200, PATIENCE).with_context(|| format!("Card {card} after the failover"))?;
    }
    for (load, database) in loads.into_iter().zip(["0", "1"]) {
        let (_, progress) = load.stop(PATIENCE)?;
        println!("  database {database}: {} increments", progress.increments);
        let mut fresh = pair.redis()?;
        select(&mut fresh, database)?;
        progress.verify(&mut fresh)?;
    }
    Ok(())
}

fn select(redis: &mut Redis, database: &str) -> Result<()> {
    let reply = redis.command(&[b"SELECT", database.as_bytes()])?;
    ensure!(reply == Reply::Status("OK".into()), "SELECT {database}: {reply:?}");
    Ok(())
}
