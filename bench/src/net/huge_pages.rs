//! Huge pages for testpmd.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::kernel_setting;

const NUMBER: &str = "/proc/sys/vm/nr_hugepages";
/// What the buffers of two of them take, on either side of a socket, of 2 MiB each.
const WANTED: u64 = 512;

/// Has the kernel keep enough of them until this program ends.
///
/// # Errors
/// It has not the memory, or we are not root.
pub fn reserve() -> Result<()> {
    let read = || -> Result<u64> { fs::read_to_string(NUMBER)?.trim().parse().context("Their number") };
    let before = read().context(NUMBER)?;
    if before < WANTED {
        kernel_setting::change(NUMBER, &before.to_string(), &WANTED.to_string()).context(NUMBER)?;
    }
    let have = read().context(NUMBER)?;
    ensure!(have >= WANTED, "The system has {have} huge pages, {WANTED} are needed");
    Ok(())
}
