//! Hostile packets through the parser, the comparison and the rewriter of a pair.
#![no_main]

#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::packets(data));
