//! Any packets of a guest and its LAN, parsed, compared and rewritten, and those that a fuzzer has found.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

#[test]
fn any_packets_are_survived() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives("packets", fuzz::packets, fuzz::seeds(), &found);
}
