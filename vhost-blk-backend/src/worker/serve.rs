//! How a worker carries requests out: by what is asked and by what the device is.

use std::sync::Arc;

use colo::vhost_user::{Chain, Ring};

use super::queue::Queue;
use super::{Mode, SHARED_TURN_REQUESTS_MAX, TURN_REQUESTS_MAX, Worker};
use crate::disk_ring::Wake;
use crate::image::Access;
use crate::metrics::Metrics;
use crate::request::{Extent, Operation, Parsed, Status, parse};
use crate::taken::Taken;
use crate::transfer::Kind;

/// So many answers that were given at once are made the guest's together.
const PUBLISH_REQUESTS: usize = 16;

/// What becomes of a request that was begun.
enum Begun {
    Settled,
    InFlight,
    /// It has to wait, and with it what is behind it.
    Waits(Taken),
}

impl Worker {
    /// Whether a request may be taken now.
    pub(super) fn can_take(&self) -> bool {
        !matches!(self.mode, Mode::Held) && self.disk.has_room()
    }

    /// Takes requests of one queue and begins them. Returns how many.
    pub(super) fn take_batch(&mut self, index: usize) -> usize {
        let Some(mut ring) = self.queues[index].ring.take() else {
            return 0;
        };
        if self.disk.take_fired(Wake::Kick(index)) && ring.is_polled() {
            ring.drain_kick();
        }
        // the driver's next words to the next queue, while this one is served
        let next = if index + 1 < self.queues.len() { index + 1 } else { 0 };
        if let Some(next) = &self.queues[next].ring {
            next.prefetch();
        }
        let mut done = 0;
        let slow = self.shared.image.access() != Access::Null;
        let most = if self.queues.len() > 1 { SHARED_TURN_REQUESTS_MAX } else { TURN_REQUESTS_MAX };
        while done < most && self.take(index, &mut ring) {
            done += 1;
            if slow || done % PUBLISH_REQUESTS == 0 {
                ring.publish_used();
            }
        }
        ring.publish_used();
        self.queues[index].ring = Some(ring);
        done
    }

    /// Takes one request and begins it, or begins the parked one. Returns whether there was one that could.
    #[inline]
    fn take(&mut self, index: usize, ring: &mut Ring) -> bool {
        let stopping = self.queues[index].stopping.is_some() && !ring.has_again();
        if !self.can_take() || stopping {
            return false;
        }
        let metrics = &self.shared.metrics[self.index];
        let Queue { chain, extents, parked, .. } = &mut self.queues[index];
        let taken = match parked.take() {
            Some(parked) => parked,
            None => {
                if !ring.pop(chain) {
                    return false;
                }
                match parse(chain, self.shared.limits(), extents) {
                    Parsed::Request(operation) => {
                        Taken::new(index as u16, operation, data_bytes(operation, chain, extents), metrics)
                    }
                    Parsed::Refused(status) => {
                        metrics.refused.add(1);
                        chain.put_status(status as u8);
                        ring.add_used(chain.head(), u32::from(chain.writable_bytes() == 0));
                        return true;
                    }
                    Parsed::Unanswerable => {
                        metrics.refused.add(1);
                        ring.add_used(chain.head(), 0);
                        return true;
                    }
                }
            }
        };
        match self.begin(index, ring, taken) {
            Begun::Settled => true,
            Begun::InFlight => {
                self.queues[index].in_flight += 1;
                true
            }
            Begun::Waits(taken) => {
                self.metrics().waits.add(1);
                self.queues[index].parked = Some(taken);
                false
            }
        }
    }

    /// Starts or carries out a request.
    fn begin(&mut self, index: usize, ring: &mut Ring, taken: Taken) -> Begun {
        let operation = taken.operation();
        match &self.mode {
            Mode::Held => Begun::Waits(taken),
            _ if operation == Operation::GetId => {
                let Queue { chain, .. } = &self.queues[index];
                chain.fill(&[&self.shared.serial]);
                settle(taken, ring, chain, self.metrics(), Status::Ok)
            }
            Mode::Alone => self.begin_alone(index, ring, taken),
            Mode::Primary(_) => self.begin_primary(index, ring, taken),
            Mode::Secondary(_) => self.begin_secondary(index, ring, taken),
        }
    }

