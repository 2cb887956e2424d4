//! Who goes on when the link between the hosts is lost: heartbeat, arbiter, generations.

mod arbiter;
mod heartbeat;

pub use arbiter::{Arbiter, ArbiterError, FileArbiter, Generation, open_arbiter};
pub use heartbeat::{Heartbeat, LinkLoss};
