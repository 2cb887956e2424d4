//! What is sent and received against a model of it: by any chains, and those that a fuzzer has found.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

#[test]
fn any_chains_are_survived() {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives("frames", fuzz::frames, fuzz::seeds(), &found);
}
