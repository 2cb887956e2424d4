//! `vhost-blk-backend`: a vhost-user-blk device server on io_uring, and COLO's block replication.

pub mod block_buffer;
pub mod digest;
pub mod image;
mod lock;
pub mod request;
pub mod wire;
