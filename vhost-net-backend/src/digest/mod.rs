//! Digests in place of the SVM's bytes, so that a link need not carry what the primary has already.
//!
//! The secondary sends a digest for each long segment. The primary makes the same of what the PVM says, wherever the PVM
//! cuts its stream, and releases the PVM's bytes when both agree. Where that cannot be, it asks for the bytes.

mod key;
mod message;
mod names;
mod sender;
mod sent;

pub use key::{Key, PRIME, RANGE_BYTES_MAX, Range};
pub use message::{Ask, Run, Runs};
pub(crate) use message::{key_from_bytes, key_to_bytes};
pub(crate) use names::Names;
pub use sender::{Sender, SenderStats};
