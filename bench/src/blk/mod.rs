//! Block devices: a vhost-user frontend that drives its rings itself, and who serves them.
//!
//! [`Connection`] is the guest's side of a device, [`load`] measures it, [`content`] proves that it really does I/O.
//! [`crate::Server`] is a device program under test, [`bare`] the same I/O without any device between. [`contender`],
//! [`compare`] and [`cases`] are the comparison of them all.

pub mod bare;
pub mod cases;
pub mod ceiling;
pub mod compare;
mod connection;
pub mod contender;
pub mod content;
mod disk;
mod interrupts;
pub mod load;
mod pattern;
mod ring;
mod server;

pub use connection::{Connection, Shape};
pub use disk::Disk;
pub use interrupts::Interrupts;
pub use load::{Load, Measured};
pub use pattern::{Access, Pattern};
pub use server::Backing;
