//! The control virtqueue (virtio 1.2 §5.1.2, §5.1.6.5): by it the driver says which frames it wants, which address it has,
//! how many queue pairs it uses, and that it has announced itself.
//!
//! [`State`] and [`Filter`] do no I/O: bytes of a command in, a changed state out. [`ControlQueue`] is the thread between
//! them and the rings.

mod commands;
mod filter;
mod serve;
#[cfg(test)]
mod tests;

pub use commands::{Card, Change, Refused, State};
pub use filter::{FILTERED_BYTES, Filter, MACS_MAX, VLANS};
pub use serve::{ControlQueue, Order};
