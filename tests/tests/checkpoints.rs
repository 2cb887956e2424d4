//! A checkpoint makes the secondary's memory equal to the primary's, to the last page.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::{Clients, Pair, PairOptions, Side};

fn main() -> ExitCode {
    colo_tests::run(&[
        (
            "a_hundred_checkpoints_under_load_leave_no_page_different",
            a_hundred_checkpoints_under_load_leave_no_page_different,
        ),
        ("a_page_changed_behind_every_dirty_set_ends_protection", a_page_changed_behind_every_dirty_set),
    ])
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
    ensure!(
        status.number("/net/0/pair/proxy/compare/pvm_packets") > 1000,
        "Nothing was compared: {}",
        status.0
    );
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

/// Proves the proof: `--verify` would notice a tracker that misses a page.
fn a_page_changed_behind_every_dirty_set() -> Result<()> {
    const PAGE: usize = 4096;
    let mut pair = Pair::start(&PairOptions { verify: true, ..PairOptions::default() })?;
    let ram = guest_ram(pair.process(Side::A)?.pid())?;
    // Pages that the guest does not use: it would overwrite what is put into others. Our mapping is not QEMU's, so
    // no tracker sees this.
    let pages = ram.metadata()?.len() / PAGE as u64;
    let mut content = [0; PAGE];
    let mut changed = 0;
    for page in (0..pages).rev() {
        ram.read_exact_at(&mut content, page * PAGE as u64)?;
        if content.iter().all(|byte| *byte == 0) {
            ram.write_all_at(&[0xff], page * PAGE as u64)?;
            changed += 1;
            if changed == 100 {
                break;
            }
        }
    }
    let status = pair.await_status(Side::A, "end of protection", Duration::from_secs(30), |status| {
        status.text("/role") == "alone"
    })?;
    println!("{}", status.text("/state"));
    ensure!(status.text("/state").contains("pages differ on the secondary"), "Another reason: {}", status.0);
    let ended = pair.process(Side::B)?.wait(Duration::from_secs(10))?;
    ensure!(!ended.success(), "The secondary ended with {ended}");
    pair.redis()?;
    Ok(())
}

/// The file of the guest's memory, which `colo run` holds open.
fn guest_ram(colo: u32) -> Result<File> {
    for entry in fs::read_dir(format!("/proc/{colo}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:guest-ram")) {
            return File::options()
                .read(true)
                .write(true)
                .open(&path)
                .context("Guest memory cannot be opened");
        }
    }
    anyhow::bail!("colo run holds no guest memory open")
}
