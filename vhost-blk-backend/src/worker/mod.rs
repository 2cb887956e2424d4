//! A worker: a thread with an io_uring of its own that serves some of the disk's queues. It takes requests from their
//! rings, starts transfers and answers, a batch at a time.

mod queue;
mod serve;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo::runtime::{self, Mailbox, Polling, mailbox};
use colo::vhost_user::Ring;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::thread::{CpuSet, sched_getaffinity};

use self::queue::Queue;
use crate::backend::Shared;
use crate::disk_ring::{DiskRing, Wake};
use crate::inline::Inline;
use crate::metrics::Metrics;
use crate::replication::primary::Primary;
use crate::replication::secondary::Secondary;
use crate::taken::Taken;

/// After so many requests of a queue the others get their turn, and ended transfers theirs.
const TURN_REQUESTS_MAX: usize = 64;
/// The same where a worker has several queues: a driver that refills one as fast as it is served must not keep the
/// others waiting.
const SHARED_TURN_REQUESTS_MAX: usize = 16;

/// With more transfers in flight the worker does not poll: one comes soon anyway, and who sleeps until then takes several
/// at once, which costs less and keeps the disk busier than taking each by itself.
const POLL_IN_FLIGHT_MAX: usize = 1;

/// What the device is, for a worker.
#[derive(Clone, Debug)]
pub(crate) enum Mode {
    /// Requests stay in the ring.
    Held,
    /// The disk is this guest's.
    Alone,
    /// The disk is this guest's, and the peer gets every write.
    Primary(Arc<Primary>),
    /// This guest sees the disk through the buffer.
    Secondary(Arc<Secondary>),
}

/// What a worker is told. Whoever waits for a reply gets it when nothing is in flight.
#[derive(Debug)]
enum Order {
    Start(usize, Box<Ring>),
    Stop(usize, Sender<u16>),
    Mode(Mode, Sender<()>),
    Drain(Sender<()>),
    /// What a parked request waits for may have come.
    Look,
    Exit,
}

/// Makes a worker look at its parked request again.
#[derive(Clone, Debug)]
pub(crate) struct Waker(runtime::Sender<Order>);

impl Waker {
    pub(crate) fn wake(&self) {
        // a worker that has ended has nothing parked
        drop(self.0.send(Order::Look));
    }
}

/// The other end of a worker.
#[derive(Debug)]
pub(crate) struct Handle {
    orders: runtime::Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Starts worker number `index` for `queues` queues in [`Mode::Held`], on `core` if there is one given.
    ///
    /// # Errors
    /// The core does not exist, or the kernel refuses a thread or an io_uring.
    pub(crate) fn start(
        shared: Arc<Shared>,
        index: usize,
        queues: usize,
        core: Option<usize>,
        poll: Duration,
    ) -> io::Result<Self> {
        let (orders, mailbox) = mailbox()?;
        let (ready, is_ready) = bounded(1);
        let thread =
            std::thread::Builder::new().name(format!("blk-worker-{index}")).spawn(
                move || match Worker::new(shared, mailbox, index, queues, core, poll) {
                    Ok(worker) => {
                        drop(ready.send(Ok(())));
                        worker.run();
                    }
                    Err(error) => drop(ready.send(Err(error))),
                },
            )?;
        is_ready.recv().map_err(|_| io::Error::other("A worker ended at its start"))??;
        Ok(Self { orders, thread: Some(thread) })
    }

    pub(crate) fn waker(&self) -> Waker {
        Waker(self.orders.clone())
    }

    /// Gives a ring to the worker's queue number `queue`.
    pub(crate) fn start_ring(&self, queue: usize, ring: Ring) {
        self.order(Order::Start(queue, Box::new(ring)));
    }

    /// Begins to stop a queue; the receiver hears when nothing of it is in flight, and gets the index of the first request
    /// that was not taken.
    pub(crate) fn stop_ring(&self, queue: usize) -> Receiver<u16> {
        let (reply, stopped) = bounded(1);
        self.order(Order::Stop(queue, reply));
        stopped
    }

