//! A VM with two network cards is one: a checkpoint is of both, and so is a failover.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use colo_lab::{GUEST, GUEST_SECOND, Pair, PairOptions, Redis, Reply, Side};

/// Requests of each client after the failover.
const REQUESTS_AFTER: u64 = 200;

fn main() -> ExitCode {
    colo_tests::run(&[("both_cards_outlive_host_a", both_cards_outlive_host_a)])
}

fn both_cards_outlive_host_a() -> Result<()> {
    let options = PairOptions { two_cards: true, ..PairOptions::default() };
    let mut pair = Pair::start(&options)?;
    let mut clients = Vec::new();
    for address in [GUEST, GUEST_SECOND] {
        clients.push(Redis::connect(pair.lab().client(), address, Duration::from_secs(60))?);
    }
    let dead = &AtomicBool::new(false);
    let counts = thread::scope(|scope| -> Result<Vec<u64>> {
        let workers: Vec<_> = (clients.iter_mut().enumerate())
            .map(|(card, redis)| scope.spawn(move || count(redis, card, dead)))
            .collect();
        let before = pair.status(Side::A)?.checkpoints();
        let failed_over = pair
            .await_status(Side::A, "some checkpoints", Duration::from_secs(60), |status| {
                status.checkpoints() >= before + 5
            })
            .and_then(|status| {
                for card in 0..2 {
                    let compared = status.number(&format!("/net/{card}/pair/proxy/compare/pvm_packets"));
                    ensure!(compared > 20, "Card {card}: {compared} packets compared");
                }
                pair.lab().kill_host(Side::A)?;
                pair.await_status(Side::B, "side that goes on alone", Duration::from_secs(15), |status| {
                    status.text("/role") == "alone"
                })
            });
        // whatever has happened, the clients must come to an end
        dead.store(true, Ordering::Relaxed);
        if let Err(error) = failed_over {
            pair.lab().kill_host(Side::B)?;
            return Err(error);
        }
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| bail!("A client has panicked")))
            .collect()
    })?;
    println!("  increments over each card: {counts:?}");
    for (card, count) in counts.iter().enumerate() {
        let key = format!("card{card}");
        let reply = pair.redis()?.command(&[b"GET", key.as_bytes()])?;
        ensure!(
            reply == Reply::Bulk(Some(count.to_string().into_bytes())),
            "{key} is {reply:?}, not {count}"
        );
    }
    Ok(())
}

/// Increments over one connection until some time after the failover; every answer is the next number.
fn count(redis: &mut Redis, card: usize, dead: &AtomicBool) -> Result<u64> {
    let key = format!("card{card}");
    let (mut count, mut left) = (0, REQUESTS_AFTER);
    while left > 0 {
        if dead.load(Ordering::Relaxed) {
            left -= 1;
        }
        count += 1;
        let reply = redis.command(&[b"INCR", key.as_bytes()]).with_context(|| format!("Card {card}"))?;
        ensure!(reply == Reply::Integer(count), "Card {card}: {reply:?}, not {count}");
    }
    Ok(count.unsigned_abs())
}
