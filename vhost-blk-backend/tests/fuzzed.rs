//! The fuzz targets for a few seconds.

mod fuzz;
#[path = "../../tests/fuzz/survives.rs"]
mod survives;

use std::path::Path;

fn survives(target: &str, run: fn(&[u8])) {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found");
    survives::survives(target, run, fuzz::seeds(), &found);
}

#[test]
fn any_guest_is_survived() {
    survives("chain", fuzz::chain);
}

#[test]
fn any_frontend_is_survived() {
    survives("vhost_user", fuzz::vhost_user);
}

#[test]
fn any_controller_is_survived() {
    survives("control", fuzz::control);
}
