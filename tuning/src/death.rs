//! A host dies under the clients, and what they see of it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Clients, Pair, Side, Work};

/// Ways for a host to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// SIGKILL to everything on it; its kernel closes the connections.
    Killed,
    /// No power: nothing of it reaches anybody any more.
    PowerOff,
    /// SIGKILL at the next checkpoint, once it reaches this step (see `colo::checkpoint::crash_point`).
    AtStep(&'static str),
}

/// What the clients saw.
#[derive(Debug)]
pub struct Survival {
    /// The longest time that a redis request waited for its reply, from the death on.
    pub stall: Duration,
    /// Everything that they did.
    pub work: Work,
}

/// Kills `victim`, lets the clients go on with the other side, and verifies everything: connections, writes, the disk.
///
/// # Errors
/// What did not hold.
pub fn kill(mut pair: Pair, clients: Clients, victim: Side, death: Death) -> Result<Survival> {
    let died = match death {
        Death::Killed => {
            let now = Instant::now();
            pair.lab().kill_host(victim)?;
            now
        }
        Death::PowerOff => {
            let now = Instant::now();
            pair.lab().power_off(victim)?;
            now
        }
        Death::AtStep(step) => {
            pair.crash_at(victim, step)?;
            pair.process(victim)?.wait(Duration::from_secs(20)).context("The checkpoint to die in")?;
            let now = Instant::now();
            pair.lab().kill_host(victim)?;
            now
        }
    };
    let survivor = victim.other();
    pair.await_status(survivor, "side that goes on alone", Duration::from_secs(15), |status| {
        status.text("/role") == "alone"
    })?;
    clients.await_progress().context("After the failover")?;
    // some time alone: whatever the failover left behind comes to light
    thread::sleep(Duration::from_secs(1));
    let (mut agent, work) = clients.stop_and_verify()?;
    let fresh = &mut pair.redis()?;
    work.redis.verify(fresh).context("Over a new connection")?;
    agent.unmount()?;
    ensure!(pair.process(survivor)?.ended()?.is_none(), "colo run has ended on {survivor:?}");
    pair.lab().kill_host(survivor)?;
    pair.disk(survivor).check()?;
    Ok(Survival { stall: work.redis.stalls.longest(died), work })
}
