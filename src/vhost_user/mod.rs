//! The vhost-user server: one connection, one device, its rings.
//!
//! A device implements [`Device`]; the server speaks the protocol, keeps the guest's memory mapped and hands each ring,
//! once it is complete, to the device's worker as a [`Ring`]. Whatever changes under a running ring (memory, addresses,
//! descriptors, features), the server stops it first and starts it anew afterwards.
//!
//! Descriptions of the protocol: <https://www.qemu.org/docs/master/interop/vhost-user.html> and virtio 1.2 §2.7.

mod bind;
mod chain;
mod channel;
mod device;
mod inflight;
mod message;
mod ring;
mod server;
mod session;
mod split;
#[cfg(test)]
mod tests;
mod vring;

pub use bind::bind_unix;
pub use chain::{CHAIN_DESCRIPTORS_MAX, Chain, ChainError};
pub use channel::FrontendChannel;
pub use device::Device;
pub use inflight::InflightMemory;
pub use message::MessageError;
pub use ring::{Ring, RingError, RingSetup};
pub use server::{Server, serve_connection};
pub use session::SessionError;
