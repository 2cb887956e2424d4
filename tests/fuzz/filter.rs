//! Hostile filters at the sockets of `colo-filter`.
#![no_main]

#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::filter(data));
