//! The connections and the one thread that serves them: it sleeps until something comes or has waited too long.

use std::convert::Infallible;
use std::io::{self, Read};
use std::time::Instant;

use anyhow::Context;
use colo::control::{Command, Event, EventSender};
use colo::runtime::Mailbox;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use smallvec::{SmallVec, smallvec};

use super::comparison::Comparison;
use super::control::Order;
use super::endpoint::Endpoint;
use super::framing::{Decoder, Packet};
use super::monitor::{Monitor, News};
use super::notify::{self, Message, NotifyDecoder};
use super::outgoing::Outgoing;
use super::socket::Socket;
use crate::proxy::Config;

/// Reads of what a paused VM has sent before it was paused, 256 KiB each, so that one that was not paused does not keep us.
const LAST_READS_MAX: usize = 256;

/// Where everything comes from and goes to.
#[derive(Clone, Debug)]
pub struct Ends {
    /// What the PVM sends.
    pub primary_in: Endpoint,
    /// What the SVM sends.
    pub secondary_in: Endpoint,
    /// What may leave.
    pub out: Endpoint,
    /// Whoever takes checkpoints, in Xen's words.
    pub notify: Option<Endpoint>,
    /// A monitor of the primary's QEMU, whose own COLO migration takes checkpoints.
    pub monitor: Option<Endpoint>,
    /// Whether virtio-net headers stand in front of the frames.
    pub vnet_hdr: bool,
}

/// A connection that packets come from.
#[derive(Debug)]
struct Input {
    name: &'static str,
    socket: Socket,
    decoder: Decoder,
    packets: u64,
    malformed: u64,
}

impl Input {
    fn open(name: &'static str, endpoint: &Endpoint, vnet_hdr: bool) -> anyhow::Result<Self> {
        let socket = open(name, endpoint)?;
        Ok(Self { name, socket, decoder: Decoder::new(vnet_hdr), packets: 0, malformed: 0 })
    }

    /// Makes the connection if it can be made now. Returns whether it is not the first.
    fn connect(&mut self, now_us: u64) -> bool {
        let connected = self.socket.advance(now_us);
        if connected {
            tracing::info!("{}: connected", self.name);
            self.decoder.restart();
        }
        connected && self.socket.connections() > 1
    }

    /// Reads once. Returns whether something came.
    ///
    /// # Errors
    /// The connection is given up; the error says why.
    fn fill(&mut self, now_us: u64) -> Result<bool, String> {
        let Some(stream) = self.socket.stream() else {
            return Ok(false);
        };
        let reason = match self.decoder.fill(stream) {
            Ok(0) => "QEMU has closed it".to_owned(),
            Ok(_) => return Ok(true),
            Err(error) if is_nothing_yet(&error) => return Ok(false),
            Err(error) => error.to_string(),
        };
        Err(lost(self.name, &mut self.socket, &reason, now_us))
    }

    /// Hands over every whole packet that was read.
    ///
    /// # Errors
    /// The connection is given up; the error says why.
    fn take(&mut self, now_us: u64, mut each: impl FnMut(Packet<'_>)) -> Result<(), String> {
        loop {
            match self.decoder.next_packet() {
                Ok(None) => return Ok(()),
                Ok(Some(packet)) => {
                    self.packets += 1;
                    each(packet);
                }
                Err(error) => {
                    self.malformed += 1;
                    return Err(lost(self.name, &mut self.socket, &error.to_string(), now_us));
                }
            }
        }
    }

    fn status(&self) -> Value {
        let mut status = status(&self.socket);
        status["packets"] = self.packets.into();
        status["malformed"] = self.malformed.into();
        status
    }
}

/// A connection that is written to.
#[derive(Debug)]
struct Output {
    name: &'static str,
    socket: Socket,
    outgoing: Outgoing,
}

impl Output {
    fn open(name: &'static str, endpoint: &Endpoint, vnet_hdr: bool) -> anyhow::Result<Self> {
        Ok(Self { name, socket: open(name, endpoint)?, outgoing: Outgoing::new(vnet_hdr) })
    }

    fn connect(&mut self, now_us: u64) -> bool {
        let connected = self.socket.advance(now_us);
        if connected {
            tracing::info!("{}: connected", self.name);
        }
        connected
    }

