//! The thread that moves frames between the guest's rings, the tap and the peer, one pass over everything at a time.
//!
//! A frame is taken from the tap only when the guest has a buffer for it, so that frames wait in the tap and not here.
//! On the primary this is also what makes a checkpoint whole: a frame is mirrored exactly when it is put into the PVM's
//! ring, so that it is either in the PVM's state at the marker or mirrored after it.

mod buffers;
mod frames;
mod null;
mod pair;
mod plain;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use colo::control::{Command, EventSender};
use colo::runtime::{Mailbox, Polling};
use colo::vhost_user::{Chain, Ring};
use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde_json::{Value, json};

use self::buffers::Buffers;
use crate::control_queue::Filter;
use crate::device::RX;
use crate::frame::{FRAME_BYTES_MAX, HEADER_BYTES};
use crate::lan::{Losses, Outgoing, Port};
use crate::offload::Offloads;
use crate::protection::{Lan, Protection};
use crate::proxy::Config;

/// So many frames are moved in one direction before the others get their turn, and the guest is told of all of them at once.
const BATCH_FRAMES: usize = 64;

/// What the worker is told.
#[derive(Debug)]
pub enum Order {
    /// A queue is ready.
    Start {
        /// Which.
        queue: usize,
        /// Its ring.
        ring: Box<Ring>,
    },
    /// Give a queue back.
    Stop {
        /// Which.
        queue: usize,
        /// Where the next available index goes.
        done: Sender<u16>,
    },
    /// The driver's choice of features; no queue runs.
    Features(u64),
    /// What the driver has said by the control queue. It holds from the answer on, until it says something else or there are
    /// other features.
    Receive {
        /// Which frames it wants; all, if there is none.
        filter: Option<Arc<Filter>>,
        /// Whether this pair is to receive.
        receives: bool,
        /// Where the answer goes.
        done: Sender<()>,
    },
    /// No queue runs. Until the control queue does again, all frames are admitted.
    Quiesced,
    /// Tell the LAN that the guest with this hardware address is here.
    Announce([u8; 6]),
    /// The cable of a plain back end is in, or out.
    Link(bool),
    /// A controller's command.
    Command {
        /// Which.
        command: Command,
        /// The connection to the peer, with `attach`.
        link: Option<OwnedFd>,
        /// Where the answer goes.
        reply: Sender<Result<Value, String>>,
    },
    /// The controller's connection has ended.
    ControllerLost,
}

/// What has passed, for `status`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    /// Frames that the guest sent.
    pub guest_frames: u64,
    /// Their bytes.
    pub guest_bytes: u64,
    /// Frames that came from the LAN and were taken.
    pub lan_frames: u64,
    /// Their bytes.
    pub lan_bytes: u64,
    /// What the guest sent and is no Ethernet frame.
    pub guest_malformed: u64,
    /// Frames that did not fit into the guest's buffers.
    pub guest_too_long: u64,
    /// Frames for the guest that leave something to it that it has not negotiated, or that contradict themselves.
    pub guest_unusable: u64,
    /// Frames that the kernel did not take.
    pub lan_refused: u64,
    /// Frames for which the kernel had no room until the guest took them, where it tells us.
    pub lan_missed: u64,
    /// Frames from an interface that had something left to the receiver that neither the guest nor this program does.
    pub lan_unusable: u64,
    /// Frames that came from the LAN while this side had no business there.
    pub lan_ignored: u64,
    /// Frames that came from the LAN and that the driver does not want.
    pub lan_filtered: u64,
}

/// Whether frames may pass.
#[derive(Debug)]
enum Mode {
    /// A plain back end.
    Plain,
    /// To be protected: nothing passes before a controller says how.
    Closed,
    /// One half of a pair.
    Protected(Box<Protection>),
}

/// What a worker is made of.
#[derive(Debug)]
pub struct Worker {
    port: Port,
    orders: Mailbox<Order>,
    events: EventSender,
    pair: usize,
    config: Config,
    rings: [Option<Box<Ring>>; 2],
    offloads: Offloads,
    /// Taken from the receive ring ahead.
    buffers: Buffers,
    /// What a frame for the guest may need, header included.
    frame_room: usize,
    link_up: bool,
    /// What the driver wants of the LAN's frames, if not all.
    filter: Option<Arc<Filter>>,
    /// The driver uses this pair to receive.
    receives: bool,
    outgoing: Outgoing,
    /// There is no room for the guest's next frame before the port says so.
    port_full: bool,
    mode: Mode,
    polling: Polling,
    counters: Counters,
    /// One frame with its header.
    frame: Box<[u8; HEADER_BYTES + FRAME_BYTES_MAX]>,
    /// The request in hand; between two turns nothing is in it.
    chain: Chain,
    /// And one for what goes back to the guest at once.
    back: Chain,
}

