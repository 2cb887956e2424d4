//! What comes over the network channel of the link: anything, and what a fuzzer has found.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

#[test]
fn any_messages_are_survived() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives("peers", fuzz::peers, fuzz::seeds(), &found);
}