    fn wanted(&self) -> PollFlags {
        // to be read is nothing but its end
        if self.outgoing.len() > 0 { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// Sends what can be sent.
    ///
    /// # Errors
    /// The connection is given up; the error says why.
    fn send(&mut self, now_us: u64) -> Result<(), String> {
        let Some(stream) = self.socket.stream() else {
            return Ok(());
        };
        self.outgoing.send(stream).map_err(|error| self.lost(&error.to_string(), now_us))
    }

    /// Reads once. Returns how much came; 0 is nothing.
    ///
    /// # Errors
    /// The connection is given up; the error says why.
    fn read(&mut self, bytes: &mut [u8], now_us: u64) -> Result<usize, String> {
        let Some(stream) = self.socket.stream() else {
            return Ok(0);
        };
        match stream.read(bytes) {
            Ok(0) => Err(self.lost("The other end has closed it", now_us)),
            Ok(read) => Ok(read),
            Err(error) if is_nothing_yet(&error) => Ok(0),
            Err(error) => Err(self.lost(&error.to_string(), now_us)),
        }
    }

    fn lost(&mut self, reason: &str, now_us: u64) -> String {
        self.outgoing.rewind();
        lost(self.name, &mut self.socket, reason, now_us)
    }

    fn status(&self) -> Value {
        let mut status = status(&self.socket);
        status["waiting_bytes"] = self.outgoing.len().into();
        status
    }
}

fn open(name: &'static str, endpoint: &Endpoint) -> anyhow::Result<Socket> {
    Socket::open(endpoint).with_context(|| format!("{name}: {endpoint} cannot be opened"))
}

fn is_nothing_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn lost(name: &str, socket: &mut Socket, reason: &str, now_us: u64) -> String {
    let reason = format!("{name}: the connection is lost: {reason}");
    tracing::warn!("{reason}");
    socket.close(reason.clone(), now_us);
    reason
}

fn status(socket: &Socket) -> Value {
    json!({
        "connected": socket.is_connected(),
        "connections": socket.connections(),
        "trouble": socket.trouble(),
    })
}

/// What a sleep was ended by. A connection that was lost or made is ready too.
#[derive(Clone, Copy, Debug)]
struct Ready {
    orders: bool,
    primary: bool,
    secondary: bool,
    out: bool,
    notify: bool,
    monitor: bool,
}

/// The whole program but for its command line.
#[derive(Debug)]
pub struct Filter {
    origin: Instant,
    comparison: Comparison,
    primary: Input,
    secondary: Input,
    out: Output,
    notify: Option<(Output, NotifyDecoder)>,
    monitor: Option<(Output, Monitor)>,
    orders: Mailbox<Order>,
    events: EventSender,
    /// The PVM is paused for a checkpoint: what comes now would belong to the next epoch.
    paused: bool,
}

impl Filter {
    /// Listens where it is to listen.
    ///
    /// # Errors
    /// An address is taken, or means nothing.
    pub fn open(
        ends: &Ends,
        config: &Config,
        orders: Mailbox<Order>,
        events: EventSender,
    ) -> anyhow::Result<Self> {
        let Ends { primary_in, secondary_in, out, notify, monitor, vnet_hdr } = ends;
        let notify = notify.as_ref().map(|notify| Output::open("notify", notify, false)).transpose()?;
        let monitor = monitor.as_ref().map(|monitor| Output::open("qmp", monitor, false)).transpose()?;
        Ok(Self {
            origin: Instant::now(),
            comparison: Comparison::new(config, *vnet_hdr, 0),
            primary: Input::open("primary-in", primary_in, *vnet_hdr)?,
            secondary: Input::open("secondary-in", secondary_in, *vnet_hdr)?,
            out: Output::open("out", out, *vnet_hdr)?,
            notify: notify.map(|notify| (notify, NotifyDecoder::default())),
            monitor: monitor.map(|monitor| (monitor, Monitor::new())),
            orders,
            events,
            paused: false,
        })
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// The system refuses to wait.
    pub fn run(mut self) -> io::Result<Infallible> {
        loop {
            self.turn()?;
        }
    }

    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    /// Sleeps until something is to be done, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let ready = self.sleep()?;
        let now_us = self.now_us();
        self.connect(now_us);
        // The SVM's words first: what it said before a checkpoint must not count after it.
        if ready.secondary {
            let filled = self.secondary.fill(now_us);
            if self.tell_loss(filled) {
                let taken = self.secondary.take(now_us, |packet| {
                    self.comparison.svm_says(packet, now_us, self.out.outgoing.queue());
                });
                self.tell_loss(taken.map(|()| true));
            }
        }
        // Then the PVM's packets are read, but looked at only after the news of a checkpoint. It is told before the VM runs
        // again, so whatever was read before the news came is of the epoch that has ended.
        let filled = ready.primary && !self.paused && self.fill_primary(now_us);
        if ready.notify || filled {
            self.hear_notify(now_us);
        }
        if ready.monitor || filled {
            self.hear_monitor(now_us);
        }
        if ready.orders {
            self.orders.rearm();
        }
        while let Some(Order { command, reply }) = self.orders.try_recv() {
            // a controller that has gone needs no answer
            let _ = reply.send(self.command(&command, now_us));
        }
        if filled {
            self.take_primary(now_us);
        }
        if self.comparison.next_deadline().is_some_and(|deadline| deadline <= now_us) {
            self.comparison.tick(now_us, self.out.outgoing.queue());
        }
        self.tell_wish(now_us);
        if ready.out {
            // QEMU says nothing here: what is read is nothing, or the end
            let said = self.out.read(&mut [0; 1024], now_us);
            self.tell_loss(said.map(|bytes| bytes > 0));
        }
        self.send(now_us);
        Ok(())
    }

    /// Waits for descriptors and deadlines.
    fn sleep(&self) -> io::Result<Ready> {
        let input = if self.paused { PollFlags::empty() } else { PollFlags::IN };
        let sockets = [
            Some((&self.primary.socket, input)),
            Some((&self.secondary.socket, PollFlags::IN)),
            Some((&self.out.socket, self.out.wanted())),
            self.notify.as_ref().map(|(notify, _)| (&notify.socket, notify.wanted())),
            self.monitor.as_ref().map(|(output, _)| (&output.socket, output.wanted())),
        ];
        let deadlines = sockets.iter().flatten().filter_map(|(socket, _)| socket.deadline());
        let repeat = self.monitor.as_ref().and_then(|(_, monitor)| monitor.deadline());
        let repeat = repeat.filter(|_| self.comparison.awaits_checkpoint());
        let deadline = deadlines.chain(self.comparison.next_deadline()).chain(repeat).min();
        let wait = deadline.map(|deadline| {
            let us = deadline.saturating_sub(self.now_us());
            Timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000 * 1000) as i64 }
        });
        let mut fds: SmallVec<[PollFd<'_>; 6]> = smallvec![PollFd::new(&self.orders, PollFlags::IN)];
        let places = sockets.map(|socket| {
            let (fd, wanted) = socket.and_then(|(socket, wanted)| socket.interest(wanted))?;
            fds.push(PollFd::from_borrowed_fd(fd, wanted));
            Some(fds.len() - 1)
        });
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |place: usize| !fds[place].revents().is_empty();
        let [primary, secondary, out, notify, monitor] = places.map(|place| place.is_some_and(ready));
        Ok(Ready { orders: ready(0), primary, secondary, out, notify, monitor })
    }

    fn connect(&mut self, now_us: u64) {
        for input in [&mut self.primary, &mut self.secondary] {
            if input.connect(now_us) {
                self.comparison.lost(format!("{} was interrupted", input.name));
            }
        }
        self.out.connect(now_us);
        if let Some((notify, decoder)) = &mut self.notify
            && notify.connect(now_us)
        {
            *decoder = NotifyDecoder::default();
            // what was on its way on the last connection may not have arrived
            notify.outgoing.clear();
            if self.comparison.awaits_checkpoint() {
                notify::encode_wish(notify.outgoing.queue());
            }
        }
        if let Some((output, monitor)) = &mut self.monitor
            && output.connect(now_us)
        {
            *monitor = Monitor::new();
            output.outgoing.clear();
        }
    }

    /// Reads what the PVM has sent. Returns whether there was something.
    fn fill_primary(&mut self, now_us: u64) -> bool {
        let filled = self.primary.fill(now_us);
        self.tell_loss(filled)
    }

    /// Hands over what was read.
    fn take_primary(&mut self, now_us: u64) {
        let taken = self.primary.take(now_us, |packet| {
            self.comparison.pvm_says(packet, now_us, self.out.outgoing.queue());
        });
        self.tell_loss(taken.map(|()| true));
    }

    /// A checkpoint of the running epoch is committed, and the VM is about to run.
    fn commit_running(&mut self, who: &str, now_us: u64) {
        let epoch = self.comparison.epoch();
        if let Err(error) = self.comparison.commit(epoch, now_us, self.out.outgoing.queue()) {
            tracing::warn!("{who}: a checkpoint without effect: {error}");
        }
        self.paused = false;
    }

    fn hear_monitor(&mut self, now_us: u64) {
        let Some((output, monitor)) = &mut self.monitor else {
            return;
        };
        let mut bytes = [0; 4096];
        let mut news = Vec::new();
        // as much as there is: one event may hide behind another
        while let Ok(read @ 1..) = output.read(&mut bytes, now_us) {
            monitor.push(&bytes[..read]);
            loop {
                match monitor.next_news(now_us, output.outgoing.queue()) {
                    Ok(Some(told)) => news.push(told),
                    Ok(None) => break,
                    Err(error) => {
                        *monitor = Monitor::new();
                        output.lost(&error.to_string(), now_us);
                        break;
                    }
                }
            }
        }
        for told in news {
            match told {
                News::Committed => self.commit_running("qmp", now_us),
                News::GoesOnAlone => {
                    tracing::info!("qmp: the primary goes on alone");
                    self.comparison.take_over(now_us, self.out.outgoing.queue());
                }
                News::Failed => {
                    tracing::error!(
                        "qmp: QEMU's COLO has failed: nothing leaves until it is decided who goes on"
                    );
                    self.comparison.detach();
                }
            }
        }
    }

    fn hear_notify(&mut self, now_us: u64) {
        let Some((notify, decoder)) = &mut self.notify else {
            return;
        };
        let mut bytes = [0; 1024];
        let read = notify.read(&mut bytes, now_us);
        decoder.push(&bytes[..*read.as_ref().unwrap_or(&0)]);
        let mut committed = 0;
        loop {
            match decoder.next_message() {
                Ok(None) => break,
                Ok(Some(Message::Init)) => notify::encode_ready(notify.outgoing.queue()),
                Ok(Some(Message::Checkpoint)) => committed += 1,
                Ok(Some(Message::Unknown)) => tracing::warn!("notify: a message that is not known"),
                Err(error) => {
                    *decoder = NotifyDecoder::default();
                    notify.lost(&error.to_string(), now_us);
                    break;
                }
            }
        }
        for _ in 0..committed {
            self.commit_running("notify", now_us);
        }
    }

    fn command(&mut self, command: &Command, now_us: u64) -> Result<Value, String> {
        match command {
            Command::Status => return Ok(self.status()),
            Command::Marker { epoch } => {
                // some may have been read already
                self.take_primary(now_us);
                for _ in 0..LAST_READS_MAX {
                    if !self.fill_primary(now_us) {
                        break;
                    }
                    self.take_primary(now_us);
                }
                let out = self.out.outgoing.queue();
                self.comparison.marker(*epoch, out).map_err(|error| error.to_string())?;
                self.paused = true;
            }
            Command::Commit { epoch } => {
                let out = self.out.outgoing.queue();
                self.comparison.commit(*epoch, now_us, out).map_err(|error| error.to_string())?;
                self.paused = false;
            }
            Command::Detach => self.comparison.detach(),
            Command::TakeOver => {
                self.comparison.take_over(now_us, self.out.outgoing.queue());
                self.paused = false;
            }
            Command::Silence => self.comparison.silence(),
            Command::Attach { .. }
            | Command::DirtyLog { .. }
            | Command::Resize { .. }
            | Command::Link { .. } => {
                return Err(
                    "This program takes the place of QEMU's colo-compare and has nothing to do that for"
                        .into(),
                );
            }
        }
        Ok(json!({}))
    }

    fn status(&self) -> Value {
        let mut status = self.comparison.status();
        status["paused"] = self.paused.into();
        status["primary_in"] = self.primary.status();
        status["secondary_in"] = self.secondary.status();
        status["out"] = self.out.status();
        status["qmp"] = self.monitor.as_ref().map(|(output, _)| output.status()).into();
        status["notify"] = self.notify.as_ref().map(|(notify, _)| notify.status()).into();
        status
    }

    /// Tells the controller of a connection that is lost. Returns whether something came of the other outcome.
    fn tell_loss(&self, outcome: Result<bool, String>) -> bool {
        outcome.unwrap_or_else(|reason| {
            self.events.send(&Event::LinkLost { reason });
            false
        })
    }

    fn tell_wish(&mut self, now_us: u64) {
        if let Some((output, monitor)) = &mut self.monitor
            && self.comparison.awaits_checkpoint()
        {
            monitor.ask(now_us, output.outgoing.queue());
        }
        let Some(wish) = self.comparison.take_wish() else {
            return;
        };
        tracing::info!("A checkpoint is wanted: {}: {}", wish.cause, wish.detail);
        if let Some((notify, _)) = &mut self.notify {
            notify::encode_wish(notify.outgoing.queue());
        }
        self.events.send(&Event::CheckpointWanted { cause: wish.cause.into(), detail: wish.detail });
    }

    fn send(&mut self, now_us: u64) {
        let sent = self.out.send(now_us);
        self.tell_loss(sent.map(|()| true));
        let notify = self.notify.as_mut().map(|(notify, _)| notify);
        for output in notify.into_iter().chain(self.monitor.as_mut().map(|(output, _)| output)) {
            // it is told in the log; whoever it was is connected again
            let _ = output.send(now_us);
        }
    }
}
