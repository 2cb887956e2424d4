//! The messages that are about memory: the guest's, the log of what is written to it, and what outlives this process.

use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
};
use vm_memory::ByteValued;

use super::{Missing, Reply, Session, SessionError, refuse};
use crate::memory::{DirtyLog, Region};
use crate::vhost_user::device::Device;
use crate::vhost_user::inflight::InflightMemory;
use crate::vhost_user::message::Message;

/// Memory regions that a frontend may have with ADD_MEM_REG: as many as KVM has slots in QEMU's eyes.
pub(super) const MEM_SLOTS_MAX: usize = 509;

impl<D: Device + ?Sized> Session<'_, D> {
    pub(super) fn set_mem_table(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let (table, rest): (VhostUserMemory, &[u8]) = message.body_and_rest()?;
        let count = table.num_regions as usize;
        if rest.len() != count * size_of::<VhostUserMemoryRegion>() {
            return Err(message.malformed().into());
        }
        message.expect_fds(count)?;
        let mut parsed = vec![VhostUserMemoryRegion::default(); count];
        for (region, bytes) in parsed.iter_mut().zip(rest.chunks_exact(size_of::<VhostUserMemoryRegion>())) {
            region.as_mut_slice().copy_from_slice(bytes);
        }
        let regions = parsed.into_iter().zip(message.fds.drain(..)).map(|(region, file)| Region {
            guest_address: region.guest_phys_addr,
            bytes: region.memory_size,
            user_address: region.user_addr,
            mmap_offset: region.mmap_offset,
            file,
        });
        let regions = regions.collect();
        self.stop_all();
        self.memory.replace(regions)?;
        self.start_wanted()
    }

    pub(super) fn add_mem_reg(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let region: VhostUserSingleMemoryRegion = message.body()?;
        message.expect_fds(1)?;
        if self.memory.regions() >= MEM_SLOTS_MAX {
            return refuse(message.request, format!("There are {MEM_SLOTS_MAX} regions already"));
        }
        let region = Region {
            guest_address: region.guest_phys_addr,
            bytes: region.memory_size,
            user_address: region.user_addr,
            mmap_offset: region.mmap_offset,
            file: message.fds.remove(0),
        };
        self.stop_all();
        self.memory.add(region)?;
        self.start(Missing::Wait)
    }

    pub(super) fn rem_mem_reg(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let region: VhostUserSingleMemoryRegion = message.body()?;
        // a descriptor may come along and is of no use
        message.fds.clear();
        self.stop_all();
        // QEMU before 8.0 sends both messages once for each pair of a network card's queues: what is gone is gone
        if !self.memory.remove(region.guest_phys_addr, region.memory_size, region.user_addr)? {
            tracing::debug!("vhost-user: no memory region at {:#x}", { region.guest_phys_addr });
        }
        self.start(Missing::Wait)
    }

    pub(super) fn get_inflight(&mut self, message: &Message) -> Result<Reply, SessionError> {
        let asked = inflight_body(message)?;
        let queues = usize::from(asked.num_queues);
        if queues == 0 || queues > self.vrings.len() || !(1..=32768).contains(&asked.queue_size) {
            let what = format!("Memory for {queues} queues of {} entries", { asked.queue_size });
            return refuse(message.request, what);
        }
        let memory = InflightMemory::create(asked.num_queues, asked.queue_size);
        let memory = memory.map_err(|error| SessionError::Refused {
            request: message.request,
            what: format!("There is no memory for it: {error}"),
        })?;
        let answer = VhostUserInflight { mmap_size: memory.bytes(), mmap_offset: 0, ..asked };
        Ok(Reply::Inflight(answer.as_slice().to_vec(), Arc::new(memory)))
    }

    pub(super) fn set_inflight(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let asked = inflight_body(message)?;
        message.expect_fds(1)?;
        let fd = message.fds.remove(0);
        let memory = InflightMemory::map(fd, asked.mmap_offset, asked.num_queues, asked.queue_size);
        let memory = memory
            .map_err(|error| SessionError::Refused { request: message.request, what: error.to_string() })?;
        self.stop_all();
        self.inflight = Some(Arc::new(memory));
        self.start_wanted()
    }

    pub(super) fn set_log_base(&mut self, message: &mut Message) -> Result<Reply, SessionError> {
        let log: VhostUserLog = message.body()?;
        message.expect_fds(1)?;
        let fd = message.fds.remove(0);
        let failed = |what: String| SessionError::Refused { request: FrontendReq::SET_LOG_BASE, what };
        let bytes =
            log.mmap_size.checked_next_multiple_of(8).ok_or_else(|| failed("It is too long".into()))?;
        let mapped = DirtyLog::map(fd, log.mmap_offset, bytes).map_err(|error| failed(error.to_string()))?;
        self.stop_all();
        self.log = Some(Arc::new(mapped));
        self.arm_log();
        self.start_wanted()?;
        Ok(Reply::Payload(log.as_slice().to_vec()))
    }

    /// Logs all writes as soon as the frontend wants some. It asks for the data and for each used ring apart; switching
    /// them off, QEMU takes back the data first, so that the rings are logged a moment longer than they must.
    pub(super) fn arm_log(&self) {
        let rings = self.vrings.iter().any(|vring| vring.addresses.is_some_and(|addresses| addresses.log));
        let wanted = rings || self.has_feature(VhostUserVirtioFeatures::LOG_ALL);
        self.logs.set_frontend(self.log.clone().filter(|_| wanted));
    }
}

/// The body of the two messages about inflight memory. QEMU sends the structure with the padding at its end.
fn inflight_body(message: &Message) -> Result<VhostUserInflight, SessionError> {
    const PACKED_BYTES: usize = 20;
    let mut body = VhostUserInflight::default();
    let bytes = message.payload.len();
    if bytes != PACKED_BYTES && bytes != size_of::<VhostUserInflight>() {
        return Err(message.malformed().into());
    }
    body.as_mut_slice()[..bytes].copy_from_slice(&message.payload);
    Ok(body)
}
