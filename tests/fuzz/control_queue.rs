//! A hostile driver on the network card's control queue.
#![no_main]

#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::control_queue(data));
