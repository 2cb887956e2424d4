//! The thread that serves the control queue, so that those that move frames have no third ring to look at.
//!
//! A command is answered when every worker has taken up what it changes: a driver may free the buffers of a pair that it
//! has switched off (virtio 1.2 §5.1.6.5.5), and finds no frame that it has just declined.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use colo::runtime::{Mailbox, Sender};
use colo::vhost_user::{Chain, Ring};
use crossbeam_channel::bounded;
use rustix::event::{PollFd, PollFlags};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_ERR, VIRTIO_NET_OK};

use super::commands::{Card, Change, State};
use crate::device::ConfigState;
use crate::worker;

/// A longer command is refused. No table of addresses is nearly as long.
const COMMAND_BYTES_MAX: usize = 1 << 20;

/// What the thread is told.
#[derive(Debug)]
pub enum Order {
    /// The queue is ready.
    Start {
        /// Its ring.
        ring: Box<Ring>,
        /// Hears when what the driver has said before, or what holds after a reset, is in effect.
        done: crossbeam_channel::Sender<()>,
    },
    /// Give it back. The next available index goes to the sender.
    Stop(crossbeam_channel::Sender<u16>),
    /// The driver's choice of features; no queue runs.
    Features(u64),
    /// Tell how many rings run, and how many of these are broken.
    Rings(crossbeam_channel::Sender<[usize; 2]>),
}

/// What the thread is made of.
#[derive(Debug)]
pub struct ControlQueue {
    orders: Mailbox<Order>,
    workers: Vec<Sender<worker::Order>>,
    config: Arc<ConfigState>,
    card: Card,
    state: State,
    ring: Option<Box<Ring>>,
    /// The next available index when the ring was stopped, under the same features.
    stopped_at: Option<u16>,
    chain: Chain,
    command: Vec<u8>,
}

impl ControlQueue {
    /// The control queue of a card with these workers, one for each queue pair.
    pub(crate) fn new(
        orders: Mailbox<Order>,
        workers: Vec<Sender<worker::Order>>,
        config: Arc<ConfigState>,
        card: Card,
    ) -> Self {
        Self {
            orders,
            workers,
            config,
            card,
            state: State::unknown(&card),
            ring: None,
            stopped_at: None,
            chain: Chain::new(),
            command: Vec::new(),
        }
    }

    /// Works for ever.
    ///
    /// # Errors
    /// The system has no memory to wait in.
    pub fn run(mut self) -> io::Result<Infallible> {
        loop {
            // one command at a time: a driver that never stops is stopped all the same
            let any = self.take_orders();
            if !(any | self.serve_next()) {
                self.sleep()?;
            }
        }
    }

    fn take_orders(&mut self) -> bool {
        let mut any = false;
        while let Some(order) = self.orders.try_recv() {
            any = true;
            match order {
                Order::Start { ring, done } => {
                    self.begin(ring.next_avail());
                    self.ring = Some(ring);
                    let _ = done.send(());
                }
                Order::Stop(done) => {
                    let next = self.ring.take().map_or(0, |ring| ring.next_avail());
                    self.stopped_at = Some(next);
                    // it would keep the guest's memory mapped
                    self.chain.clear();
                    let _ = done.send(next);
                }
                Order::Features(features) => {
                    self.card.features = features;
                    self.stopped_at = None;
                }
                Order::Rings(reply) => {
                    let broken = self.ring.as_ref().is_some_and(|ring| ring.is_broken());
                    let _ = reply.send([usize::from(self.ring.is_some()), usize::from(broken)]);
                }
            }
        }
        any
    }

    /// The ring goes on from this index: that of a driver that has said nothing yet, of one that we have heard, or of one
    /// that was heard by another process, or on another host.
    fn begin(&mut self, next_available: u16) {
        if next_available == 0 {
            self.state = State::reset(&self.card);
        } else if self.stopped_at != Some(next_available) {
            self.state = State::unknown(&self.card);
        }
        self.take_effect();
    }

    fn serve_next(&mut self) -> bool {
        let Some(mut ring) = self.ring.take() else {
            return false;
        };
        let any = ring.pop(&mut self.chain);
        if any {
            // a command without room for its answer is none
            let has_room = self.chain.writable_bytes() > 0;
            let ack = if has_room { self.carry_out() } else { VIRTIO_NET_ERR };
            let written = self.chain.fill(&[&[ack as u8]]);
            ring.add_used(self.chain.head(), written as u32);
            ring.signal_used();
        }
        self.ring = Some(ring);
        any
    }

    /// Carries out the command in the chain. Returns its answer.
    fn carry_out(&mut self) -> u32 {
        let bytes = self.chain.readable_bytes() as usize;
        if bytes > COMMAND_BYTES_MAX {
            return VIRTIO_NET_ERR;
        }
        self.command.resize(bytes, 0);
        self.chain.copy_to(&mut self.command);
        match self.state.carry_out(&self.card, &self.command) {
            Ok(Change::Announced) => self.config.set_announcing(false),
            Ok(Change::Filter | Change::Mac | Change::Pairs) => self.take_effect(),
            Err(why) => {
                tracing::debug!("A command of {bytes} bytes on the control queue was refused: {why}");
                return VIRTIO_NET_ERR;
            }
        }
        VIRTIO_NET_OK
    }

    /// Shows the card's address, and waits until every worker keeps to the state.
    fn take_effect(&self) {
        self.config.set_mac(self.state.mac().unwrap_or(self.card.mac));
        let filter = self.state.filter();
        let filter = (!filter.admits_all()).then(|| Arc::new(filter.clone()));
        let (done, taken_up) = bounded(self.workers.len());
        for (pair, worker) in self.workers.iter().enumerate() {
            let (filter, receives) = (filter.clone(), pair < usize::from(self.state.pairs()));
            // A worker that has ended takes the process with it; there is nobody left to tell.
            drop(worker.send(worker::Order::Receive { filter, receives, done: done.clone() }));
        }
        drop(done);
        while taken_up.recv().is_ok() {}
    }

    /// Waits for an order or a command.
    fn sleep(&mut self) -> io::Result<()> {
        if self.ring.as_mut().is_some_and(|ring| ring.enable_notification()) {
            return Ok(());
        }
        let mut fds = vec![PollFd::new(&self.orders, PollFlags::IN)];
        if let Some(ring) = &self.ring {
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        if worker::sleep_until_any(&mut fds, None)? {
            self.orders.rearm();
        }
        if let Some(ring) = &self.ring {
            ring.drain_kick();
        }
        Ok(())
    }
}
