//! Benchmarks of COLO: load generators of our own, the peers that we compare with, and one form of result for all.

pub mod blk;
pub mod clock;
pub mod command_line;
mod cpu_time;
mod driver;
mod histogram;
mod kernel_setting;
pub mod net;
pub mod others;
pub mod priority;
pub mod proxy;
pub mod report;
mod resident;
mod server;

pub use cpu_time::cpu_time;
pub use histogram::Histogram;
pub use server::{Place, Server};