    /// The disk is this guest's.
    #[inline]
    fn begin_alone(&mut self, index: usize, ring: &mut Ring, taken: Taken) -> Begun {
        let Self { shared, disk, inline, queues, index: worker, .. } = self;
        let Queue { chain, extents, .. } = &mut queues[index];
        let (metrics, image) = (&shared.metrics[*worker], &*shared.image);
        let through = shared.write_cache.is_through();
        let operation = taken.operation();
        if image.access() == Access::Null || (extents_only(operation) && extents.is_empty()) {
            return settle(taken, ring, chain, metrics, Status::Ok);
        }
        let transfer = disk.next();
        let kind = match operation {
            Operation::Read(offset) => {
                metrics.bounced.add(transfer.read(chain, image, offset).into());
                Kind::Read
            }
            Operation::Write(offset) => {
                metrics.bounced.add(transfer.write(chain, image, offset, through).into());
                Kind::Write
            }
            Operation::Discard | Operation::WriteZeroes => {
                let kind = if operation == Operation::Discard { Kind::Discard } else { Kind::Zero };
                transfer.clear(kind, chain, extents, through);
                kind
            }
            Operation::Flush | Operation::GetId => {
                shared.write_cache.flushed();
                transfer.sync(chain);
                Kind::Sync
            }
        };
        if inline.tries(kind) && inline.attempt(transfer, image) {
            transfer.finish();
            metrics.inline.add(1);
            return settle(taken, ring, &transfer.chain, metrics, Status::Ok);
        }
        disk.start(taken);
        Begun::InFlight
    }

    /// The disk is this guest's, and the peer gets every write.
    fn begin_primary(&mut self, index: usize, ring: &mut Ring, taken: Taken) -> Begun {
        let Mode::Primary(primary) = &self.mode else {
            unreachable!("asked for a primary");
        };
        let primary = primary.clone();
        let queue = &mut self.queues[index];
        let offset = match (taken.operation(), queue.extents.first()) {
            (Operation::Write(offset), _) => offset,
            (Operation::WriteZeroes, Some(extent)) => extent.offset,
            // The replica keeps what it has, and so must this disk: a hint may be passed over.
            (Operation::Discard, _) | (Operation::WriteZeroes, None) => {
                let metrics = &self.shared.metrics[self.index];
                return settle(taken, ring, &queue.chain, metrics, Status::Ok);
            }
            (Operation::Read(_) | Operation::Flush | Operation::GetId, _) => {
                return self.begin_alone(index, ring, taken);
            }
        };
        // One copy for both disks: the guest may change its buffer while the write is under way.
        let copy = queue.copy.take().unwrap_or_else(|| {
            let mut copy = Vec::new();
            gather(&taken, &queue.chain, &mut copy);
            Arc::new(copy)
        });
        if !primary.admit(offset, &copy) {
            queue.copy = Some(copy);
            return Begun::Waits(taken);
        }
        let through = self.shared.write_cache.is_through();
        self.disk.next().write_copy(&mut queue.chain, &self.shared.image, copy, offset, through);
        self.disk.start(taken.admitted(primary, offset));
        Begun::InFlight
    }

    /// This guest sees the disk through the buffer.
    fn begin_secondary(&mut self, index: usize, ring: &mut Ring, taken: Taken) -> Begun {
        let Self { mode: Mode::Secondary(secondary), queues, shared, index: worker, scratch, .. } = self
        else {
            unreachable!("asked for a secondary");
        };
        let Queue { chain, extents, .. } = &mut queues[index];
        let metrics = &shared.metrics[*worker];
        let offset = match (taken.operation(), extents.first()) {
            (Operation::Read(offset), _) => {
                scratch.resize(chain.writable_bytes() as usize, 0);
                let status = match secondary.read(offset, scratch) {
                    Ok(()) if chain.fill(&[scratch]) == scratch.len() => Status::Ok,
                    _ => Status::IoError,
                };
                return settle(taken, ring, chain, metrics, status);
            }
            (Operation::Write(offset), _) => offset,
            (Operation::WriteZeroes, Some(extent)) => extent.offset,
            // Durable is what the buffer covers when it has become the disk; until then no acknowledgement of this guest
            // reaches anybody. And a discard does nothing, as on the primary.
            _ => return settle(taken, ring, chain, metrics, Status::Ok),
        };
        gather(&taken, chain, scratch);
        if !secondary.write(offset, scratch) {
            return Begun::Waits(taken);
        }
        settle(taken, ring, chain, metrics, Status::Ok)
    }
}

fn settle(taken: Taken, ring: &mut Ring, chain: &Chain, metrics: &Metrics, status: Status) -> Begun {
    taken.settle(ring, chain, metrics, status);
    Begun::Settled
}

fn extents_only(operation: Operation) -> bool {
    matches!(operation, Operation::Discard | Operation::WriteZeroes)
}

fn data_bytes(operation: Operation, chain: &Chain, extents: &[Extent]) -> u64 {
    match operation {
        Operation::Read(_) => chain.writable_bytes().into(),
        Operation::Write(_) => chain.readable_bytes().into(),
        Operation::Flush => 0,
        Operation::GetId => virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES.into(),
        Operation::Discard | Operation::WriteZeroes => extents.iter().map(|extent| extent.bytes).sum(),
    }
}

/// Copies what a request writes into `data`, in place of what is there.
fn gather(taken: &Taken, chain: &Chain, data: &mut Vec<u8>) {
    data.clear();
    data.resize(taken.bytes() as usize, 0);
    if let Operation::Write(_) = taken.operation() {
        chain.copy_to(data);
    }
}
