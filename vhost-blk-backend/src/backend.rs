//! The disk and its workers, as the vhost-user server and the controller see them.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use colo::vhost_user::{FrontendChannel, Ring};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde_json::Value;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use crate::image::{Access, Hold, Image, ImageError, ImageOptions};
use crate::metrics::{self, Metrics};
use crate::replication::Wakers;
use crate::request::{Limits, Operation, Status};
use crate::worker::{Handle, Mode};
use crate::write_cache::WriteCache;

/// A drain that takes longer than this is counted, and named in the log. A guest's VMM waits for it.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// The least memory that a block buffer may have: two of the largest requests.
pub const BUFFER_BYTES_MIN: usize = 2 * crate::request::DATA_BYTES_MAX;

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is behind it.
    pub image: ImageOptions,
    /// What the guest reads as the disk's serial number; at most 20 bytes count.
    pub serial: String,
    /// Number of queues.
    pub queues: usize,
    /// Number of threads that serve them, no more than queues: queue `i` is served by worker `i` mod `workers`.
    pub workers: usize,
    /// Whether the disk begins with a write cache, which the guest flushes; otherwise every write is durable when it
    /// is answered.
    pub writeback: bool,
    /// The longest that an idle worker polls.
    pub poll: Duration,
    /// The workers' cores, in turn; empty for none in particular.
    pub cores: Vec<usize>,
}

impl Options {
    /// One queue, one worker that never polls, a write cache, no serial number.
    pub fn new(image: ImageOptions) -> Self {
        Self {
            image,
            serial: String::new(),
            queues: 1,
            workers: 1,
            writeback: true,
            poll: Duration::ZERO,
            cores: Vec::new(),
        }
    }
}

/// Why a disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A worker.
    #[error(
        "Queue worker {index} cannot start: {error}; io_uring needs Linux 6.1 and must not be disabled \
         (kernel.io_uring_disabled, seccomp)"
    )]
    Worker {
        /// Its queue.
        index: usize,
        /// What the system says.
        error: io::Error,
    },
}

/// What the workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) image: Arc<Image>,
    /// One for each worker.
    pub(crate) metrics: Box<[Metrics]>,
    /// The serial number, padded with zeros (virtio 1.2 §5.2.6).
    pub(crate) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(crate) write_cache: WriteCache,
    /// Writes were lost that no flush of the guest would be told of: every flush fails.
    durability_lost: AtomicBool,
}

impl Shared {
    pub(crate) fn new(image: Arc<Image>, workers: usize, serial: &str, writeback: bool) -> Self {
        let mut padded = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            image,
            metrics: std::iter::repeat_with(Metrics::default).take(workers).collect(),
            serial: padded,
            write_cache: WriteCache::new(writeback),
            durability_lost: AtomicBool::new(false),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            disk_bytes: self.image.bytes(),
            block_bytes: self.image.block_bytes(),
            read_only: self.image.read_only(),
        }
    }

    /// What the guest is told of a transfer.
    #[inline]
    pub(crate) fn transfer_status(
        &self,
        operation: Operation,
        result: io::Result<()>,
        metrics: &Metrics,
    ) -> Status {
        let is_flush = operation == Operation::Flush;
        match result {
            Ok(()) if is_flush && self.durability_lost.load(Ordering::Relaxed) => Status::IoError,
            Ok(()) => Status::Ok,
            Err(error) => {
                if is_flush {
                    self.sync_failed();
                }
                let count = metrics.errors() + 1;
                if count.is_power_of_two() {
                    let path = self.image.path().display();
                    tracing::error!(
                        "Disk {path}: {operation:?} failed ({count} so far on its worker): {error}"
                    );
                }
                Status::IoError
            }
        }
    }

    /// What the guest has written cannot be made durable. Of what is in the page cache Linux tells that once, takes the
    /// pages for clean and lets them go: the next flush would succeed, with the data lost. Past the page cache a flush
    /// may be tried again.
    fn sync_failed(&self) {
        if !matches!(self.image.access(), Access::Direct { .. }) {
            self.lose_durability();
        }
    }

    fn lose_durability(&self) {
        if !self.durability_lost.swap(true, Ordering::Relaxed) {
            let path = self.image.path().display();
            tracing::error!(
                "Disk {path}: writes were lost, so all flushes of the guest fail from here on; start this program \
                 again when the disk is sound"
            );
        }
    }
}

