//! A hostile controller.
#![no_main]

#[path = "../../vhost-blk-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::control(data));
