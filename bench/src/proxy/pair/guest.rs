//! A guest without a VM that serves TCP: smoltcp on a card, a thread of its own. Two of them that are told the same say the
//! same, but for the initial sequence numbers that they choose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use super::REQUEST_BYTES;
use crate::clock::ticks;
use crate::net::{Card, GUEST, GUEST_MAC, Nic};

/// Where each service listens.
pub(super) const SINK_PORT: u16 = 5001;
pub(super) const SOURCE_PORT: u16 = 5002;
pub(super) const ECHO_PORT: u16 = 5003;

/// What a socket receives into: the most for which smoltcp does not scale the window. A scaled one it rounds down, by which
/// its right edge moves back a few bytes; then the SVM may leave bytes to be sent again that the PVM has acknowledged, and
/// the pair needs a checkpoint.
const RECEIVE_BYTES: usize = 65_535;
const SEND_BYTES: usize = 256 << 10;
/// How soon a guest notices that it shall end.
const IDLE: Duration = Duration::from_millis(50);

/// A running guest.
pub(super) struct Guest {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<u64>>>>,
}

impl Guest {
    /// Boots it; `seed` decides about what its stack leaves to chance.
    pub(super) fn start(card: Card, seed: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let nic = Nic::new(card)?;
        let until = stop.clone();
        let thread =
            std::thread::Builder::new().name("guest".into()).spawn(move || run(nic, seed, &until))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it. Returns when it wrote each reply to a request, in ticks.
    pub(super) fn end(mut self) -> Result<Vec<u64>> {
        self.join()
    }

    fn join(&mut self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("A guest panicked"))?,
            None => Ok(Vec::new()),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("A guest: {error:#}");
        }
    }
}

fn run(mut nic: Nic, seed: u64, stop: &AtomicBool) -> Result<Vec<u64>> {
    let origin = Instant::now();
    let now = || smoltcp::time::Instant::from_micros(origin.elapsed().as_micros() as i64);
    let mut config = Config::new(EthernetAddress(GUEST_MAC).into());
    config.random_seed = seed;
    let mut interface = Interface::new(config, &mut nic, now());
    interface.update_ip_addrs(|addresses| {
        // the first of at least one
        let _ = addresses.push(IpCidr::new(Ipv4Address::from(GUEST).into(), 24));
    });
    let mut sockets = SocketSet::new(Vec::new());
    let mut listen = |port| -> Result<_> {
        let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
        socket.set_nagle_enabled(false);
        socket.listen(port).map_err(|error| anyhow!("Port {port}: {error}"))?;
        Ok(sockets.add(socket))
    };
    let (sink, source, echo) = (listen(SINK_PORT)?, listen(SOURCE_PORT)?, listen(ECHO_PORT)?);
    let (mut taken, mut wanted, mut replies) = (Sink::default(), Source::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        interface.poll(now(), &mut nic, &mut sockets);
        let mut any = taken.serve(sockets.get_mut(sink))?;
        any |= wanted.serve(sockets.get_mut(source))?;
        any |= serve_echo(sockets.get_mut(echo), &mut replies)?;
        if any {
            // what it says to that
            interface.poll(now(), &mut nic, &mut sockets);
        }
        nic.publish()?;
        if !any {
            let delay = interface.poll_delay(now(), &sockets);
            let limit = delay.map_or(IDLE, |delay| Duration::from_micros(delay.total_micros()).min(IDLE));
            if !limit.is_zero() {
                nic.wait(limit)?;
            }
        }
    }
    nic.close()?;
    Ok(replies)
}

/// Takes all that comes, and says how much it was.
#[derive(Default)]
struct Sink {
    bytes: u64,
    told: bool,
}

impl Sink {
    /// Whether something was done.
    fn serve(&mut self, socket: &mut Socket<'_>) -> Result<bool> {
        let before = self.bytes;
        while socket.can_recv() {
            self.bytes += socket.recv(|data| (data.len(), data.len() as u64))?;
        }
        let ended = self.bytes > 0 && !socket.may_recv() && socket.may_send();
        if ended && !self.told {
            socket.send_slice(&self.bytes.to_be_bytes())?;
            socket.close();
            self.told = true;
            return Ok(true);
        }
        Ok(self.bytes > before)
    }
}

/// Says as much as it is asked for: a number of bytes, 64 bits, as often as wanted.
struct Source {
    wanted: u64,
    position: usize,
    pattern: Vec<u8>,
}

impl Source {
    fn new() -> Self {
        // no two segments in a row are the same
        let pattern = (0..65_521u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        Self { wanted: 0, position: 0, pattern }
    }

    /// Whether something was done.
    fn serve(&mut self, socket: &mut Socket<'_>) -> Result<bool> {
        let mut any = false;
        while socket.recv_queue() >= size_of::<u64>() {
            let mut request = [0; size_of::<u64>()];
            socket.recv_slice(&mut request)?;
            self.wanted += u64::from_be_bytes(request);
            any = true;
        }
        while self.wanted > 0 && socket.can_send() {
            let (wanted, rest) = (self.wanted, &self.pattern[self.position..]);
            let sent = socket.send(|room| {
                let bytes = room.len().min(rest.len()).min(usize::try_from(wanted).unwrap_or(usize::MAX));
                room[..bytes].copy_from_slice(&rest[..bytes]);
                (bytes, bytes)
            })?;
            self.wanted -= sent as u64;
            self.position = (self.position + sent) % self.pattern.len();
            any = true;
        }
        if self.wanted == 0 && !socket.may_recv() && socket.may_send() {
            socket.close();
            any = true;
        }
        Ok(any)
    }
}

/// Gives each request back. Whether something was done.
fn serve_echo(socket: &mut Socket<'_>, replies: &mut Vec<u64>) -> Result<bool> {
    let mut any = false;
    while socket.recv_queue() >= REQUEST_BYTES
        && socket.send_capacity() - socket.send_queue() >= REQUEST_BYTES
    {
        let mut request = [0; REQUEST_BYTES];
        socket.recv_slice(&mut request)?;
        socket.send_slice(&request)?;
        replies.push(ticks());
        any = true;
    }
    if !socket.may_recv() && socket.may_send() {
        socket.close();
        any = true;
    }
    Ok(any)
}