/// What a worker is told once.
#[derive(Debug)]
pub struct Settings {
    /// Which queue pair it is.
    pub pair: usize,
    /// Let nothing pass until a controller says otherwise.
    pub protected: bool,
    /// How long to look for work before sleeping, at most.
    pub window: Duration,
    /// For the proxy.
    pub proxy: Config,
}

impl Worker {
    /// A worker for one queue pair. A tap has virtio-net headers.
    pub fn new(port: Port, orders: Mailbox<Order>, events: EventSender, settings: Settings) -> Self {
        Self {
            port,
            orders,
            events,
            pair: settings.pair,
            config: settings.proxy,
            rings: [None, None],
            offloads: Offloads::negotiated(0),
            buffers: Buffers::default(),
            frame_room: 0,
            link_up: true,
            filter: None,
            receives: true,
            outgoing: Outgoing::default(),
            port_full: false,
            mode: if settings.protected { Mode::Closed } else { Mode::Plain },
            polling: Polling::new(settings.window),
            counters: Counters::default(),
            frame: vec![0; HEADER_BYTES + FRAME_BYTES_MAX].try_into().expect("as long as it is made"),
            chain: Chain::new(),
            back: Chain::new(),
        }
    }

    /// Works for ever.
    ///
    /// # Errors
    /// The tap or the interface is gone.
    pub fn run(mut self) -> io::Result<Infallible> {
        self.stop_receiving()?;
        let mut idle_since = None;
        loop {
            if self.turn()? {
                self.polling.worked();
                idle_since = None;
                continue;
            }
            let idle_since = *idle_since.get_or_insert_with(Instant::now);
            if self.polling.look_again() {
                std::hint::spin_loop();
                continue;
            }
            self.sleep()?;
            for ring in self.rings.iter_mut().flatten() {
                ring.drain_kick();
                ring.disable_notification();
            }
            self.polling.slept(idle_since.elapsed());
        }
    }

    /// Does what there is to do. Returns whether there was something.
    fn turn(&mut self) -> io::Result<bool> {
        let mut any = self.take_orders()?;
        if self.is_plain() {
            any |= self.transmit();
            any |= self.receive()?;
            return Ok(any);
        }
        any |= self.peer_input();
        any |= self.deliver();
        any |= self.guest_output();
        any |= self.lan_input()?;
        any |= self.tick();
        any |= self.flush_link();
        Ok(any)
    }

    fn take_orders(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some(order) = self.orders.try_recv() {
            any = true;
            match order {
                Order::Start { queue, ring } => {
                    if let Some(slot) = self.rings.get_mut(queue) {
                        slot.insert(ring).disable_notification();
                        if queue == RX {
                            self.frame_room = plain::frame_room(&self.port, self.offloads);
                            self.set_receiving()?;
                        }
                    }
                }
                Order::Stop { queue, done } => {
                    // nothing of a ring is in flight between two turns but buffers without a frame
                    let mut ring = self.rings.get_mut(queue).and_then(Option::take);
                    if let Some(ring) = ring.as_mut().filter(|_| queue == RX) {
                        self.buffers.put_back(ring);
                        self.stop_receiving()?;
                    }
                    let next = ring.map_or(0, |ring| ring.next_avail());
                    // it would keep the guest's memory mapped
                    self.chain.clear();
                    self.back.clear();
                    let _ = done.send(next);
                }
                Order::Features(features) => {
                    self.offloads = Offloads::negotiated(features);
                    self.port.set_offloads(self.offloads)?;
                    (self.filter, self.receives) = (None, true);
                }
                Order::Receive { filter, receives, done } => {
                    self.filter = filter;
                    let before = std::mem::replace(&mut self.receives, receives);
                    if receives != before && self.rings[RX].is_some() {
                        self.set_receiving()?;
                    }
                    let _ = done.send(());
                }
                Order::Quiesced => self.filter = None,
                Order::Link(up) => self.link_up = up,
                Order::Announce(mac) => self.announce(mac),
                Order::Command { command, link, reply } => {
                    let answer = self.command(&command, link);
                    // a marker has to be on its way, and everything released, when the controller hears of it
                    self.flush_link();
                    drop(reply.send(answer));
                }
                Order::ControllerLost => self.controller_lost(),
            }
        }
        Ok(any)
    }

