//! Pinned workers, adaptive polling and io_uring set-up.
