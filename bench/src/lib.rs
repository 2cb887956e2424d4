//! Benchmarks of COLO: load generators of our own, the peers that we compare with, and one form of result for all.

pub mod blk;
mod driver;
pub mod others;
pub mod priority;
pub mod report;
