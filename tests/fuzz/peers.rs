//! A hostile peer on the network channel of the link.
#![no_main]

#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::peers(data));
