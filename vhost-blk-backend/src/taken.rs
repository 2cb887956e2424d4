//! A request that was taken from a ring: a value that has to be answered or put back.

use std::sync::Arc;

use colo::vhost_user::{Chain, Ring};

use crate::metrics::Metrics;
use crate::replication::primary::Primary;
use crate::request::{Operation, Status};

/// Dropping one unsettled is a bug that would make the guest wait for ever, and panics. So a queue is drained when as
/// many were settled as were taken, and nothing else needs to be known.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Which of the worker's queues it came from.
    queue: u16,
    operation: Operation,
    /// Of data.
    bytes: u64,
    /// A write that the primary has forwarded and still counts as on its way to the local disk, and where that is.
    admitted: Option<(Arc<Primary>, u64)>,
    settled: bool,
}

impl Taken {
    /// A request with `bytes` of data.
    #[inline]
    pub(crate) fn new(queue: u16, operation: Operation, bytes: u64, metrics: &Metrics) -> Self {
        metrics.taken.add(1);
        Self { queue, operation, bytes, admitted: None, settled: false }
    }

    pub(crate) fn queue(&self) -> u16 {
        self.queue
    }

    pub(crate) fn operation(&self) -> Operation {
        self.operation
    }

    /// How much data it is about.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The primary has let the write at `offset` go.
    pub(crate) fn admitted(mut self, primary: Arc<Primary>, offset: u64) -> Self {
        self.admitted = Some((primary, offset));
        self
    }

    /// Tells the guest how it ended; the ring still has to publish it. What was read has been marked in the dirty logs.
    #[inline]
    pub(crate) fn settle(mut self, ring: &mut Ring, chain: &Chain, metrics: &Metrics, status: Status) {
        self.settled = true;
        if let Some((primary, offset)) = &self.admitted {
            primary.written(*offset, self.bytes);
        }
        let sound = status == Status::Ok;
        chain.put_status(status as u8);
        // How many bytes from the first writable one on were written (virtio 1.2 §2.7.8.2), the status being the last.
        let all = chain.writable_bytes() + 1;
        let written = match self.operation {
            Operation::Read(_) if sound => all,
            Operation::GetId if sound && self.bytes < u64::from(all - 1) => self.bytes as u32,
            Operation::GetId if sound => all,
            _ if all == 1 => 1,
            _ => 0,
        };
        ring.add_used(chain.head(), written);
        metrics.answered.add(1);
        metrics.count(self.operation, self.bytes, sound);
    }

    /// Leaves it in the ring as if it had not been taken. It must be the one that was taken last.
    pub(crate) fn put_back(mut self, ring: &mut Ring, chain: &Chain, metrics: &Metrics) {
        assert!(self.admitted.is_none(), "an admitted write is under way");
        self.settled = true;
        ring.undo_pop(chain);
        metrics.answered.add(1);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        assert!(
            self.settled || std::thread::panicking(),
            "a request of the guest was neither answered nor put back"
        );
    }
}
