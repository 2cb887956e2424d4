//! The guest's side of a disk: the queues that it gets, and one request at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};

use super::ring::{Layout, Ring};
use crate::driver::{self, BATCH, Memory, Notifiers};

/// Bytes of a sector, virtio-blk's unit.
pub(super) const SECTOR_BYTES: u64 = 512;
/// How long to wait for one request before the server is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What a guest looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of queues.
    pub queues: u16,
    /// Most requests in flight in each of them, up to 8192.
    pub depth: u16,
    /// Bytes of a request.
    pub block_bytes: usize,
    /// Whether to negotiate EVENT_IDX, as Linux does.
    pub event_idx: bool,
}

/// One queue and its notifications.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) layout: Layout,
    pub(super) ring: Ring,
    pub(super) notifiers: Notifiers,
}

impl Queue {
    /// Lets the device see what was offered, and kicks it if it wants that.
    #[inline]
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.ring.publish() { self.notifiers.kick() } else { Ok(()) }
    }
}

/// A running device, seen from the guest.
pub struct Connection {
    /// None of a device in this process.
    frontend: Option<Frontend>,
    shape: Shape,
    disk_bytes: u64,
    pub(super) queues: Vec<Queue>,
}

impl Connection {
    /// Connects to the vhost-user-blk server at `socket` and starts its queues.
    ///
    /// # Errors
    /// The server refuses something, or has too few queues or too small a disk.
    pub fn open(socket: &Path, shape: Shape) -> Result<Self> {
        ensure!((1..=8192).contains(&shape.depth), "A depth of {}: choose 1 to 8192", shape.depth);
        ensure!(
            shape.block_bytes > 0 && (shape.block_bytes as u64).is_multiple_of(SECTOR_BYTES),
            "Blocks of {} bytes: choose a multiple of {SECTOR_BYTES}",
            shape.block_bytes
        );
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        let (mut frontend, offered) = driver::connect(socket, shape.queues.into(), wanted)?;
        let (_, capacity) = frontend
            .get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])
            .context("GET_CONFIG of the disk's capacity")?;
        let capacity: [u8; 8] = capacity.try_into().ok().context("A capacity of 8 bytes")?;
        let disk_bytes = u64::from_le_bytes(capacity) * SECTOR_BYTES;
        ensure!(disk_bytes >= shape.block_bytes as u64, "A disk of {disk_bytes} bytes is too small");

        // without FLUSH a device takes every write for one that must be durable (virtio 1.2 §5.2.6.2)
        let mut features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH;
        if shape.queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if shape.event_idx {
            features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        let (memory, queues) = build_queues(shape)?;
        driver::set_memory(&frontend, offered, features, &memory)?;
        for (index, queue) in queues.iter().enumerate() {
            driver::start_queue(&mut frontend, index, &memory, &queue.layout.place, &queue.notifiers)?;
        }
        Ok(Self { frontend: Some(frontend), shape, disk_bytes, queues })
    }

    /// A device that somebody in this process plays.
    pub(super) fn without_server(shape: Shape, disk_bytes: u64, queues: Vec<Queue>) -> Self {
        Self { frontend: None, shape, disk_bytes, queues }
    }
    /// What the guest looks like.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whole blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.disk_bytes / self.shape.block_bytes as u64
    }

    /// Makes one request for the `block`th block and waits for its end. Reads into `data`, or writes it.
    ///
    /// # Errors
    /// It fails, or does not end.
    pub fn transfer(&mut self, write: bool, block: u64, data: &mut [u8]) -> Result<()> {
        let queue = &mut self.queues[0];
        assert_eq!(queue.ring.pending(), 0, "one at a time");
        if write {
            queue.ring.set_data(0, data);
        } else {
            queue.ring.set_data(0, &vec![0xa5; data.len()]);
        }
        queue.ring.offer(0, write, block * (self.shape.block_bytes as u64 / SECTOR_BYTES));
        queue.publish()?;
        let began = Instant::now();
        while queue.ring.take(&mut [(0, 0); BATCH])? == 0 {
            ensure!(began.elapsed() < PATIENCE, "The server has not ended a request within {PATIENCE:?}");
            std::hint::spin_loop();
        }
        let status = queue.ring.take_status(0);
        if status != 0 {
            bail!("A {} of block {block} ended with status {status}", if write { "write" } else { "read" });
        }
        if !write {
            queue.ring.copy_data(0, data);
        }
        Ok(())
    }

    /// Stops the queues as a VMM does. Dropping the connection alone is a VMM that has died.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn close(self) -> Result<()> {
        let Some(frontend) = &self.frontend else {
            return Ok(());
        };
        for index in 0..self.queues.len() {
            frontend.get_vring_base(index).with_context(|| format!("GET_VRING_BASE of queue {index}"))?;
        }
        Ok(())
    }
}

/// Guest memory with the queues of `shape` in it, nothing in flight.
pub(super) fn build_queues(shape: Shape) -> Result<(Arc<Memory>, Vec<Queue>)> {
    let mut layouts = Vec::new();
    let mut end = 0;
    for _ in 0..shape.queues {
        let layout = Layout::new(end, shape.depth, shape.block_bytes);
        end = layout.end();
        layouts.push(layout);
    }
    let memory = Memory::new(end)?;
    let queue = |layout: Layout| {
        let ring = Ring::new(&memory, &layout, shape.depth, shape.block_bytes, shape.event_idx);
        Ok(Queue { layout, ring, notifiers: Notifiers::new()? })
    };
    let queues = layouts.into_iter().map(queue).collect::<Result<_>>()?;
    Ok((memory, queues))
}
