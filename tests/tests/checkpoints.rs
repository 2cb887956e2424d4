//! A checkpoint makes the secondary's memory equal to the primary's, to the last page.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use colo_lab::{Clients, Pair, PairOptions, Side};

fn main() -> ExitCode {
    colo_tests::run(&[(
        "a_hundred_checkpoints_under_load_leave_no_page_different",
        a_hundred_checkpoints_under_load_leave_no_page_different,
    )])
}

fn a_hundred_checkpoints_under_load_leave_no_page_different() -> Result<()> {
    let options = PairOptions { checkpoint_interval_ms: 300, verify: true, ..PairOptions::default() };
    let mut pair = Pair::start(&options)?;
    let clients = Clients::start(&pair)?;
    clients.await_progress()?;
    let before = pair.status(Side::A)?.checkpoints();
    // `colo run --verify` ends protection at the first difference, with the list of pages
    let status = pair.await_status(Side::A, "hundred checkpoints", Duration::from_secs(240), |status| {
        status.text("/role") != "primary" || status.checkpoints() >= before + 100
    })?;
    ensure!(status.text("/role") == "primary", "Protection has ended: {}", status.text("/state"));
    let (mut agent, work) = clients.stop_and_verify()?;
    println!(
        "{} checkpoints {}; meanwhile {} increments and {} files",
        status.checkpoints(),
        status.0["checkpoints"]["by_cause"],
        work.redis.increments,
        work.files
    );
    agent.unmount()?;
    pair.lab().kill_host(Side::B)?;
    pair.lab().kill_host(Side::A)?;
    pair.disk(Side::A).check()
}
