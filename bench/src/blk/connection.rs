//! A vhost-user frontend: the handshake that a VMM makes, and the queues that it gets.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};
use vmm_sys_util::eventfd::EventFd;

use super::ring::{BATCH, Layout, Memory, Ring};

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
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
}

impl Queue {
    /// Lets the device see what was offered, and kicks it if it wants that.
    #[inline]
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.ring.publish() {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).context("Cannot kick the device")?;
        }
        Ok(())
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
        let place = || format!("vhost-user socket {}", socket.display());
        let mut frontend = Frontend::connect(socket, shape.queues.into()).with_context(place)?;
        frontend.set_owner().with_context(place)?;
        let offered = frontend.get_features().context("GET_FEATURES")?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & wanted;
        frontend.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let have = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
            ensure!(have >= shape.queues.into(), "The server has {have} queues, {} are wanted", shape.queues);
        }
        let (_, capacity) = frontend
            .get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])
            .context("GET_CONFIG of the disk's capacity")?;
        let capacity: [u8; 8] = capacity.try_into().ok().context("A capacity of 8 bytes")?;
        let disk_bytes = u64::from_le_bytes(capacity) * SECTOR_BYTES;
        ensure!(disk_bytes >= shape.block_bytes as u64, "A disk of {disk_bytes} bytes is too small");

        // without FLUSH a device takes every write for one that must be durable (virtio 1.2 §5.2.6.2)
        let mut features = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH;
        features |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if shape.queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if shape.event_idx {
            features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        ensure!(
            features & !offered == 0,
            "The server does not offer the features {:#x}",
            features & !offered
        );
        frontend.set_features(features).context("SET_FEATURES")?;

        let (memory, queues) = build_queues(shape)?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.bytes() as u64,
            userspace_addr: memory.address(),
            mmap_offset: 0,
            mmap_handle: memory.fd().as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).context("SET_MEM_TABLE")?;
        for (index, queue) in queues.iter().enumerate() {
            start_queue(&mut frontend, index, memory.address(), queue)
                .with_context(|| format!("Queue {index}"))?;
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
        while queue.ring.take(&mut [0; BATCH])? == 0 {
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

/// The same eventfd in the type that the frontend wants.
#[expect(unsafe_code, reason = "that type is made of a number only")]
fn event_fd(fd: &OwnedFd) -> Result<EventFd> {
    let number = fd.try_clone().context("Cannot share an eventfd")?.into_raw_fd();
    // SAFETY: `into_raw_fd` has given us the descriptor, an eventfd that is open and nobody else's.
    Ok(unsafe { EventFd::from_raw_fd(number) })
}

fn start_queue(frontend: &mut Frontend, index: usize, memory_address: u64, queue: &Queue) -> Result<()> {
    let layout = &queue.layout;
    let address = |offset: usize| memory_address + offset as u64;
    frontend.set_vring_num(index, layout.size)?;
    frontend.set_vring_base(index, 0)?;
    let addresses = VringConfigData {
        queue_max_size: layout.size,
        queue_size: layout.size,
        flags: 0,
        desc_table_addr: address(layout.descriptors),
        used_ring_addr: address(layout.used),
        avail_ring_addr: address(layout.available),
        log_addr: None,
    };
    frontend.set_vring_addr(index, &addresses)?;
    frontend.set_vring_call(index, &event_fd(&queue.call)?)?;
    frontend.set_vring_kick(index, &event_fd(&queue.kick)?)?;
    frontend.set_vring_enable(index, true)?;
    Ok(())
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
        let event =
            || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).context("Cannot make an eventfd");
        Ok(Queue { layout, ring, kick: event()?, call: event()? })
    };
    let queues = layouts.into_iter().map(queue).collect::<Result<_>>()?;
    Ok((memory, queues))
}
