//! What comes over the sockets of QEMU's filters: anything, and what a fuzzer has found.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

#[test]
fn any_packets_are_survived() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives("filter", fuzz::filter, fuzz::seeds(), &found);
}
