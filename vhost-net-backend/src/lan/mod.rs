//! What is on the other side of the guest's network card: a tap, an interface of the host, or nothing, to measure.

mod error;
mod interface;
mod null;
mod packet;
mod pieces;
mod port;
mod tap;

pub use error::LanError;
pub use null::Null;
pub use packet::Packet;
pub(crate) use pieces::{IOVECS_MAX, Outgoing, Sent, gather, scatter};
pub(crate) use port::Losses;
pub use port::Port;
pub use tap::{Tap, TapOptions};
