//! A client of `vhost-blk-backend` that is not ours: libblkio, of which the crate `blkio` is the core, speaks
//! vhost-user-blk without a guest. It gives its memory region by region (ADD_MEM_REG) while rings run, has an ack for
//! each message, and lays its rings out in another way than QEMU's guests do.

mod client;
mod server;

pub use client::{Answer, Client, Queue, Region};
pub use server::Server;

use std::time::Duration;

/// The longest that anything here may take.
pub const LIMIT: Duration = Duration::from_secs(20);

/// So many bytes that look like chance, other ones for each seed, none of them zero.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes);
    while data.len() < bytes {
        // xorshift
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.push((state >> 32) as u8 | 1);
    }
    data
}
