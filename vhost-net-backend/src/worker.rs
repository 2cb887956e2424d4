//! The thread that moves frames: between the guest's rings and the tap, one pass over everything at a time.
//!
//! A frame is taken from the tap only when the guest has a buffer for it, so that frames wait in the tap and not here.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use colo::memory::GuestMemory;
use colo::runtime::{Mailbox, Polling};
use colo::vhost_user::Ring;
use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::device::{RX, TX};
use crate::frame::{self, FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::tap::Tap;

/// So many frames are moved in one direction before the other gets its turn, and the guest is told of all of them at once.
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
    /// Frames that the tap did not take.
    pub lan_refused: u64,
    /// Frames that came from the LAN while this side had no business there.
    pub lan_ignored: u64,
}

/// What a worker is made of.
#[derive(Debug)]
pub struct Worker {
    tap: Tap,
    orders: Mailbox<Order>,
    rings: [Option<Box<Ring>>; 2],
    header_bytes: usize,
    open: bool,
    polling: Polling,
    counters: Counters,
    frame: Box<[u8; FRAME_BYTES_MAX]>,
}

impl Worker {
    /// A worker for one tap. A protected one lets nothing pass until a controller says otherwise; one that is not looks
    /// for work for up to `window` before it sleeps.
    pub fn new(tap: Tap, orders: Mailbox<Order>, protected: bool, window: Duration) -> Self {
        Self {
            tap,
            orders,
            rings: [None, None],
            header_bytes: HEADER_BYTES,
            open: !protected,
            polling: Polling::new(window),
            counters: Counters::default(),
            frame: vec![0; FRAME_BYTES_MAX].try_into().expect("as long as it is made"),
        }
    }

    /// Works for ever.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn run(mut self) -> io::Result<std::convert::Infallible> {
        let mut last_work = Instant::now();
        loop {
            if self.turn()? {
                self.polling.worked();
                continue;
            }
            if self.polling.look_again() {
                std::hint::spin_loop();
                continue;
            }
            self.sleep()?;
            let now = Instant::now();
            self.polling.slept(now - last_work);
            last_work = now;
        }
    }

    /// Does what there is to do. Returns whether there was something.
    fn turn(&mut self) -> io::Result<bool> {
        let orders = self.take_orders();
        let sent = self.guest_output();
        let received = self.lan_input()?;
        Ok(orders || sent || received)
    }

    fn take_orders(&mut self) -> bool {
        let mut any = false;
        while let Some(order) = self.orders.try_recv() {
            any = true;
            match order {
                Order::Start { queue, ring } => {
                    if let Some(slot) = self.rings.get_mut(queue) {
                        slot.insert(ring).disable_notification();
                    }
                }
                Order::Stop { queue, done } => {
                    // nothing of a ring is ever in flight between two turns
                    let ring = self.rings.get_mut(queue).and_then(Option::take);
                    let next = ring.map_or(0, |ring| ring.next_avail());
                    let _ = done.send(next);
                }
                Order::Features(features) => {
                    let modern = features >> VIRTIO_F_VERSION_1 & 1 == 1;
                    self.header_bytes = if modern { HEADER_BYTES } else { LEGACY_HEADER_BYTES };
                }
            }
        }
        any
    }

    fn guest_output(&mut self) -> bool {
        let Some(ring) = self.rings[TX].as_mut().filter(|_| self.open) else {
            return false;
        };
        let memory: Arc<GuestMemory> = ring.memory().clone();
        let mut any = false;
        for _ in 0..BATCH_FRAMES {
            let Some(chain) = ring.pop() else {
                break;
            };
            any = true;
            let head = chain.head_index();
            match frame::from_guest(&memory, chain, self.header_bytes, &mut self.frame) {
                Some(frame) => {
                    self.counters.guest_frames += 1;
                    self.counters.guest_bytes += frame.len() as u64;
                    self.counters.lan_refused += u64::from(!self.tap.write(frame));
                }
                None => self.counters.guest_malformed += 1,
            }
            ring.add_used(head, 0);
        }
        ring.signal_used();
        any
    }

    fn lan_input(&mut self) -> io::Result<bool> {
        if !self.open {
            return self.ignore_lan();
        }
        let Some(ring) = &mut self.rings[RX] else {
            return Ok(false);
        };
        let memory: Arc<GuestMemory> = ring.memory().clone();
        let mut any = false;
        for _ in 0..BATCH_FRAMES {
            if !ring.has_available() {
                break;
            }
            let Some(bytes) = self.tap.read(&mut self.frame[..])? else {
                break;
            };
            any = true;
            if bytes < FRAME_BYTES_MIN {
                continue;
            }
            self.counters.lan_frames += 1;
            self.counters.lan_bytes += bytes as u64;
            let Some(chain) = ring.pop() else {
                break;
            };
            let head = chain.head_index();
            match frame::to_guest(&memory, chain, self.header_bytes, &self.frame[..bytes]) {
                Some(used) => ring.add_used(head, used),
                None => {
                    self.counters.guest_too_long += 1;
                    ring.undo_pop();
                }
            }
        }
        ring.signal_used();
        Ok(any)
    }

    /// Keeps the tap from filling up with what will be old when this side may use it.
    fn ignore_lan(&mut self) -> io::Result<bool> {
        for count in 0..BATCH_FRAMES {
            if self.tap.read(&mut self.frame[..])?.is_none() {
                return Ok(count > 0);
            }
            self.counters.lan_ignored += 1;
        }
        Ok(true)
    }

    /// Waits for something to do. Returns at once if there is something already.
    fn sleep(&mut self) -> io::Result<()> {
        let open = self.open;
        let [rx, tx] = &mut self.rings;
        let takes =
            |ring: &mut Option<Box<Ring>>| ring.as_mut().is_some_and(|ring| ring.enable_notification());
        // A buffer for the guest's next frame is no work, the frame is; so the receive queue is only waited for while it
        // is empty.
        let can_receive = takes(rx);
        if takes(tx) && open {
            return Ok(());
        }
        let mut fds = vec![PollFd::new(&self.orders, PollFlags::IN)];
        if !open || can_receive {
            fds.push(PollFd::new(&self.tap, PollFlags::IN));
        }
        let kicks = [rx.as_ref().filter(|_| !can_receive), tx.as_ref()].map(|ring| ring.filter(|_| open));
        for ring in kicks.iter().flatten() {
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if fds[0].revents().contains(PollFlags::IN) {
            self.orders.rearm();
        }
        for ring in self.rings.iter_mut().flatten() {
            ring.drain_kick();
            ring.disable_notification();
        }
        Ok(())
    }
}
