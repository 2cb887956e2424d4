//! A hostile driver on the network card's data queues, and a hostile LAN.
#![no_main]

#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::frames(data));
