//! Drivers of a network card, and QEMU's filters, that do anything, driven by arbitrary bytes. The functions panic or hang
//! where the back end does something wrong; libFuzzer (`make fuzz`) and `cargo test` call them alike.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each driver uses its own part")]

mod control_queue;
mod filter;
mod frames;
mod grammar;
#[path = "../../../tests/fuzz/input.rs"]
mod input;
pub mod model;
mod output;
mod packets;
mod peers;
mod ram;

pub use control_queue::{Both, MAC, control_queue};
pub use filter::filter;
pub use frames::frames;
pub use packets::packets;
pub use peers::peers;

/// Seeds from which a fuzzer finds its way: what sound drivers do.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    [control_queue::seeds(), frames::seeds(), filter::seeds(), packets::seeds(), peers::seeds()].concat()
}
