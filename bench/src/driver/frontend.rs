//! The handshake that a VMM makes with a vhost-user device.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::{Memory, Place};

/// What the two sides wake each other with.
#[derive(Debug)]
pub(crate) struct Notifiers {
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
}

impl Notifiers {
    pub(crate) fn new() -> Result<Self> {
        let event =
            || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).context("Cannot make an eventfd");
        Ok(Self { kick: event()?, call: event()? })
    }

    /// Kicks the device.
    #[cold]
    pub(crate) fn kick(&self) -> Result<()> {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).context("Cannot kick the device").map(drop)
    }
}

/// Connects to the device at `socket`, up to the protocol features, with those of `wanted` that it has. `wanted_queues` it
/// must have. Returns also the virtio features that it offers.
pub(crate) fn connect(
    socket: &Path,
    wanted_queues: u64,
    wanted: VhostUserProtocolFeatures,
) -> Result<(Frontend, u64)> {
    let place = || format!("vhost-user socket {}", socket.display());
    let mut frontend = Frontend::connect(socket, wanted_queues).with_context(place)?;
    frontend.set_owner().with_context(place)?;
    let offered = frontend.get_features().context("GET_FEATURES")?;
    let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & wanted;
    frontend.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        let have = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
        ensure!(have >= wanted_queues, "The server has {have} queues, {wanted_queues} are wanted");
    }
    Ok((frontend, offered))
}

/// Chooses features, all of which must be offered, and tells the device of all memory.
pub(crate) fn set_memory(frontend: &Frontend, offered: u64, features: u64, memory: &Memory) -> Result<()> {
    let features = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    ensure!(features & !offered == 0, "The server does not offer the features {:#x}", features & !offered);
    frontend.set_features(features).context("SET_FEATURES")?;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: memory.bytes() as u64,
        userspace_addr: memory.address(),
        mmap_offset: 0,
        mmap_handle: memory.fd().as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).context("SET_MEM_TABLE").map(drop)
}

/// The same eventfd in the type that the frontend wants.
#[expect(unsafe_code, reason = "that type is made of a number only")]
fn event_fd(fd: &OwnedFd) -> Result<EventFd> {
    let number = fd.try_clone().context("Cannot share an eventfd")?.into_raw_fd();
    // SAFETY: `into_raw_fd` has given us the descriptor, an eventfd that is open and nobody else's.
    Ok(unsafe { EventFd::from_raw_fd(number) })
}

/// Starts a queue with nothing in it.
pub(crate) fn start_queue(
    frontend: &mut Frontend,
    index: usize,
    memory: &Memory,
    place: &Place,
    notifiers: &Notifiers,
) -> Result<()> {
    let address = |offset: usize| memory.address() + offset as u64;
    let addresses = VringConfigData {
        queue_max_size: place.size,
        queue_size: place.size,
        flags: 0,
        desc_table_addr: address(place.descriptors),
        used_ring_addr: address(place.used),
        avail_ring_addr: address(place.available),
        log_addr: None,
    };
    let mut start = || -> Result<()> {
        frontend.set_vring_num(index, place.size)?;
        frontend.set_vring_base(index, 0)?;
        frontend.set_vring_addr(index, &addresses)?;
        frontend.set_vring_call(index, &event_fd(&notifiers.call)?)?;
        frontend.set_vring_kick(index, &event_fd(&notifiers.kick)?)?;
        frontend.set_vring_enable(index, true)?;
        Ok(())
    };
    start().with_context(|| format!("Queue {index}"))
}
