//! Block devices: a vhost-user frontend that drives its rings itself, and who serves them.
//!
//! [`Connection`] is the guest's side of a device, [`load`] measures it, [`content`] proves that it really does I/O.
//! [`Server`] is a device program under test, [`bare`] the same I/O without any device between. [`contender`],
//! [`compare`] and [`cases`] are the comparison of them all.

pub mod bare;
pub mod cases;
pub mod ceiling;
pub mod clock;
pub mod compare;
mod connection;
pub mod contender;
pub mod content;
mod cpu_time;
mod disk;
mod histogram;
mod interrupts;
pub mod load;
mod pattern;
mod ring;
mod server;

pub use connection::{Connection, Shape};
pub use cpu_time::cpu_time;
pub use disk::Disk;
pub use histogram::Histogram;
pub use interrupts::Interrupts;
pub use load::{Load, Measured};
pub use pattern::{Access, Pattern};
pub use server::{Backing, Place, Server};
