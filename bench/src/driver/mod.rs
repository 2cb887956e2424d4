//! A guest without a VM: memory, split virtqueues driven by hand, and the handshake of a vhost-user frontend.

mod frontend;
mod memory;
mod ring;

pub(crate) use frontend::{Notifiers, connect, set_memory, start_queue};
pub(crate) use memory::{Memory, PAGE};
pub(crate) use ring::{BATCH, Descriptor, NEXT, Place, Ring, RingError, WRITABLE};