    /// Begins to change the mode; the receiver hears when nothing of the old one is in flight.
    pub(crate) fn set_mode(&self, mode: Mode) -> Receiver<()> {
        let (reply, changed) = bounded(1);
        self.order(Order::Mode(mode, reply));
        changed
    }

    /// The receiver hears when nothing is in flight of what was when this was called.
    pub(crate) fn drain(&self) -> Receiver<()> {
        let (reply, drained) = bounded(1);
        self.order(Order::Drain(reply));
        drained
    }

    fn order(&self, order: Order) {
        self.orders.send(order).expect("a worker only ends when it is told");
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        drop(self.orders.send(Order::Exit));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    /// Which worker it is.
    index: usize,
    orders: Mailbox<Order>,
    disk: DiskRing<Taken>,
    inline: Inline,
    mode: Mode,
    queues: Vec<Queue>,
    polling: Polling,
    /// For data on its way between guest memory and the block buffer.
    scratch: Vec<u8>,
}

impl Worker {
    fn new(
        shared: Arc<Shared>,
        orders: Mailbox<Order>,
        index: usize,
        queues: usize,
        core: Option<usize>,
        poll: Duration,
    ) -> io::Result<Self> {
        let disk = DiskRing::new(shared.image.clone(), queues)?;
        if let Some(core) = core {
            let helpers = pin(core)?;
            if let Err(error) = disk.keep_helpers_on(&helpers) {
                tracing::debug!("The kernel's helper threads may share core {core}: {error}");
            }
        }
        let inline = Inline::new(&shared.image);
        Ok(Self {
            shared,
            index,
            orders,
            disk,
            inline,
            mode: Mode::Held,
            queues: std::iter::repeat_with(Queue::new).take(queues).collect(),
            polling: Polling::new(poll),
            scratch: Vec::new(),
        })
    }

    fn metrics(&self) -> &Metrics {
        &self.shared.metrics[self.index]
    }

