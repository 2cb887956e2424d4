//! COLO: virtual machines that survive the death of their host.
//!
//! This library holds what the `colo` program and both device back ends share. Network code lives in the crate
//! `vhost-net-backend`, block code in `vhost-blk-backend`; neither is known here.

pub mod check;
pub mod checkpoint;
pub mod config;
pub mod control;
pub mod failover;
pub mod inherit;
pub mod link;
pub mod logging;
pub mod memory;
pub mod pair;
pub mod runtime;
pub mod vhost_user;
pub mod vm;
