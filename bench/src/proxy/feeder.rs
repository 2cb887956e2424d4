//! Feeds a process that compares with packets of both sides over its sockets, and counts what it releases.
#![expect(unsafe_code, reason = "what waits in a socket is told by an ioctl")]

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::filter::{self, Filled, Incoming};
use super::{Packets, Traffic};
use crate::clock::{ticks, ticks_in};
use crate::{Histogram, Server};

/// Packets that are under way at most: fewer than colo-compare keeps of one connection (`max_queue_size`, 1,024).
const WINDOW: u64 = 512;
/// Packets that are written at once.
const BATCH: u64 = 32;
/// Turns of waiting before a socket is looked at again: some microseconds.
const SPINS: usize = 200;
/// How long a case runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);
/// How long to wait for something that must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A frame that colo-compare passes on at once, since it compares no ARP.
const PASSED: [u8; 42] = {
    let mut frame = [0; 42];
    (frame[12], frame[13]) = (0x08, 0x06);
    frame
};

/// What was measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    /// Packets that were released in a second.
    pub packets_per_s: f64,
    /// Processor time of the process for each, in nanoseconds.
    pub cpu_ns: f64,
}

/// Which side a packet is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Primary,
    Secondary,
}

/// The other end of a comparison's sockets.
#[derive(Debug)]
pub struct Feeder {
    primary: UnixStream,
    secondary: UnixStream,
    output: Incoming,
    sent: u64,
    released: u64,
    /// Frames that were passed on without comparison.
    passed: u64,
    batch: Vec<u8>,
}

impl Feeder {
    pub(super) fn connect([primary, secondary, output]: &[PathBuf; 3]) -> Result<Self> {
        let connect = |path: &PathBuf| -> Result<UnixStream> {
            let deadline = Instant::now() + PATIENCE;
            loop {
                match UnixStream::connect(path) {
                    Ok(stream) => {
                        stream.set_nonblocking(true).context("A socket")?;
                        return Ok(stream);
                    }
                    // the socket is there, and nobody listens yet
                    Err(error)
                        if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline =>
                    {
                        std::thread::yield_now();
                    }
                    Err(error) => return Err(error).with_context(|| path.display().to_string()),
                }
            }
        };
        Ok(Self {
            output: Incoming::new(connect(output)?),
            secondary: connect(secondary)?,
            primary: connect(primary)?,
            sent: 0,
            released: 0,
            passed: 0,
            batch: Vec::new(),
        })
    }

    /// Waits until a frame that is not compared has passed, and with it everything that the primary sent before.
    ///
    /// # Errors
    /// None does.
    pub(super) fn await_passage(&mut self) -> Result<()> {
        let (before, began) = (self.passed, Instant::now());
        let mut attempts = 0;
        while self.passed == before {
            ensure!(began.elapsed() < PATIENCE, "Nothing passes within {PATIENCE:?}");
            // one that is released while nobody reads is lost
            if began.elapsed() >= Duration::from_millis(100) * attempts {
                attempts += 1;
                self.batch.clear();
                filter::push(&PASSED, &mut self.batch);
                self.write(Side::Primary)?;
            }
            self.take()?;
        }
        Ok(())
    }

    /// Begins the connections of this traffic, if it has any, and waits until that is released.
    ///
    /// # Errors
    /// It is not.
    pub fn open(&mut self, packets: &Packets) -> Result<()> {
        for openings in packets.openings()?.chunks(BATCH as usize) {
            self.batch.clear();
            openings.iter().for_each(|frame| filter::push(frame, &mut self.batch));
            self.sent += openings.len() as u64;
            self.write(Side::Primary)?;
            self.write(Side::Secondary)?;
            self.drain()?;
        }
        Ok(())
    }

