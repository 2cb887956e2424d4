//! The load: keeps so many requests in flight on a device, checks the status of each, and measures.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use core_affinity::CoreId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::connection::{PATIENCE, Queue, SECTOR_BYTES};
use super::{Access, Connection, Pattern};
use crate::Histogram;
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::driver::BATCH;

/// How long the load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// How a device is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Which requests.
    pub access: Access,
    /// Looks for completions all the time, or sleeps on the queue's eventfd until it is signalled.
    pub polling: bool,
    /// A thread for each queue, or one for all.
    pub thread_per_queue: bool,
    /// The core on which these threads run.
    pub core: Option<usize>,
    /// How long to measure.
    pub duration: Duration,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Requests that ended per second.
    pub iops: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// The latency that 99 of 100 requests do not exceed, in microseconds.
    pub p99_us: f64,
    /// Processor time of the server in percent of one core.
    pub cpu_percent: f64,
}

impl Measured {
    /// Figures of requests whose latencies are known in ticks.
    #[expect(clippy::cast_precision_loss, reason = "counts and ticks of one run")]
    pub fn new(latencies: &Histogram, elapsed: Duration, cpu: Duration) -> Self {
        let us = |percent| latencies.percentile(percent) as f64 / ticks_per_nanosecond() / 1000.0;
        Self {
            iops: latencies.count() as f64 / elapsed.as_secs_f64(),
            p50_us: us(50.0),
            p99_us: us(99.0),
            cpu_percent: cpu.as_secs_f64() / elapsed.as_secs_f64() * 100.0,
        }
    }
}

/// Runs a load and returns when nothing is in flight any more. `server_cpu` tells how much processor time the server
/// has used so far.
///
/// # Errors
/// A request fails or does not end, or the device breaks a ring.
pub fn run(
    connection: &mut Connection,
    load: &Load,
    server_cpu: impl Fn() -> Result<Duration>,
) -> Result<Measured> {
    let (blocks, block_bytes) = (connection.blocks(), connection.shape().block_bytes as u64);
    let mut clients: Vec<Client> = Vec::new();
    for (index, queue) in (0..).zip(&mut connection.queues) {
        let lane = Lane {
            stamps: vec![0; queue.ring.slots().into()],
            queue,
            pattern: Pattern::new(load.access, blocks, index),
        };
        match clients.last_mut() {
            Some(client) if !load.thread_per_queue => client.lanes.push(lane),
            _ => clients.push(Client {
                lanes: vec![lane],
                polling: load.polling,
                sectors: block_bytes / SECTOR_BYTES,
                latencies: Histogram::default(),
            }),
        }
    }
    // measured here, not in the first client's time
    ticks_per_nanosecond();
    // the clients and we: all have warmed up, the measurement begins, it has ended
    let barrier = Barrier::new(clients.len() + 1);
    thread::scope(|scope| {
        let running: Vec<_> =
            clients.into_iter().map(|client| scope.spawn(|| work(client, load, &barrier))).collect();
        barrier.wait();
        let (began, cpu_before) = (ticks(), server_cpu());
        barrier.wait();
        barrier.wait();
        let (ended, cpu_after) = (ticks(), server_cpu());
        let mut latencies = Histogram::default();
        for client in running {
            latencies.add(&client.join().map_err(|_| anyhow!("The load panicked"))??);
        }
        #[expect(clippy::cast_precision_loss, reason = "of one run")]
        let elapsed = Duration::from_secs_f64((ended - began) as f64 / ticks_per_nanosecond() / 1e9);
        Ok(Measured::new(&latencies, elapsed, cpu_after?.saturating_sub(cpu_before?)))
    })
}

/// One client thread's life. It comes to every barrier even when it has failed, so that nobody waits for it.
fn work(mut client: Client, load: &Load, barrier: &Barrier) -> Result<Histogram> {
    let pinned = load.core.is_none_or(|id| core_affinity::set_for_current(CoreId { id }));
    let mut result = if pinned { client.begin() } else { Err(anyhow!("Core {:?} is not ours", load.core)) };
    result = result.and_then(|()| client.run(WARM_UP));
    client.latencies = Histogram::default();
    barrier.wait();
    barrier.wait();
    result = result.and_then(|()| client.run(load.duration));
    barrier.wait();
    let latencies = std::mem::take(&mut client.latencies);
    result?;
    client.drain()?;
    Ok(latencies)
}

