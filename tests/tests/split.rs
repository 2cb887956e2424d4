//! One side goes on alone, never two.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use colo_lab::{Capture, Clients, Pair, PairOptions, Side, Sighting};

/// Exit status of `colo run` when the peer goes on with the VM.
const LOST: i32 = 3;

fn main() -> ExitCode {
    colo_tests::run(&[
        ("a_cut_link_leaves_exactly_one_side", a_cut_link_leaves_exactly_one_side),
        ("an_operator_moves_the_vm_to_the_other_host", an_operator_moves_the_vm_to_the_other_host),
    ])
}

fn a_cut_link_leaves_exactly_one_side() -> Result<()> {
    let pair = Pair::start(&PairOptions::default())?;
    one_side_goes_on(pair, |pair| pair.lab().cut_link()).map(drop)
}

fn an_operator_moves_the_vm_to_the_other_host() -> Result<()> {
    let pair = Pair::start(&PairOptions::default())?;
    let survivor = one_side_goes_on(pair, |pair| pair.ask(Side::B, "failover"))?;
    ensure!(survivor == Side::B, "{survivor:?} goes on");
    Ok(())
}

/// Separates the two sides and watches the LAN. Returns who goes on.
fn one_side_goes_on(mut pair: Pair, separate: impl Fn(&Pair) -> Result<()>) -> Result<Side> {
    let capture = Capture::start(pair.lab())?;
    let clients = Clients::start(&pair)?;
    clients.await_progress()?;
    let separated = Instant::now();
    separate(&pair)?;

    let (winner, loser) = outcome(&mut pair)?;
    clients.await_progress().context("After the separation")?;
    thread::sleep(Duration::from_secs(2));
    let (mut agent, work) = clients.stop_and_verify()?;
    println!("{winner:?} goes on; the client stalled for {:?}", work.redis.stalls.longest(separated));
    ensure!(pair.lab().host(loser).namespace().processes()?.is_empty(), "Something of {loser:?} still runs");

    let seen = capture.stop()?;
    let changes = changes_of_side(&seen);
    println!("{} frames from the guest, the port changed at {changes:?}", seen.len());
    ensure!(seen.first().is_some_and(|first| first.side == Side::A), "The first frame is not the primary's");
    ensure!(seen.last().is_some_and(|last| last.side == winner), "The last frame is not the winner's");
    let expected = usize::from(winner == Side::B);
    ensure!(changes.len() == expected, "Frames from both sides: the port changed {} times", changes.len());

    agent.unmount()?;
    pair.lab().kill_host(winner)?;
    pair.disk(winner).check()?;
    Ok(winner)
}

/// Waits until one `colo run` has ended because the other goes on.
fn outcome(pair: &mut Pair) -> Result<(Side, Side)> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        for loser in [Side::A, Side::B] {
            if let Some(status) = pair.process(loser)?.ended()? {
                let output = pair.process(loser)?.output();
                ensure!(status.code() == Some(LOST), "colo run on {loser:?} ended with {status}:\n{output}");
                let winner = loser.other();
                let status = pair.status(winner)?;
                ensure!(status.text("/role") == "alone", "{winner:?} is {}", status.0);
                return Ok((winner, loser));
            }
        }
        if Instant::now() > deadline {
            bail!("Neither side has given up: {:?} and {:?}", pair.status(Side::A), pair.status(Side::B));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Numbers of the frames that came from another side than the one before.
fn changes_of_side(seen: &[Sighting]) -> Vec<usize> {
    (1..seen.len()).filter(|&at| seen[at].side != seen[at - 1].side).collect()
}