    /// Feeds both sides' packets as fast as they are released.
    ///
    /// # Errors
    /// A packet is not released.
    pub fn rate(&mut self, packets: &mut Packets, server: &Server, duration: Duration) -> Result<Rate> {
        self.run(packets, WARM_UP)?;
        let (began, cpu, released) = (Instant::now(), server.cpu_time()?, self.released);
        self.run(packets, duration)?;
        let (elapsed, cpu, released) = (began.elapsed(), server.cpu_time()? - cpu, self.released - released);
        self.drain()?;
        let released = released as f64;
        Ok(Rate {
            packets_per_s: released / elapsed.as_secs_f64(),
            cpu_ns: cpu.as_nanos() as f64 / released.max(1.0),
        })
    }

    fn run(&mut self, packets: &mut Packets, duration: Duration) -> Result<()> {
        let end = ticks() + ticks_in(duration);
        let (mut released, mut last) = (self.released, Instant::now());
        while ticks() < end {
            if self.sent - self.released + BATCH <= WINDOW {
                self.push_next(packets, BATCH);
                self.write(Side::Primary)?;
                self.write(Side::Secondary)?;
            }
            self.take()?;
            if self.released != released {
                (released, last) = (self.released, Instant::now());
                continue;
            }
            // who looks all the time is in the way of who writes
            (0..SPINS).for_each(|_| std::hint::spin_loop());
            if last.elapsed() > PATIENCE {
                bail!("{} of {} packets have not come", self.sent - self.released, self.sent);
            }
        }
        Ok(())
    }

    /// One packet at a time: how long from the secondary's to the release, in ticks. The primary's has been read before.
    ///
    /// # Errors
    /// A packet is not released.
    pub fn latencies(&mut self, packets: &mut Packets, duration: Duration) -> Result<Histogram> {
        self.one_at_a_time(packets, WARM_UP)?;
        self.one_at_a_time(packets, duration)
    }

    fn one_at_a_time(&mut self, packets: &mut Packets, duration: Duration) -> Result<Histogram> {
        let mut latencies = Histogram::default();
        let (end, patience) = (ticks() + ticks_in(duration), ticks_in(PATIENCE));
        loop {
            self.push_next(packets, 1);
            self.write(Side::Primary)?;
            while unread_bytes(&self.primary)? > 0 {
                std::hint::spin_loop();
            }
            let began = ticks();
            self.write(Side::Secondary)?;
            while self.released < self.sent {
                self.take()?;
                ensure!(ticks() - began < patience, "A packet has not come");
            }
            latencies.record(ticks() - began);
            if ticks() >= end {
                return Ok(latencies);
            }
        }
    }

    /// Sends so many packets on one flow about which the two sides do not agree.
    ///
    /// # Errors
    /// Nobody reads them.
    pub fn mismatch(&mut self, traffic: Traffic, count: u64) -> Result<()> {
        let mut packets = Packets::new(traffic)?;
        self.open(&packets)?;
        self.push_next(&mut packets, count);
        // held for ever
        self.sent -= count;
        self.write(Side::Primary)?;
        let frame_bytes = packets.frame_bytes() + 4;
        self.batch.chunks_mut(frame_bytes).for_each(|frame| frame[frame_bytes - 1] ^= 0xff);
        self.write(Side::Secondary)?;
        self.await_read()
    }

    /// The primary sends a packet on each flow, and then the secondary does. `between` is called while all should be
    /// held. Returns how many were released; only for colo-compare.
    ///
    /// # Errors
    /// Nobody reads them.
    pub fn hold_all(
        &mut self,
        packets: &Packets,
        flows: u32,
        mut between: impl FnMut() -> Result<()>,
    ) -> Result<u64> {
        let released = self.released;
        for side in [Side::Primary, Side::Secondary] {
            let mut packets = packets.clone();
            let mut left = u64::from(flows);
            while left > 0 {
                let count = left.min(BATCH);
                self.push_next(&mut packets, count);
                self.write(side)?;
                self.take()?;
                left -= count;
            }
            self.await_read()?;
            self.await_passage()?;
            if side == Side::Primary {
                between()?;
            }
        }
        let released = self.released - released;
        self.sent = self.released;
        Ok(released)
    }

