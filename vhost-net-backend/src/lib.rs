//! The net back end of COLO: a vhost-user-net device server, and the proxy that keeps a pair's output the same.

pub mod cli;
pub mod compare;
pub mod control;
pub mod control_queue;
pub mod device;
pub mod digest;
pub mod filter;
pub mod frame;
pub mod lan;
pub mod link;
pub mod offload;
pub mod packet;
pub mod policy;
mod protection;
pub mod proxy;
pub mod rewrite;
#[cfg(test)]
mod test_frames;
pub mod wire;
pub mod worker;
