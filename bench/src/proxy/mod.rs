//! The proxy: our comparison against QEMU's colo-compare, fed with the very same packets.

mod contender;
mod feeder;
pub mod filter;
pub mod library;
pub mod pair;
pub mod process;
mod traffic;

pub use contender::{Comparer, Contender};
pub use feeder::{Feeder, Rate};
pub use traffic::{Packets, Protocol, Traffic};
