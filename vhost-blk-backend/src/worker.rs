//! One queue's worker: takes requests from the ring, starts transfers, answers. A thread with an io_uring of its own.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo::runtime::{self, Mailbox, Polling, mailbox};
use colo::vhost_user::Ring;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::backend::Shared;
use crate::disk_ring::{DiskRing, Wake};
use crate::guest_data::{gather, length, scatter};
use crate::replication::primary::Primary;
use crate::replication::secondary::Secondary;
use crate::request::{Operation, Parsed, Segment, Status, parse};
use crate::taken::Taken;

/// After so many requests the ones that have ended get their answers.
const TURN_REQUESTS_MAX: usize = 64;

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
    Start(Box<Ring>),
    Stop(Sender<u16>),
    Mode(Mode, Sender<()>),
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
    /// Starts a worker in [`Mode::Held`], on `core` if there is one given.
    ///
    /// # Errors
    /// The core does not exist, or the kernel refuses a thread or an io_uring.
    pub(crate) fn start(
        shared: Arc<Shared>,
        index: usize,
        core: Option<usize>,
        poll: Duration,
    ) -> io::Result<Self> {
        let (orders, mailbox) = mailbox()?;
        let (ready, is_ready) = bounded(1);
        let thread =
            std::thread::Builder::new().name(format!("blk-queue-{index}")).spawn(
                move || match Worker::new(shared, mailbox, core, poll) {
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

    pub(crate) fn start_ring(&self, ring: Ring) {
        self.order(Order::Start(Box::new(ring)));
    }

    /// Returns when nothing is in flight, with the index of the first request that was not taken.
    pub(crate) fn stop_ring(&self) -> u16 {
        let (reply, stopped) = bounded(1);
        self.order(Order::Stop(reply));
        stopped.recv().expect("a worker only ends when it is told")
    }

    /// Begins to change the mode; the receiver hears when nothing of the old one is in flight.
    pub(crate) fn set_mode(&self, mode: Mode) -> Receiver<()> {
        let (reply, changed) = bounded(1);
        self.order(Order::Mode(mode, reply));
        changed
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
    orders: Mailbox<Order>,
    disk: DiskRing<Taken>,
    mode: Mode,
    ring: Option<Box<Ring>>,
    polling: Polling,
    /// A request that has to wait. Nothing behind it is taken, so it can be put back.
    parked: Option<Taken>,
    /// The data segments of the request that is being begun, or parked.
    segments: Vec<Segment>,
    /// And its data, if a primary has copied it already.
    copy: Option<Arc<Vec<u8>>>,
    /// For data on its way between guest memory and the block buffer.
    scratch: Vec<u8>,
}

impl Worker {
    fn new(
        shared: Arc<Shared>,
        orders: Mailbox<Order>,
        core: Option<usize>,
        poll: Duration,
    ) -> io::Result<Self> {
        let disk = DiskRing::new(shared.image.clone())?;
        if let Some(core) = core {
            let helpers = pin(core)?;
            if let Err(error) = disk.keep_helpers_on(&helpers) {
                tracing::debug!("The kernel's helper threads may share core {core}: {error}");
            }
        }
        Ok(Self {
            shared,
            orders,
            disk,
            mode: Mode::Held,
            ring: None,
            polling: Polling::new(poll),
            parked: None,
            segments: Vec::new(),
            copy: None,
            scratch: Vec::new(),
        })
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
                    self.stop();
                    return;
                }
                self.obey(order);
            }
            if self.turn() {
                self.polling.worked();
                idle_since = None;
                continue;
            }
            let since: Instant = *idle_since.get_or_insert_with(Instant::now);
            if self.polling.look_again() {
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
            Order::Start(ring) => {
                self.stop();
                self.ring = Some(ring);
                if let Some(ring) = &mut self.ring {
                    ring.disable_notification();
                }
            }
            Order::Stop(reply) => drop(reply.send(self.stop())),
            Order::Mode(mode, reply) => {
                self.drain();
                self.copy = None;
                self.mode = mode;
                let _ = reply.send(());
            }
            // the next turn looks; the loop has seen an exit
            Order::Look | Order::Exit => {}
        }
    }

    /// Gives the ring back. Returns its next request.
    fn stop(&mut self) -> u16 {
        self.drain();
        self.copy = None;
        let Some(mut ring) = self.ring.take() else {
            return 0;
        };
        if let Some(parked) = self.parked.take() {
            parked.put_back(&mut ring, &self.shared.metrics);
        }
        if let Err(error) = self.disk.disarm(Wake::Kick) {
            panic!("io_uring has failed: {error}");
        }
        ring.next_avail()
    }

    fn drain(&mut self) {
        while self.disk.in_flight() > 0 {
            self.enter(true);
            self.complete();
        }
    }

    /// Everything that can be done without waiting. Returns whether that was something.
    fn turn(&mut self) -> bool {
        let mut done = 0;
        if let Some(mut ring) = self.ring.take() {
            if self.disk.take_fired(Wake::Kick) {
                ring.drain_kick();
            }
            while done < TURN_REQUESTS_MAX && self.take(&mut ring) {
                done += 1;
            }
            self.ring = Some(ring);
        }
        self.enter(false);
        let ended = self.complete();
        if let Some(ring) = &mut self.ring {
            ring.signal_used();
        }
        done + ended > 0
    }

    /// Whether a request may be taken now.
    fn can_take(&self) -> bool {
        !matches!(self.mode, Mode::Held) && self.disk.has_room()
    }

    /// Takes one request and begins it, or begins the parked one. Returns whether there was one that could.
    fn take(&mut self, ring: &mut Ring) -> bool {
        if !self.can_take() {
            return false;
        }
        let taken = match self.parked.take() {
            Some(parked) => parked,
            None => {
                let Some(mut chain) = ring.pop() else {
                    return false;
                };
                let head = chain.head_index();
                let parsed = parse(&mut chain, &**ring.memory(), self.shared.limits(), &mut self.segments);
                let metrics = &self.shared.metrics;
                match parsed {
                    Parsed::Request(operation, answer) => {
                        Taken::new(head, operation, answer, length(&self.segments) as u64, metrics)
                    }
                    Parsed::Refused(status, answer) => {
                        metrics.refused.add(1);
                        let used = answer.give(&**ring.memory(), status, false);
                        ring.add_used(head, used);
                        return true;
                    }
                    Parsed::Unanswerable => {
                        metrics.refused.add(1);
                        ring.add_used(head, 0);
                        return true;
                    }
                }
            }
        };
        let Err(parked) = self.begin(ring, taken) else {
            return true;
        };
        self.shared.metrics.waits.add(1);
        self.parked = Some(parked);
        false
    }

    /// Starts or carries out a request. An error is the request that has to wait.
    fn begin(&mut self, ring: &mut Ring, taken: Taken) -> Result<(), Taken> {
        let status_of = |sound| if sound { Status::Ok } else { Status::IoError };
        let metrics = &self.shared.metrics;
        match (taken.operation(), &self.mode) {
            (_, Mode::Held) => return Err(taken),
            (Operation::GetId, _) => {
                let sound = scatter(ring.memory(), &self.segments, &self.shared.serial).is_ok();
                taken.settle(ring, metrics, status_of(sound));
            }
            (Operation::Read(offset), Mode::Secondary(secondary)) => {
                self.scratch.resize(length(&self.segments), 0);
                let read = secondary.read(offset, &mut self.scratch);
                let sound = read.is_ok() && scatter(ring.memory(), &self.segments, &self.scratch).is_ok();
                taken.settle(ring, metrics, status_of(sound));
            }
            (Operation::Write(offset), Mode::Secondary(secondary)) => {
                if gather(ring.memory(), &self.segments, &mut self.scratch).is_err() {
                    taken.settle(ring, metrics, Status::IoError);
                } else if secondary.write(offset, &self.scratch) {
                    taken.settle(ring, metrics, Status::Ok);
                } else {
                    return Err(taken);
                }
            }
            // durable is what the buffer covers when it has become the disk; until then no acknowledgement of this
            // guest reaches anybody
            (Operation::Flush, Mode::Secondary(_)) => taken.settle(ring, metrics, Status::Ok),
            (Operation::Flush, _) => self.disk.sync(taken),
            (Operation::Read(offset), _) => {
                if let Err(taken) = self.disk.read(ring.memory(), &self.segments, offset, taken) {
                    taken.settle(ring, metrics, Status::IoError);
                }
            }
            (Operation::Write(offset), Mode::Alone) => {
                let through = self.shared.write_through.load(Ordering::Relaxed);
                let started = self.disk.write(ring.memory(), &self.segments, offset, through, taken);
                if let Err(taken) = started {
                    taken.settle(ring, metrics, Status::IoError);
                }
            }
            (Operation::Write(offset), Mode::Primary(primary)) => {
                // One copy for both disks: the guest may change its buffer while the write is under way.
                let copy = match self.copy.take() {
                    Some(copy) => copy,
                    None => {
                        let mut copy = Vec::new();
                        if gather(ring.memory(), &self.segments, &mut copy).is_err() {
                            taken.settle(ring, metrics, Status::IoError);
                            return Ok(());
                        }
                        Arc::new(copy)
                    }
                };
                if !primary.admit(offset, &copy) {
                    self.copy = Some(copy);
                    return Err(taken);
                }
                let through = self.shared.write_through.load(Ordering::Relaxed);
                self.disk.write_copy(copy, offset, through, taken.admitted(primary.clone()));
            }
        }
        Ok(())
    }

    /// Answers the requests whose transfers have ended. Returns how many.
    fn complete(&mut self) -> usize {
        let mut ended = 0;
        let (ring, shared) = (&mut self.ring, &self.shared);
        self.disk.complete(|taken, result| {
            ended += 1;
            let ring = ring.as_deref_mut().expect("a ring is only given back when nothing is in flight");
            let status = shared.transfer_status(taken.operation(), result);
            taken.settle(ring, &shared.metrics, status);
        });
        ended
    }

    fn enter(&mut self, wait: bool) {
        if let Err(error) = self.disk.enter(wait) {
            // Without its ring the worker can neither do nor answer anything: fail stop, the peer takes over.
            panic!("io_uring has failed: {error}");
        }
    }

    fn sleep(&mut self) {
        let takes = self.can_take() && self.parked.is_none();
        if let Some(ring) = self.ring.as_mut().filter(|_| takes) {
            if ring.enable_notification() {
                ring.disable_notification();
                return;
            }
            self.disk.arm(Wake::Kick, ring.kick_fd());
        }
        self.disk.arm(Wake::Order, self.orders.as_fd());
        self.enter(true);
        // the completions, and what woke us, are seen by the next turn
        if let Some(ring) = self.ring.as_mut().filter(|_| takes) {
            ring.disable_notification();
        }
    }
}

/// Ties this thread to `core`. Returns the other cores that it could use before.
fn pin(core: usize) -> io::Result<Vec<usize>> {
    let before = sched_getaffinity(None)?;
    runtime::pin(core)?;
    Ok((0..CpuSet::MAX_CPU).filter(|other| *other != core && before.is_set(*other)).collect())
}
