//! Network devices: a guest without a VM that sends and receives frames, and who serves it.

pub mod bare;
mod card;
pub mod drain;
pub mod guest;
pub mod huge_pages;
pub mod load;
pub mod ping;
mod server;
mod testpmd;

pub use card::{Card, MERGED};
pub use load::{Load, Measured, Way};
pub use server::{Lan, add_lan};
pub use testpmd::frontend;
