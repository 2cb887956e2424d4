//! The net back end of COLO: a vhost-user-net device server, and the proxy that keeps a pair's output the same.

pub mod packet;
pub mod proxy;
pub mod wire;