    fn push_next(&mut self, packets: &mut Packets, count: u64) {
        self.batch.clear();
        for _ in 0..count {
            filter::push_length(packets.frame_bytes(), &mut self.batch);
            packets.push_next(&mut self.batch);
        }
        self.sent += count;
    }

    /// Waits until all that was sent is released.
    fn drain(&mut self) -> Result<()> {
        let began = Instant::now();
        while self.released < self.sent {
            self.take()?;
            ensure!(
                began.elapsed() < PATIENCE,
                "{} of {} packets have not come",
                self.sent - self.released,
                self.sent
            );
        }
        Ok(())
    }

    /// Waits until all that was sent has been read.
    fn await_read(&mut self) -> Result<()> {
        let began = Instant::now();
        while unread_bytes(&self.primary)? + unread_bytes(&self.secondary)? > 0 {
            self.take()?;
            ensure!(began.elapsed() < PATIENCE, "Packets are not read");
        }
        Ok(())
    }

    /// Sends the batch; takes what is released meanwhile, so that the other side can go on.
    fn write(&mut self, side: Side) -> Result<()> {
        let (mut written, mut began) = (0, None);
        while written < self.batch.len() {
            let mut stream = if side == Side::Primary { &self.primary } else { &self.secondary };
            match stream.write(&self.batch[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.take()?;
                    let began = began.get_or_insert_with(Instant::now);
                    ensure!(began.elapsed() < PATIENCE, "Nobody reads what the {side:?} sends");
                }
                Err(error) => return Err(error).with_context(|| format!("The socket of the {side:?}")),
            }
        }
        Ok(())
    }

    /// Takes what is released by now.
    #[inline]
    fn take(&mut self) -> Result<()> {
        if self.output.fill().context("The output's socket")? == Filled::End {
            bail!("The comparison has closed its output");
        }
        while let Some(frame) = self.output.next_frame()? {
            if frame.len() == PASSED.len() {
                self.passed += 1;
            } else {
                self.released += 1;
            }
        }
        ensure!(self.released <= self.sent, "{} packets have come, of {}", self.released, self.sent);
        Ok(())
    }
}

/// What was written to a socket and not read yet (in the kernel's bookkeeping, so only 0 says something exact).
fn unread_bytes(stream: &UnixStream) -> Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int to where the third argument points, and `bytes` lives until it returns.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    ensure!(result == 0, "TIOCOUTQ: {}", io::Error::last_os_error());
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::super::{Protocol, process};
    use super::*;

    #[test]
    fn what_both_say_is_released_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = ["primary", "secondary", "output"].map(|name| directory.path().join(name));
        let ends = sockets.clone();
        let comparison = std::thread::spawn(move || process::serve(&ends, 0));
        let began = Instant::now();
        while !sockets[2].exists() {
            assert!(began.elapsed() < PATIENCE && !comparison.is_finished());
            std::thread::yield_now();
        }
        let mut feeder = Feeder::connect(&sockets).unwrap();
        for (protocol, payload_bytes, first) in
            [(Protocol::Tcp, 0, 100), (Protocol::Tcp, 1448, 200), (Protocol::Udp, 64, 300)]
        {
            let mut packets =
                Packets::new(Traffic { protocol, payload_bytes, flows: 7 }).unwrap().from_flow(first);
            feeder.open(&packets).unwrap();
            feeder.run(&mut packets, Duration::from_millis(20)).unwrap();
            feeder.drain().unwrap();
        }
        let sent = feeder.sent;
        assert!(feeder.released == sent && sent > 0);
        let stuck = Traffic { protocol: Protocol::Tcp, payload_bytes: 64, flows: 1 };
        feeder.mismatch(stuck, 20).unwrap();
        // the opening, and no more
        assert_eq!((feeder.sent, feeder.released), (sent + 1, sent + 1));
        let mut packets = Packets::new(stuck).unwrap().from_flow(400);
        let latencies = feeder.latencies(&mut packets, Duration::from_millis(5)).unwrap();
        assert!(latencies.count() > 0);
        drop(feeder);
        comparison.join().unwrap().unwrap();
    }
}
