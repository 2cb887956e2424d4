//! One frontend's connection: what it has told so far, and what each of its messages changes.

mod memory;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserProtocolFeatures, VhostUserU64, VhostUserVirtioFeatures,
    VhostUserVringAddr, VhostUserVringState,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::ByteValued;

use super::device::Device;
use super::inflight::InflightMemory;
use super::message::{Message, MessageError};
use super::ring::{Ring, RingError, RingSetup, signal};
use super::vring::{Addresses, Kick, Vring};
use crate::memory::{DirtyLog, DirtyLogs, MemoryError, MemoryTable};

/// In the u64 of SET_VRING_KICK, _CALL and _ERR: no descriptor comes along.
const VRING_NO_FD: u64 = 0x100;
const VRING_INDEX: u64 = 0xff;

/// What ended a frontend's connection.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A message that cannot be understood.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Memory that cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A ring that cannot be used.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The device does not serve a queue.
    #[error("Queue {index} is not served: {why}")]
    Device {
        /// The queue.
        index: usize,
        /// What the device says.
        why: String,
    },
    /// A message that is well formed and asks for something wrong.
    #[error("{request:?}: {what}")]
    Refused {
        /// The request.
        request: FrontendReq,
        /// What is wrong.
        what: String,
    },
}

/// What goes back to the frontend.
enum Reply {
    /// Nothing but the acknowledgement that was asked for.
    Done,
    /// Nothing was changed, for this reason; the connection goes on.
    Failed(String),
    /// An answer.
    Payload(Vec<u8>),
    /// An answer with the memory that the frontend is to keep.
    Inflight(Vec<u8>, Arc<InflightMemory>),
}

impl Reply {
    fn number(value: u64) -> Self {
        Self::Payload(value.to_ne_bytes().to_vec())
    }
}

/// The state of one connection.
pub(super) struct Session<'a, D: Device + ?Sized> {
    device: &'a D,
    logs: &'a DirtyLogs,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    features: u64,
    /// The device has heard of them.
    features_set: bool,
    protocol_features: u64,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightMemory>>,
    broken_rings: Arc<AtomicU64>,
    /// Some ring has run since the device heard last that none does.
    was_running: bool,
}

impl<'a, D: Device + ?Sized> Session<'a, D> {
    pub(super) fn new(device: &'a D, logs: &'a DirtyLogs, broken_rings: Arc<AtomicU64>) -> Self {
        Self {
            device,
            logs,
            memory: MemoryTable::new(logs.clone()),
            vrings: std::iter::repeat_with(Vring::default).take(device.queues()).collect(),
            features: 0,
            features_set: false,
            protocol_features: 0,
            log: None,
            inflight: None,
            broken_rings,
            was_running: false,
        }
    }

    /// Carries out one message and answers it.
    pub(super) fn handle(
        &mut self,
        mut message: Message,
        stream: &mut UnixStream,
    ) -> Result<(), SessionError> {
        tracing::trace!("vhost-user: {:?}", message.request);
        // asked before, since SET_PROTOCOL_FEATURES itself may change it
        let acknowledge = message.need_reply && self.has_protocol(VhostUserProtocolFeatures::REPLY_ACK);
        let result = self.dispatch(&mut message);
        self.tell_quiesced();
        let mut fd = None;
        let payload = match &result {
            Ok(Reply::Payload(payload)) => Some(payload.clone()),
            Ok(Reply::Inflight(payload, memory)) => {
                fd = Some(memory.as_fd());
                Some(payload.clone())
            }
            Ok(Reply::Done) => acknowledge.then(|| 0u64.to_ne_bytes().to_vec()),
            Ok(Reply::Failed(_)) | Err(_) => acknowledge.then(|| 1u64.to_ne_bytes().to_vec()),
        };
        if let Some(payload) = payload {
            message.reply(stream, &payload, fd).map_err(MessageError::from)?;
        }
        if let Reply::Failed(why) = result? {
            tracing::warn!("vhost-user: {:?} was refused: {why}", message.request);
        }
        Ok(())
    }

    /// Stops every ring and forgets the guest's memory and the frontend's log.
    pub(super) fn close(&mut self) {
        self.stop_all();
        self.vrings.fill_with(Vring::default);
        self.tell_quiesced();
        self.log = None;
        self.inflight = None;
        self.logs.set_frontend(None);
        self.memory.clear();
        if let Some(channel) = self.device.frontend_channel() {
            channel.set(None);
        }
    }

