//! Pinned workers, adaptive polling and io_uring set-up.

mod priority;

pub use priority::prefer_this_thread;
