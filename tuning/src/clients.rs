//! All the clients at once, as a guest with users has them.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    Agent, FileLoad, GuestConnection, Pair, Ping, PingResult, RedisLoad, RedisProgress, UdpEcho, UdpResult,
};

/// How long a request may wait for its reply before a test gives up on the guest.
const PATIENCE: Duration = Duration::from_secs(15);

/// Clients that are at work: redis and files with fsync, each over one connection; a connection that the guest opened;
/// UDP; ping.
#[derive(Debug)]
pub struct Clients {
    /// The redis client.
    pub redis: RedisLoad,
    files: FileLoad,
    from_guest: GuestConnection,
    udp: UdpEcho,
    ping: Ping,
}

/// What the clients did, all of it verified.
#[derive(Debug)]
pub struct Work {
    /// What redis acknowledged.
    pub redis: RedisProgress,
    /// Files that were written with fsync.
    pub files: u64,
    /// Numbers that came over the connection that the guest opened.
    pub numbers_from_guest: u64,
    /// Datagrams.
    pub udp: UdpResult,
    /// Echo requests.
    pub ping: PingResult,
}

impl Clients {
    /// Sets all clients to work on the guest.
    ///
    /// # Errors
    /// One of them gets no connection.
    pub fn start(pair: &Pair) -> Result<Self> {
        let client = pair.lab().client();
        Ok(Self {
            ping: Ping::start(pair.lab())?,
            udp: UdpEcho::start(client, Duration::from_millis(50))?,
            from_guest: pair.agent()?.dial(client)?,
            files: FileLoad::start(pair.agent()?, Duration::from_millis(50)),
            redis: RedisLoad::start(pair.redis()?, Duration::from_millis(2))?,
        })
    }

    /// Waits until each of them has got some work done from now on.
    ///
    /// # Errors
    /// One of them does not.
    pub fn await_progress(&self) -> Result<()> {
        let counts = || [self.redis.progress().increments, self.files.writes(), self.from_guest.numbers()];
        let (before, deadline) = (counts(), Instant::now() + PATIENCE);
        // the first reply may have been on its way, the second was asked for since
        while counts().iter().zip(before).any(|(now, before)| *now < before + 2) {
            if let Some(failure) = self.redis.progress().failure {
                anyhow::bail!("The redis client: {failure}");
            }
            ensure!(
                Instant::now() < deadline,
                "Clients that stand still: increments, files, numbers from the guest were {before:?} and are {:?}",
                counts()
            );
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends all clients after their requests in flight, and verifies that everything that was acknowledged is there.
    /// The agent given back is for the guest's orderly end.
    ///
    /// # Errors
    /// A connection did not last, or a write was lost or done twice.
    pub fn stop_and_verify(self) -> Result<(Agent, Work)> {
        let (mut connection, redis) = self.redis.stop(PATIENCE)?;
        redis.verify(&mut connection)?;
        let (agent, files) = self.files.stop_and_verify(PATIENCE).context("Files with fsync")?;
        let numbers_from_guest = self.from_guest.stop()?;
        let (udp, ping) = (self.udp.stop().context("UDP")?, self.ping.stop()?);
        Ok((agent, Work { redis, files, numbers_from_guest, udp, ping }))
    }
}
