//! Network devices: a guest without a VM that sends and receives frames, and who serves it.

pub mod bare;
mod card;
pub mod drain;
pub mod guest;
pub mod huge_pages;
pub mod load;
mod nic;
pub mod ping;
mod server;
mod testpmd;

pub(crate) use card::GUEST_MAC;
pub use card::{Card, MERGED};
pub use load::{Load, Measured, Way};
pub(crate) use nic::Nic;
pub(crate) use ping::{GUEST, set_address};
pub use server::{Lan, add_lan};
pub use testpmd::frontend;
