//! The load: keeps frames under way on a card and counts those that arrive.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use core_affinity::CoreId;

use super::Card;
use super::card::{HEADER_BYTES, Queue};
use crate::Histogram;
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::driver::BATCH;

/// How long the load runs before it is measured.
pub(super) const WARM_UP: Duration = Duration::from_millis(100);
/// How long to wait for a frame before the server is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the guest to the back end, as fast as that takes them.
    Transmit,
    /// From the back end to the guest, as fast as the guest gives buffers.
    Receive,
    /// To the back end and back, as many as there are buffers.
    Forward,
    /// To the back end and back, one at a time.
    RoundTrip,
}

impl FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "transmit" => Ok(Self::Transmit),
            "receive" => Ok(Self::Receive),
            "forward" => Ok(Self::Forward),
            "round-trip" => Ok(Self::RoundTrip),
            _ => Err(format!("{text:?}: say transmit, receive, forward or round-trip")),
        }
    }
}

/// How a card is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Which way.
    pub way: Way,
    /// Length of the frames that the guest sends, in bytes; those that it gets may be longer.
    pub frame_bytes: usize,
    /// The core on which it runs.
    pub core: usize,
    /// How long to measure.
    pub duration: Duration,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Frames that have arrived per second.
    pub frames_per_s: f64,
    /// Round trip: median time in microseconds.
    pub p50_us: f64,
    /// Round trip: the time that 99 of 100 frames do not exceed, in microseconds.
    pub p99_us: f64,
}

/// Runs a load on a fresh card.
///
/// # Errors
/// Frames do not arrive, or the device breaks a ring.
pub fn run(card: &mut Card, load: &Load) -> Result<Measured> {
    on_core(load.core, || work(card, load))
}

/// Does work on a thread of its own, on this core.
///
/// # Errors
/// Those of the work, or the core is not ours.
pub fn on_core<T: Send>(core: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pinned = || {
        pin(core)?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(pinned).join().map_err(|_| anyhow!("The load panicked"))?)
}

pub(crate) fn pin(core: usize) -> Result<()> {
    ensure!(core_affinity::set_for_current(CoreId { id: core }), "Core {core} is not ours");
    Ok(())
}

fn work(card: &mut Card, load: &Load) -> Result<Measured> {
    // not in the time that is measured
    ticks_per_nanosecond();
    let mut client = Client { card, way: load.way, number: 0, latencies: Histogram::default() };
    client.begin(load.frame_bytes)?;
    client.run(WARM_UP)?;
    client.latencies = Histogram::default();
    let began = ticks();
    let arrived = client.run(load.duration)?;
    #[expect(clippy::cast_precision_loss, reason = "counts and ticks of one run")]
    let (seconds, arrived) = ((ticks() - began) as f64 / ticks_per_nanosecond() / 1e9, arrived as f64);
    #[expect(clippy::cast_precision_loss, reason = "ticks of one run")]
    let us = |percent| client.latencies.percentile(percent) as f64 / ticks_per_nanosecond() / 1000.0;
    Ok(Measured { frames_per_s: arrived / seconds, p50_us: us(50.0), p99_us: us(99.0) })
}

struct Client<'a> {
    card: &'a mut Card,
    way: Way,
    number: u64,
    latencies: Histogram,
}

impl Client<'_> {
    /// Offers all buffers that this way needs, and sends the first frames.
    fn begin(&mut self, frame_bytes: usize) -> Result<()> {
        let slots = self.card.tx.ring.slots();
        let frames = match self.way {
            Way::Receive => 0,
            Way::RoundTrip => 1,
            // what comes back needs a buffer that is free
            Way::Forward => slots / 2,
            Way::Transmit => slots,
        };
        self.number = frames.into();
        self.card.begin(self.way != Way::Transmit, frames, frame_bytes)
    }

    /// Keeps it going for so long. Returns how many frames have arrived.
    fn run(&mut self, duration: Duration) -> Result<u64> {
        let (end, patience) = (ticks() + ticks_in(duration), ticks_in(PATIENCE));
        let (mut arrived, mut progress) = (0, ticks());
        let mut sent = progress;
        loop {
            let count = match self.way {
                Way::Transmit => self.transmitted(true)?,
                Way::Receive => received(&mut self.card.rx, usize::MAX)?,
                Way::Forward => self.forwarded()?,
                Way::RoundTrip => {
                    self.transmitted(false)?;
                    received(&mut self.card.rx, usize::MAX)?
                }
            };
            let now = ticks();
            if count > 0 {
                (arrived, progress) = (arrived + count as u64, now);
                if self.way == Way::RoundTrip {
                    self.latencies.record(now - sent);
                    sent = ticks();
                    self.send_one()?;
                }
            }
            if now >= end {
                return Ok(arrived);
            }
            ensure!(now - progress < patience, "No frame has arrived for {PATIENCE:?}");
        }
    }

    /// Takes buffers back that were sent, and sends them again if they are to be. Returns how many.
    #[inline]
    fn transmitted(&mut self, again: bool) -> Result<usize> {
        let tx = &mut self.card.tx;
        let mut ended = [(0, 0); BATCH];
        let count = tx.ring.take(&mut ended, |_| ())?;
        if again && count > 0 {
            for (slot, _) in &ended[..count] {
                self.number += 1;
                tx.write_frame(*slot, self.number);
                tx.ring.offer(*slot);
            }
            tx.publish()?;
        }
        Ok(count)
    }

    /// Takes back what was sent and what has arrived, and sends as many as have arrived. Returns how many those are.
    #[inline]
    fn forwarded(&mut self) -> Result<usize> {
        self.transmitted(false)?;
        let count = received(&mut self.card.rx, usize::MAX)?;
        for _ in 0..count {
            self.offer_next();
        }
        if count > 0 {
            self.card.tx.publish()?;
        }
        Ok(count)
    }

    fn send_one(&mut self) -> Result<()> {
        self.offer_next();
        self.card.tx.publish()
    }

    /// Sends the next slot, in turn: half of them are free, and the device ends them in order.
    #[inline]
    fn offer_next(&mut self) {
        let tx = &mut self.card.tx;
        let slot = (self.number % u64::from(tx.ring.slots())) as u16;
        self.number += 1;
        tx.write_frame(slot, self.number);
        tx.ring.offer(slot);
    }
}

/// Takes frames that have arrived and gives so many of their buffers back at most. Returns how many frames.
#[inline]
pub(super) fn received(rx: &mut Queue, again: usize) -> Result<usize> {
    let mut ended = [(0, 0); BATCH];
    let count = rx.ring.take(&mut ended, |_| ())?;
    if count > 0 {
        for (at, (slot, bytes)) in ended[..count].iter().enumerate() {
            ensure!(*bytes as usize > HEADER_BYTES, "A buffer of {bytes} bytes has no frame");
            std::hint::black_box(rx.read_frame(*slot));
            if at < again {
                rx.ring.offer(*slot);
            }
        }
        rx.publish()?;
    }
    Ok(count)
}