/// A disk with its workers. Until it is told otherwise requests wait.
#[derive(Debug)]
pub struct Backend {
    pub(crate) shared: Arc<Shared>,
    workers: Vec<Handle>,
    queues: usize,
    /// The guest comes by migration.
    incoming: bool,
    resizing: Mutex<()>,
    pub(crate) channel: FrontendChannel,
    /// The image is locked for the rings that run. Only the server's thread looks.
    acquired: AtomicBool,
    /// How many drains took longer than [`DRAIN_LIMIT`], and the longest of all.
    slow_drains: AtomicU64,
    longest_drain_us: AtomicU64,
}

impl Backend {
    /// Opens the image and starts the workers.
    ///
    /// # Errors
    /// The image cannot be served, or the system refuses the workers.
    pub fn start(options: &Options) -> Result<Arc<Self>, StartError> {
        let image = Arc::new(Image::open(&options.image)?);
        let workers = options.workers.clamp(1, options.queues.max(1));
        let shared = Arc::new(Shared::new(image, workers, &options.serial, options.writeback));
        let worker = |index| {
            let core = options.cores.get(index % options.cores.len().max(1)).copied();
            // queue i is served by worker i mod workers
            let queues = (options.queues + workers - 1 - index) / workers;
            Handle::start(shared.clone(), index, queues, core, options.poll)
                .map_err(|error| StartError::Worker { index, error })
        };
        let workers = (0..workers).map(worker).collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(Self {
            shared,
            workers,
            queues: options.queues,
            incoming: options.image.hold == Hold::Incoming,
            resizing: Mutex::new(()),
            channel: FrontendChannel::new(),
            acquired: AtomicBool::new(false),
            slow_drains: AtomicU64::new(0),
            longest_drain_us: AtomicU64::new(0),
        }))
    }

    /// Serves the guest from here on: the disk is its own.
    pub fn serve_alone(&self) {
        self.set_mode(&Mode::Alone);
    }

    /// Changes what the device is. Returns when nothing of the old mode is in flight.
    pub(crate) fn set_mode(&self, mode: &Mode) {
        self.all(|worker| worker.set_mode(mode.clone()));
    }

    pub(crate) fn wakers(&self) -> Wakers {
        Wakers(self.workers.iter().map(Handle::waker).collect())
    }

    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.shared.image
    }

    /// Makes what was written past the workers, through the page cache, durable, without keeping the guest waiting. A
    /// guest's flush covers it as well, and is told of an error as well, see [`Image::sync`].
    pub(crate) fn sync_in_background(&self) {
        let shared = self.shared.clone();
        let sync = move || {
            if let Err(error) = shared.image.sync() {
                tracing::error!("Disk {} cannot be made durable: {error}", shared.image.path().display());
                shared.lose_durability();
            }
        };
        if std::thread::Builder::new().name("sync".into()).spawn(sync.clone()).is_err() {
            sync();
        }
    }

    /// Gives the disk another length ([`Image::resize`]) and tells the guest. Returns the length.
    ///
    /// # Errors
    /// A sentence that says why it cannot have it.
    pub fn resize(&self, bytes: Option<u64>) -> Result<u64, String> {
        // the controller's and the server's threads both do
        let _resizing = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.shared.image.bytes();
        let bytes = self.shared.image.resize(bytes).map_err(|error| error.to_string())?;
        if bytes != before {
            let path = self.shared.image.path().display();
            tracing::info!("Disk {path}: resized from {before} to {bytes} bytes");
            self.config_changed();
        }
        Ok(bytes)
    }

    /// The configuration space has changed: the guest is to read it again. One that is not connected reads it when it
    /// is.
    fn config_changed(&self) {
        if !self.channel.config_changed() {
            tracing::debug!("No frontend that could be told of the change");
        }
    }

    /// No ring runs any more: what was written is made durable, and the image is free for another back end.
    pub(crate) fn release(&self) {
        if !self.acquired.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.shared.image.release() {
            tracing::error!("Disk {} cannot be made durable: {error}", self.shared.image.path().display());
            self.shared.sync_failed();
        }
    }

    /// The driver reads the configuration space.
    pub(crate) fn told(&self) {
        // One that has begun does not believe it: the frontend reads for its own sake. Nor will one that comes by
        // migration, which has begun elsewhere.
        if !self.incoming && !self.acquired.load(Ordering::Relaxed) {
            self.shared.write_cache.told();
        }
    }

    /// The driver switches the write cache. It never flushes without one, so what was answered before is durable when
    /// this returns.
    pub(crate) fn set_write_cache(&self, writeback: bool) -> Result<(), String> {
        if !self.shared.write_cache.choose(writeback) {
            return Ok(());
        }
        // what was begun with a cache
        self.all(Handle::drain);
        self.shared.image.sync().map_err(|error| {
            // as the frontend has it then
            self.shared.write_cache.choose(true);
            self.shared.sync_failed();
            format!("Disk {} cannot be made durable: {error}", self.shared.image.path().display())
        })
    }

    /// Has all workers begin something at once, and waits for all.
    fn all(&self, begin: impl Fn(&Handle) -> Receiver<()>) {
        let begun: Vec<_> = self.workers.iter().map(begin).collect();
        for done in begun {
            done.recv().expect("a worker only ends when it is told");
        }
    }

    pub(crate) fn queues(&self) -> usize {
        self.queues
    }

    /// Hands a ring to its worker, with the first of them the image being locked, if it is not from the beginning.
    pub(crate) fn start_ring(&self, index: usize, ring: Ring) -> Result<(), ImageError> {
        if !self.acquired.load(Ordering::Relaxed) {
            self.shared.image.acquire()?;
            self.acquired.store(true, Ordering::Relaxed);
            // whoever had it before may have made it longer
            if let Err(error) = self.resize(None) {
                tracing::warn!("{error}");
            }
        }
        let workers = self.workers.len();
        self.workers[index % workers].start_ring(index / workers, ring);
        Ok(())
    }

    /// Waits until nothing of a queue is in flight. Returns its next request.
    pub(crate) fn stop_ring(&self, index: usize) -> u16 {
        let workers = self.workers.len();
        let began = Instant::now();
        let stopped = self.workers[index % workers].stop_ring(index / workers);
        let next = match stopped.recv_timeout(DRAIN_LIMIT) {
            Err(RecvTimeoutError::Timeout) => {
                self.slow_drains.fetch_add(1, Ordering::Relaxed);
                let path = self.shared.image.path().display();
                tracing::warn!(
                    "Disk {path}: queue {index} is to stop, and after {DRAIN_LIMIT:?} its requests have not ended: \
                     the disk is slow, or hangs"
                );
                stopped.recv()
            }
            Ok(next) => Ok(next),
            Err(RecvTimeoutError::Disconnected) => Err(crossbeam_channel::RecvError),
        };
        let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.longest_drain_us.fetch_max(took_us, Ordering::Relaxed);
        next.expect("a worker only ends when it is told")
    }

    /// The figures of the disk and its workers.
    pub fn status(&self) -> Value {
        let mut status = metrics::to_json(&self.shared.metrics);
        status["disk_bytes"] = self.shared.image.bytes().into();
        status["disk_path"] = self.shared.image.path().display().to_string().into();
        status["disk_access"] = self.shared.image.access().name().into();
        status["block_bytes"] = self.shared.image.block_bytes().into();
        status["queues"] = self.queues.into();
        status["workers"] = self.workers.len().into();
        status["slow_drains"] = self.slow_drains.load(Ordering::Relaxed).into();
        status["longest_drain_us"] = self.longest_drain_us.load(Ordering::Relaxed).into();
        let cache = if self.shared.write_cache.is_through() { "writethrough" } else { "writeback" };
        status["write_cache"] = cache.into();
        status["durability_lost"] = self.shared.durability_lost.load(Ordering::Relaxed).into();
        status
    }
}
