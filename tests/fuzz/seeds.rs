//! Writes the seeds into the directory that is named, one folder for each target.

#[path = "../../vhost-blk-backend/tests/fuzz/mod.rs"]
mod fuzz;

fn main() {
    let directory = std::env::args_os().nth(1).expect("the directory of the seeds");
    fuzz::write_seeds(directory.as_ref());
}
