//! Writes the seeds into the directory that is named, one folder for each target.

#[path = "../../vhost-blk-backend/tests/fuzz/mod.rs"]
mod blk;
#[path = "../../vhost-net-backend/tests/fuzz/mod.rs"]
mod net;

use std::path::Path;

fn main() {
    let directory = std::env::args_os().nth(1).expect("the directory of the seeds");
    for (number, (target, seed)) in blk::seeds().into_iter().chain(net::seeds()).enumerate() {
        let directory = Path::new(&directory).join(target);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(format!("seed-{number}")), seed).unwrap();
    }
}