/// One queue under load.
struct Lane<'a> {
    queue: &'a mut Queue,
    pattern: Pattern,
    /// When each slot's request was made.
    stamps: Vec<u64>,
}

/// What one thread does.
struct Client<'a> {
    lanes: Vec<Lane<'a>>,
    polling: bool,
    sectors: u64,
    latencies: Histogram,
}

impl Client<'_> {
    /// Makes the first requests, as many as there are slots.
    fn begin(&mut self) -> Result<()> {
        for lane in &mut self.lanes {
            let now = ticks();
            for slot in 0..lane.queue.ring.slots() {
                lane.next(slot, self.sectors, now);
                if usize::from(slot) % BATCH == BATCH - 1 {
                    lane.queue.publish()?;
                }
            }
            lane.queue.publish()?;
        }
        Ok(())
    }

    /// Makes a new request for each that ends, for so long. Leaves them in flight.
    fn run(&mut self, duration: Duration) -> Result<()> {
        let end = ticks() + ticks_in(duration);
        let patience = ticks_in(PATIENCE);
        let mut progress = ticks();
        loop {
            let before = progress;
            for lane in &mut self.lanes {
                if let Some(now) = lane.turn(self.sectors, &mut self.latencies)? {
                    progress = now;
                }
            }
            // one that found something has the time already
            let now = if progress == before { ticks() } else { progress };
            if now >= end {
                return Ok(());
            }
            if progress == before {
                ensure!(now - progress < patience, "The server has ended no request for {PATIENCE:?}");
                if !self.polling {
                    self.sleep()?;
                }
            }
        }
    }

    /// Waits for everything in flight.
    fn drain(&mut self) -> Result<()> {
        let mut progress = ticks();
        for lane in &mut self.lanes {
            while lane.queue.ring.pending() > 0 {
                let mut slots = [(0, 0); BATCH];
                let count = lane.queue.ring.take(&mut slots)?;
                for &(slot, _) in &slots[..count] {
                    check(lane.queue.ring.take_status(slot))?;
                }
                if count > 0 {
                    progress = ticks();
                }
                ensure!(
                    ticks() - progress < ticks_in(PATIENCE),
                    "{} requests have not ended after {PATIENCE:?}",
                    lane.queue.ring.pending()
                );
            }
        }
        Ok(())
    }

    /// Sleeps until a queue is signalled, for at most a tenth of a second.
    fn sleep(&self) -> Result<()> {
        // every queue must be armed, so no short cut
        let mut ready = false;
        for lane in &self.lanes {
            ready |= lane.queue.ring.arm();
        }
        if !ready {
            let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(self.lanes.len());
            fds.extend(self.lanes.iter().map(|lane| PollFd::new(&lane.queue.notifiers.call, PollFlags::IN)));
            let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            match poll(&mut fds, Some(&limit)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("Cannot wait for the device's signal"),
            }
        }
        for lane in &self.lanes {
            lane.queue.ring.quiet();
            // nothing in it: another queue was signalled, or it came before we slept
            let _ = rustix::io::read(&lane.queue.notifiers.call, &mut [0u8; 8]);
        }
        Ok(())
    }
}

impl Lane<'_> {
    /// Takes what has ended and makes as many new requests. Returns the time if there was something.
    #[inline]
    fn turn(&mut self, sectors: u64, latencies: &mut Histogram) -> Result<Option<u64>> {
        let mut slots = [(0, 0); BATCH];
        let count = self.queue.ring.take(&mut slots)?;
        if count == 0 {
            return Ok(None);
        }
        let now = ticks();
        for &(slot, _) in &slots[..count] {
            check(self.queue.ring.take_status(slot))?;
            latencies.record(now - self.stamps[usize::from(slot)]);
            self.next(slot, sectors, now);
        }
        self.queue.publish()?;
        Ok(Some(now))
    }

    #[inline]
    fn next(&mut self, slot: u16, sectors: u64, now: u64) {
        let (write, block) = self.pattern.next_access();
        self.queue.ring.offer(slot, write, block * sectors);
        self.stamps[usize::from(slot)] = now;
    }
}

#[inline]
fn check(status: u8) -> Result<()> {
    ensure!(status == 0, "A request ended with status {status}");
    Ok(())
}
