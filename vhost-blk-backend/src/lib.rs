//! `vhost-blk-backend`: a vhost-user-blk device server on io_uring, and COLO's block replication.
//!
//! - [`backend`] is the device: the image, its workers, what vhost-user asks of them. A worker (`worker`) takes
//!   requests ([`request`]) from a ring and moves data with an io_uring of its own (`disk_ring`).
//! - [`control`] is what the controller may order when; `replication` does it, over the frames of [`wire`].
//! - [`block_buffer`] is what the secondary VM sees in place of the disk.
//! - [`image`] is the backing, [`digest`] tells whether two of them are the same.

pub mod backend;
pub mod block_buffer;
pub mod control;
mod device;
pub mod digest;
mod disk_ring;
pub mod image;
mod inline;
mod lock;
mod metrics;
mod replication;
pub mod request;
mod taken;
mod transfer;
pub mod wire;
mod worker;
mod write_cache;
