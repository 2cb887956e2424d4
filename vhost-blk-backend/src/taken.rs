//! A request that was taken from a ring: a value that has to be answered or put back.

use std::sync::Arc;

use colo::vhost_user::Ring;

use crate::metrics::Metrics;
use crate::replication::primary::Primary;
use crate::request::{Answer, Operation, Status};

/// Dropping one unsettled is a bug that would make the guest wait for ever, and panics. So a queue is drained when as
/// many were settled as were taken, and nothing else needs to be known.
#[derive(Debug)]
pub(crate) struct Taken {
    head: u16,
    operation: Operation,
    answer: Answer,
    bytes: u64,
    /// A write that the primary has forwarded and still counts as on its way to the local disk.
    admitted: Option<Arc<Primary>>,
    settled: bool,
}

impl Taken {
    /// A request with `bytes` of data.
    pub(crate) fn new(
        head: u16,
        operation: Operation,
        answer: Answer,
        bytes: u64,
        metrics: &Metrics,
    ) -> Self {
        metrics.taken.add(1);
        Self { head, operation, answer, bytes, admitted: None, settled: false }
    }

    pub(crate) fn operation(&self) -> Operation {
        self.operation
    }

    /// The primary has let the write go.
    pub(crate) fn admitted(mut self, primary: Arc<Primary>) -> Self {
        self.admitted = Some(primary);
        self
    }

    /// Tells the guest how it ended. What was read has been marked in the dirty logs.
    pub(crate) fn settle(mut self, ring: &mut Ring, metrics: &Metrics, status: Status) {
        self.settled = true;
        if let (Some(primary), Operation::Write(offset)) = (&self.admitted, self.operation) {
            primary.written(offset, self.bytes);
        }
        let read = matches!(self.operation, Operation::Read(_) | Operation::GetId);
        let written = read && status == Status::Ok;
        let used = self.answer.give(&**ring.memory(), status, written);
        ring.add_used(self.head, used);
        metrics.answered.add(1);
        let failed = u64::from(status != Status::Ok);
        match self.operation {
            Operation::Read(_) => {
                metrics.reads.add(1);
                metrics.read_bytes.add(self.bytes);
                metrics.read_errors.add(failed);
            }
            Operation::Write(_) => {
                metrics.writes.add(1);
                metrics.written_bytes.add(self.bytes);
                metrics.write_errors.add(failed);
            }
            Operation::Flush => {
                metrics.flushes.add(1);
                metrics.flush_errors.add(failed);
            }
            Operation::GetId => {}
        }
    }

    /// Leaves it in the ring as if it had not been taken. It must be the one that was taken last.
    pub(crate) fn put_back(mut self, ring: &mut Ring, metrics: &Metrics) {
        assert!(self.admitted.is_none(), "an admitted write is under way");
        self.settled = true;
        ring.undo_pop();
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
