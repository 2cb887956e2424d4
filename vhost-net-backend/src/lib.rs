//! The net back end of COLO: a vhost-user-net device server, and the proxy that keeps a pair's output the same.

pub mod cli;
pub mod compare;
pub mod control;
pub mod device;
pub mod frame;
pub mod link;
pub mod packet;
mod protection;
pub mod proxy;
pub mod rewrite;
pub mod tap;
#[cfg(test)]
mod test_frames;
pub mod wire;
pub mod worker;