    fn tell_quiesced(&mut self) {
        let running = self.vrings.iter().any(|vring| vring.running);
        // one that waits for its memory will run again in a moment
        let protocol_features = self.has_feature(VhostUserVirtioFeatures::PROTOCOL_FEATURES);
        let wanted = self.vrings.iter().any(|vring| vring.wanted(protocol_features));
        if !running && !wanted && std::mem::take(&mut self.was_running) {
            self.device.quiesced();
        }
        self.was_running |= running;
    }

    fn dispatch(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let request = message.request;
        match request {
            FrontendReq::SET_MEM_TABLE => return self.set_mem_table(message),
            FrontendReq::SET_LOG_BASE => return self.set_log_base(message),
            FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                return self.set_vring_fd(message);
            }
            FrontendReq::ADD_MEM_REG => return self.add_mem_reg(message),
            FrontendReq::REM_MEM_REG => return self.rem_mem_reg(message),
            FrontendReq::SET_INFLIGHT_FD if self.device.tracks_inflight() => {
                return self.set_inflight(message);
            }
            FrontendReq::SET_BACKEND_REQ_FD => {
                message.expect_fds(1)?;
                let Some(channel) = self.device.frontend_channel() else {
                    return Err(MessageError::Unknown { request: request.into() }.into());
                };
                channel.set(message.fds.pop().map(UnixStream::from));
                return Ok(Reply::Done);
            }
            FrontendReq::SET_LOG_FD => {
                // The log is found by whoever reads it; nobody signals its growth in any frontend that we know.
                message.expect_fds(1)?;
                return Ok(Reply::Done);
            }
            _ => message.expect_fds(0)?,
        }
        match request {
            FrontendReq::GET_FEATURES => Ok(Reply::number(self.offered_features())),
            FrontendReq::SET_FEATURES => self.set_features(message.body::<VhostUserU64>()?.value),
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(Reply::number(self.offered_protocol_features())),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let chosen = message.body::<VhostUserU64>()?.value;
                subset(request, chosen, self.offered_protocol_features())?;
                self.protocol_features = chosen;
                Ok(Reply::Done)
            }
            FrontendReq::GET_QUEUE_NUM => Ok(Reply::number(self.device.queues() as u64)),
            FrontendReq::SET_OWNER => Ok(Reply::Done),
            FrontendReq::RESET_OWNER | FrontendReq::RESET_DEVICE => {
                self.stop_all();
                self.vrings.fill_with(Vring::default);
                self.inflight = None;
                self.features_set = false;
                self.arm_log();
                Ok(Reply::Done)
            }
            FrontendReq::SET_VRING_NUM => {
                let state: VhostUserVringState = message.body()?;
                let size =
                    u16::try_from(state.num).ok().filter(|size| size.is_power_of_two() && *size <= 32768);
                let Some(size) = size else {
                    return refuse(request, format!("{} entries are no size of a ring", { state.num }));
                };
                self.change(request, state.index, |vring| vring.size = Some(size))
            }
            FrontendReq::SET_VRING_ADDR => {
                let addresses: VhostUserVringAddr = message.body()?;
                self.change(request, addresses.index, |vring| vring.addresses = Some(addresses.into()))
            }
            FrontendReq::SET_VRING_BASE => {
                let state: VhostUserVringState = message.body()?;
                let Ok(base) = u16::try_from(state.num) else {
                    return refuse(request, format!("{} is no index of a split ring", { state.num }));
                };
                self.change(request, state.index, |vring| vring.next_available = base)
            }
            FrontendReq::GET_VRING_BASE => {
                let state: VhostUserVringState = message.body()?;
                let index = self.index(request, state.index.into())?;
                self.stop(index);
                self.vrings[index].kick = Kick::Stopped;
                let base = VhostUserVringState::new(state.index, self.vrings[index].next_available.into());
                Ok(Reply::Payload(base.as_slice().to_vec()))
            }
            FrontendReq::SET_VRING_ENABLE => {
                let state: VhostUserVringState = message.body()?;
                let enabled = match state.num {
                    0 => false,
                    1 => true,
                    other => return refuse(request, format!("{other} is neither 0 nor 1")),
                };
                let index = self.index(request, state.index.into())?;
                self.vrings[index].enabled = Some(enabled);
                if !enabled {
                    self.stop(index);
                }
                self.start_wanted()
            }
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Reply::number(memory::MEM_SLOTS_MAX as u64)),
            FrontendReq::GET_INFLIGHT_FD if self.device.tracks_inflight() => self.get_inflight(message),
            FrontendReq::SEND_RARP if self.device.announces() => {
                // the address is in the number's first six bytes
                let number = message.body::<VhostUserU64>()?.value.to_le_bytes();
                self.device.announce(std::array::from_fn(|at| number[at]));
                Ok(Reply::Done)
            }
            FrontendReq::GET_CONFIG => self.get_config(message),
            FrontendReq::SET_CONFIG => self.set_config(message),
            other => Err(MessageError::Unknown { request: other.into() }.into()),
        }
    }

    fn offered_features(&self) -> u64 {
        let server = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        let vhost = VhostUserVirtioFeatures::LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        server.iter().fold(self.device.features() | vhost.bits(), |bits, bit| bits | 1 << bit)
    }

    fn offered_protocol_features(&self) -> u64 {
        let mut offered = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if self.device.tracks_inflight() {
            offered |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        if self.device.announces() {
            offered |= VhostUserProtocolFeatures::RARP;
        }
        if self.device.frontend_channel().is_some() {
            offered |= VhostUserProtocolFeatures::BACKEND_REQ;
        }
        if !self.device.config_bytes().is_empty() {
            offered |= VhostUserProtocolFeatures::CONFIG;
        }
        offered.bits()
    }

    fn has_protocol(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    fn has_feature(&self, feature: VhostUserVirtioFeatures) -> bool {
        self.features & feature.bits() != 0
    }

    fn set_features(&mut self, features: u64) -> Result<Reply, SessionError> {
        subset(FrontendReq::SET_FEATURES, features, self.offered_features())?;
        if features != self.features || !self.features_set {
            self.stop_all();
            let vhost = VhostUserVirtioFeatures::LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES;
            let of_device = |features| features & !vhost.bits();
            // Not when a migration only switches the log on or off: what the driver has chosen since is to stay.
            if of_device(features) != of_device(self.features) || !self.features_set {
                self.device.set_features(of_device(features));
            }
            (self.features, self.features_set) = (features, true);
            self.arm_log();
        }
        self.start_wanted()
    }

    fn set_vring_fd(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let value = message.body::<VhostUserU64>()?.value;
        if value & !(VRING_INDEX | VRING_NO_FD) != 0 {
            return Err(message.malformed().into());
        }
        message.expect_fds(usize::from(value & VRING_NO_FD == 0))?;
        let fd = message.fds.pop().map(nonblocking).transpose()?;
        let index = self.index(message.request, value & VRING_INDEX)?;
        let restart = self.vrings[index].running;
        self.stop(index);
        let vring = &mut self.vrings[index];
        match message.request {
            FrontendReq::SET_VRING_KICK => vring.kick = fd.map_or(Kick::Polled, Kick::Eventfd),
            FrontendReq::SET_VRING_CALL => {
                // what was used before may have been signalled to the old one, which nobody reads any more
                if restart {
                    signal(fd.as_deref());
                }
                vring.call = fd;
            }
            _ => vring.error = fd,
        }
        self.start_wanted()
    }

    fn get_config(&self, message: &Message) -> Result<Reply, SessionError> {
        let (header, _) = self.config_body(message)?;
        self.device.config_read();
        let mut config = self.device.config_bytes();
        // a frontend that knows a later version of the structure reads zeros past the end of ours
        config.resize(config.len().max((header.offset + header.size) as usize), 0);
        let mut reply = header.as_slice().to_vec();
        reply.extend_from_slice(&config[header.offset as usize..(header.offset + header.size) as usize]);
        Ok(Reply::Payload(reply))
    }

    fn set_config(&self, message: &Message) -> Result<Reply, SessionError> {
        let (header, data) = self.config_body(message)?;
        Ok(match self.device.write_config(header.offset, data) {
            Ok(()) => Reply::Done,
            Err(why) => Reply::Failed(why),
        })
    }

    fn config_body<'m>(&self, message: &'m Message) -> Result<(VhostUserConfig, &'m [u8]), SessionError> {
        if !self.has_protocol(VhostUserProtocolFeatures::CONFIG) {
            return Err(MessageError::Unknown { request: message.request.into() }.into());
        }
        let (header, data): (VhostUserConfig, &[u8]) = message.body_and_rest()?;
        if data.len() != header.size as usize {
            return Err(message.malformed().into());
        }
        Ok((header, data))
    }

    fn index(&self, request: FrontendReq, index: u64) -> Result<usize, SessionError> {
        match usize::try_from(index) {
            Ok(index) if index < self.vrings.len() => Ok(index),
            _ => refuse(
                request,
                format!("Queue {index} of {}: give the frontend fewer queues", self.vrings.len()),
            ),
        }
    }

    /// Changes one ring, which is stopped meanwhile.
    fn change(
        &mut self,
        request: FrontendReq,
        index: u32,
        change: impl FnOnce(&mut Vring),
    ) -> Result<Reply, SessionError> {
        let index = self.index(request, index.into())?;
        self.stop(index);
        change(&mut self.vrings[index]);
        self.arm_log();
        self.start_wanted()
    }

    fn in_memory(&self, addresses: &Addresses) -> bool {
        [addresses.descriptors, addresses.available, addresses.used]
            .iter()
            .all(|address| self.memory.guest_address(*address).is_some())
    }

    fn stop(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        if std::mem::take(&mut vring.running) {
            vring.next_available = self.device.stop_queue(index);
        }
    }

    fn stop_all(&mut self) {
        for index in 0..self.vrings.len() {
            self.stop(index);
        }
    }

    /// Starts every ring that is complete and does not run.
    fn start_wanted(&mut self) -> Result<Reply, SessionError> {
        self.start(Missing::Refuse)
    }

    fn start(&mut self, missing: Missing) -> Result<Reply, SessionError> {
        let protocol_features = self.has_feature(VhostUserVirtioFeatures::PROTOCOL_FEATURES);
        for index in 0..self.vrings.len() {
            let vring = &self.vrings[index];
            if vring.running || !vring.wanted(protocol_features) {
                continue;
            }
            let (Some(size), Some(addresses)) = (vring.size, vring.addresses) else {
                continue;
            };
            let translate = |part: &'static str, address: u64| {
                self.memory.guest_address(address).ok_or(RingError::Memory { index, part })
            };
            if missing == Missing::Wait && !self.in_memory(&addresses) {
                continue;
            }
            let ring = Ring::new(RingSetup {
                index,
                size,
                descriptors: translate("descriptor table", addresses.descriptors)?,
                available: translate("available ring", addresses.available)?,
                used: translate("used ring", addresses.used)?,
                next_available: vring.next_available,
                event_idx: self.features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1,
                memory: self.memory.memory().clone(),
                kick: match &vring.kick {
                    Kick::Eventfd(fd) => Some(fd.clone()),
                    Kick::Polled | Kick::Stopped => None,
                },
                call: vring.call.clone(),
                error: vring.error.clone(),
                broken_rings: self.broken_rings.clone(),
                inflight: self.inflight.clone(),
            })?;
            self.device.start_queue(index, ring).map_err(|why| SessionError::Device { index, why })?;
            self.vrings[index].running = true;
        }
        Ok(Reply::Done)
    }
}

/// What becomes of a ring that is not in guest memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// The frontend has told nonsense.
    Refuse,
    /// Regions come and go one by one: it waits for the one that it is in.
    Wait,
}

fn refuse<T>(request: FrontendReq, what: String) -> Result<T, SessionError> {
    Err(SessionError::Refused { request, what })
}

fn subset(request: FrontendReq, chosen: u64, offered: u64) -> Result<(), SessionError> {
    if chosen & !offered == 0 {
        return Ok(());
    }
    refuse(request, format!("Bits {:#x} were not offered", chosen & !offered))
}

/// Workers read and write these and must never wait for the other side.
fn nonblocking(fd: OwnedFd) -> Result<Arc<OwnedFd>, SessionError> {
    let set = || fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK);
    set().map_err(|errno| MessageError::Io(errno.into()))?;
    Ok(Arc::new(fd))
}