    /// Has the LAN's frames come to a pair that the driver uses.
    fn set_receiving(&mut self) -> io::Result<()> {
        if self.receives { self.port.set_receiving(true) } else { self.stop_receiving() }
    }

    /// What comes for a guest that receives nothing waits in the first queue.
    fn stop_receiving(&mut self) -> io::Result<()> {
        if self.pair > 0 { self.port.set_receiving(false) } else { Ok(()) }
    }

    fn status(&mut self) -> Value {
        let Losses { missed, unusable } = self.port.losses();
        (self.counters.lan_missed, self.counters.lan_unusable) = (missed, unusable);
        let pair = match &self.mode {
            Mode::Plain => json!({ "phase": "plain" }),
            Mode::Closed => json!({ "phase": "closed" }),
            Mode::Protected(protection) => protection.status(),
        };
        json!({
            "device": "net",
            "pair": pair,
            "frames": self.counters,
            "rings_running": self.rings.iter().flatten().count(),
            "rings_broken": self.rings.iter().flatten().filter(|ring| ring.is_broken()).count(),
        })
    }

    /// Waits for something to do. Returns at once if there is something already.
    fn sleep(&mut self) -> io::Result<()> {
        if self.is_plain() {
            return self.sleep_plain();
        }
        let (lan, takes_output) = (self.lan(), self.takes_output());
        let protection = match &self.mode {
            Mode::Protected(protection) => Some(protection),
            Mode::Plain | Mode::Closed => None,
        };
        let first = protection.and_then(|protection| protection.undelivered.front());
        let waiting = first.is_some();
        let room = first.map_or(self.frame_room, |frame| self.offloads.header_bytes() + frame.len());
        let mergeable = self.offloads.mergeable();
        let [rx, tx] = &mut self.rings;
        // A buffer for the guest's next frame is no work, the frame is; so the receive queue is waited for only while it is
        // short.
        let enough = |ring: &mut Box<Ring>| {
            self.buffers.take(ring, mergeable, room)
                || ring.enable_notification() && self.buffers.take(ring, mergeable, room)
        };
        let can_receive = rx.as_mut().is_some_and(enough);
        let can_send = takes_output && tx.as_mut().is_some_and(|ring| ring.enable_notification());
        let takes_input = lan == Lan::Ignore || (lan == Lan::Deliver && can_receive);
        if can_send || (can_receive && waiting) || (takes_input && self.port.has_frame()) {
            return Ok(());
        }
        let mut fds = vec![PollFd::new(&self.orders, PollFlags::IN)];
        if let Some(incoming) = self.port.incoming().filter(|_| takes_input) {
            fds.push(PollFd::from_borrowed_fd(incoming, PollFlags::IN));
        }
        if let Some(ring) = rx.as_ref().filter(|_| !can_receive && (waiting || lan == Lan::Deliver)) {
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        if let Some(ring) = tx.as_ref().filter(|_| takes_output) {
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        if let Some(protection) = protection
            && let Some(link) = &protection.link
        {
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, protection.takes_from_peer());
            events.set(PollFlags::OUT, link.outgoing_bytes() > 0);
            if !events.is_empty() {
                fds.push(PollFd::new(link, events));
            }
        }
        let due = protection.and_then(|protection| protection.due_in_us()).map(Duration::from_micros);
        if sleep_until_any(&mut fds, due.into_iter().chain(self.port.sleep_max()).min())? {
            self.orders.rearm();
        }
        Ok(())
    }
}

/// Waits for one of the descriptors, no longer than that. Returns whether it was the first.
pub(crate) fn sleep_until_any(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<bool> {
    let limit =
        limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
    match poll(fds, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(fds[0].revents().contains(PollFlags::IN)),
        Err(errno) => Err(errno.into()),
    }
}
