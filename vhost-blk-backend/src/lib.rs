//! `vhost-blk-backend`: a vhost-user-blk device server on io_uring, and COLO's block replication.

pub mod block_buffer;