    fn run(mut self) {
        let mut idle_since = None;
        loop {
            // before the orders are looked at: one that comes in between would wake nobody
            if self.disk.take_fired(Wake::Order) {
                self.orders.rearm();
            }
            while let Some(order) = self.orders.try_recv() {
                if let Order::Exit = order {
                    return self.end();
                }
                self.obey(order);
            }
            if self.turn() {
                self.polling.worked();
                idle_since = None;
                continue;
            }
            let since: Instant = *idle_since.get_or_insert_with(Instant::now);
            if self.disk.in_flight() <= POLL_IN_FLIGHT_MAX && self.polling.look_again() {
                std::hint::spin_loop();
            } else {
                self.sleep();
                self.polling.slept(since.elapsed());
                idle_since = None;
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(index, mut ring) => {
                assert!(self.queues[index].ring.is_none(), "a queue is stopped before it is started");
                ring.disable_notification();
                self.disk.arm(Wake::Kick(index), ring.kick_fd());
                self.queues[index].ring = Some(ring);
            }
            Order::Stop(index, reply) => self.queues[index].stopping = Some(reply),
            Order::Drain(reply) => {
                self.drain();
                let _ = reply.send(());
            }
            Order::Mode(mode, reply) => {
                self.drain();
                self.queues.iter_mut().for_each(|queue| queue.copy = None);
                self.mode = mode;
                let _ = reply.send(());
            }
            // the next turn looks; the loop has seen an exit
            Order::Look | Order::Exit => {}
        }
    }

    /// Gives the rings back that are to stop and of which nothing is in flight any more. The others go on meanwhile, so
    /// that one request that the disk keeps holds up nothing but its own queue.
    fn stop_drained(&mut self) {
        for index in 0..self.queues.len() {
            let queue = &self.queues[index];
            // What a process before this one had taken is known to nobody else, unless the frontend keeps it: it is done,
            // if it can be.
            let again = queue.has_again() && queue.parked.is_none() && !matches!(self.mode, Mode::Held);
            let waits = queue.in_flight > 0 || again;
            if queue.stopping.is_none() || waits {
                continue;
            }
            self.disk.disarm(Wake::Kick(index));
            while self.disk.is_armed(Wake::Kick(index)) {
                self.wait();
            }
            self.disk.take_fired(Wake::Kick(index));
            let queue = &mut self.queues[index];
            let next = queue.give_back(&self.shared.metrics[self.index]);
            if self.disk.in_flight() == 0 {
                self.disk.forget_memory();
            }
            if let Some(reply) = queue.stopping.take() {
                let _ = reply.send(next);
            }
        }
    }

    /// Stops every queue, for the end of the thread.
    fn end(mut self) {
        let (reply, _) = bounded(self.queues.len());
        for queue in &mut self.queues {
            queue.stopping.get_or_insert(reply.clone());
        }
        loop {
            let done = self.turn();
            if self.queues.iter().all(|queue| queue.stopping.is_none()) {
                return;
            }
            if !done {
                self.wait();
            }
        }
    }

    /// Everything that can be done without waiting. Returns whether that was something.
    fn turn(&mut self) -> bool {
        let mut done = 0;
        for index in 0..self.queues.len() {
            done += self.take_batch(index);
        }
        self.enter(false);
        done += self.complete();
        self.queues.iter_mut().for_each(Queue::signal);
        self.stop_drained();
        done > 0
    }

    /// Waits for something to happen, and tells the drivers of what has ended.
    fn wait(&mut self) {
        self.enter(true);
        self.complete();
        self.queues.iter_mut().for_each(Queue::signal);
    }

    fn drain(&mut self) {
        while self.disk.in_flight() > 0 {
            self.wait();
        }
    }

    /// Answers the requests whose transfers have ended. Returns how many.
    #[inline]
    fn complete(&mut self) -> usize {
        let mut ended = 0;
        let Self { disk, queues, shared, index, .. } = self;
        let metrics = &shared.metrics[*index];
        disk.complete(|taken, chain, result| {
            ended += 1;
            let queue = &mut queues[usize::from(taken.queue())];
            queue.in_flight -= 1;
            let ring =
                queue.ring.as_deref_mut().expect("a ring is only given back when nothing is in flight");
            let status = shared.transfer_status(taken.operation(), result, metrics);
            taken.settle(ring, chain, metrics, status);
            ring.publish_used();
        });
        ended
    }

    #[inline]
    fn enter(&mut self, wait: bool) {
        if let Err(error) = self.disk.enter(wait) {
            // Without its ring the worker can neither do nor answer anything: fail stop, the peer takes over.
            panic!("io_uring has failed: {error}");
        }
    }

    fn sleep(&mut self) {
        let mut busy = false;
        for index in 0..self.queues.len() {
            let queue = &self.queues[index];
            if !self.can_take() || queue.parked.is_some() || queue.stopping.is_some() {
                continue;
            }
            if let Some(ring) = &mut self.queues[index].ring {
                if ring.is_polled() {
                    // a timer that has ticked ticks no more until then
                    ring.drain_kick();
                }
                busy |= ring.enable_notification();
                self.disk.arm(Wake::Kick(index), ring.kick_fd());
            }
        }
        self.disk.arm(Wake::Order, self.orders.as_fd());
        // An order that came after the mailbox was looked at, and whose wake the last turn has taken from the ring, wakes
        // nobody any more.
        if !busy && !self.disk.has_fired(Wake::Order) {
            self.metrics().sleeps.add(1);
            self.enter(true);
        }
        // the completions, and what woke us, are seen by the next turn
        for queue in &mut self.queues {
            if let Some(ring) = &mut queue.ring {
                ring.disable_notification();
            }
        }
    }
}

/// Ties this thread to `core`. Returns the other cores that it could use before.
fn pin(core: usize) -> io::Result<Vec<usize>> {
    let before = sched_getaffinity(None)?;
    runtime::pin(core)?;
    Ok((0..CpuSet::MAX_CPU).filter(|other| *other != core && before.is_set(*other)).collect())
}

#[cfg(test)]
mod tests;
