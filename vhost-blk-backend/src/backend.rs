//! The disk and its workers, as the vhost-user server and the controller see them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use colo::vhost_user::{Device, Ring};
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES,
};

use crate::block_buffer::SECTOR_BYTES;
use crate::image::{Image, ImageError, ImageOptions};
use crate::metrics::Metrics;
use crate::replication::Wakers;
use crate::request::{Limits, Operation, SEGMENT_BYTES_MAX, SEGMENTS_MAX, Status};
use crate::worker::{Handle, Mode};

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
    pub(crate) metrics: Metrics,
    /// The serial number, padded with zeros (virtio 1.2 §5.2.6).
    pub(crate) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// The driver has not negotiated flushing, so it takes every write that is answered for durable (§5.2.6.2).
    pub(crate) write_through: AtomicBool,
    /// Writes were lost that no flush of the guest will be told of.
    pub(crate) sync_failed: AtomicBool,
}

impl Shared {
    pub(crate) fn limits(&self) -> Limits {
        Limits { disk_bytes: self.image.bytes(), read_only: self.image.read_only() }
    }

    /// What the guest is told of a transfer.
    pub(crate) fn transfer_status(&self, operation: Operation, result: io::Result<()>) -> Status {
        let flush_is_void = operation == Operation::Flush && self.sync_failed.load(Ordering::Relaxed);
        match result {
            Ok(()) if !flush_is_void => Status::Ok,
            Ok(()) => Status::IoError,
            Err(error) => {
                let metrics = &self.metrics;
                let count = 1 + [&metrics.read_errors, &metrics.write_errors, &metrics.flush_errors]
                    .map(crate::metrics::Counter::get)
                    .iter()
                    .sum::<u64>();
                if count.is_power_of_two() {
                    let path = self.image.path().display();
                    tracing::error!("Disk {path}: {operation:?} failed ({count} so far): {error}");
                }
                Status::IoError
            }
        }
    }
}

/// A disk with its workers. Until it is told otherwise requests wait.
#[derive(Debug)]
pub struct Backend {
    shared: Arc<Shared>,
    workers: Vec<Handle>,
}

impl Backend {
    /// Opens the image and starts a worker for each queue.
    ///
    /// # Errors
    /// The image cannot be served, or the system refuses the workers.
    pub fn start(options: &Options) -> Result<Arc<Self>, StartError> {
        let image = Arc::new(Image::open(&options.image)?);
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let shared = Arc::new(Shared {
            image,
            metrics: Metrics::default(),
            serial,
            write_through: AtomicBool::new(true),
            sync_failed: AtomicBool::new(false),
        });
        let worker = |index| {
            let core = options.cores.get(index % options.cores.len().max(1)).copied();
            Handle::start(shared.clone(), index, core, options.poll)
                .map_err(|error| StartError::Worker { index, error })
        };
        let workers = (0..options.queues).map(worker).collect::<Result<Vec<_>, _>>()?;
        Ok(Arc::new(Self { shared, workers }))
    }

    /// Serves the guest from here on: the disk is its own.
    pub fn serve_alone(&self) {
        self.set_mode(&Mode::Alone);
    }

    /// Changes what the device is. Returns when nothing of the old mode is in flight.
    pub(crate) fn set_mode(&self, mode: &Mode) {
        // all at once, and then wait for all
        let changes: Vec<_> = self.workers.iter().map(|worker| worker.set_mode(mode.clone())).collect();
        for change in changes {
            change.recv().expect("a worker only ends when it is told");
        }
    }

    pub(crate) fn wakers(&self) -> Wakers {
        Wakers(self.workers.iter().map(Handle::waker).collect())
    }

    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.shared.image
    }

    /// Makes what was written past the workers durable, without keeping the guest waiting. A guest's flush covers it
    /// as well; if this one is told of an error, that one would not be, so from then on every flush fails.
    pub(crate) fn sync_in_background(&self) {
        let shared = self.shared.clone();
        let sync = move || {
            if let Err(error) = shared.image.file().sync_data() {
                shared.sync_failed.store(true, Ordering::Relaxed);
                let path = shared.image.path().display();
                tracing::error!("Disk {path} cannot be made durable, the guest's flushes fail now: {error}");
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
        let before = self.shared.image.bytes();
        let bytes = self.shared.image.resize(bytes).map_err(|error| error.to_string())?;
        if bytes != before {
            let path = self.shared.image.path().display();
            tracing::info!("Disk {path}: resized from {before} to {bytes} bytes");
            self.config_changed();
        }
        Ok(bytes)
    }

    /// The configuration space has changed: the guest is to read it again. Until the vhost-user server can say that, the
    /// guest finds the new capacity when it next reads it.
    #[expect(clippy::unused_self, reason = "the notification will go through the device")]
    fn config_changed(&self) {}

    pub(crate) fn status(&self) -> Value {
        let mut status = self.shared.metrics.to_json();
        status["disk_bytes"] = self.shared.image.bytes().into();
        status["disk_path"] = self.shared.image.path().display().to_string().into();
        status["disk_access"] = self.shared.image.access().name().into();
        status["block_bytes"] = self.shared.image.block_bytes().into();
        status["queues"] = self.workers.len().into();
        status["durability_lost"] = self.shared.sync_failed.load(Ordering::Relaxed).into();
        status
    }
}

impl Device for Backend {
    fn queues(&self) -> usize {
        self.workers.len()
    }

    fn features(&self) -> u64 {
        let mut bits =
            vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH];
        if self.workers.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.shared.image.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        }
        bits.iter().map(|bit| 1 << bit).sum()
    }

    /// virtio 1.2 §5.2.4, up to the fields that we have features for.
    fn config_bytes(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend((self.shared.image.bytes() / SECTOR_BYTES as u64).to_le_bytes()); // capacity
        config.extend(SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
        config.extend(SEGMENTS_MAX.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry
        config.extend((SECTOR_BYTES as u32).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology
        config.extend([1, 0]); // writeback, and a byte that is unused
        config.extend((self.workers.len() as u16).to_le_bytes()); // num_queues
        config.extend([0; 24]); // discard, write zeroes
        config
    }

    fn write_config(&self, offset: u32, _data: &[u8]) -> Result<(), String> {
        Err(format!("The disk has no configuration that can be written (at {offset})"))
    }

    fn set_features(&self, features: u64) {
        let through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        self.shared.write_through.store(through, Ordering::Relaxed);
    }

    fn start_queue(&self, index: usize, ring: Ring) {
        self.workers[index].start_ring(ring);
    }

    fn stop_queue(&self, index: usize) -> u16 {
        self.workers[index].stop_ring()
    }
}
