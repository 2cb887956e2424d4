//! The programs that serve a disk.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use colo_lab::program;

use super::Disk;
use crate::{Place, Server};

/// What the device serves.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Nothing: requests are answered, data is neither read nor written.
    Null {
        /// Its size.
        bytes: u64,
    },
    /// An image.
    Image(&'a Disk),
}

impl Server {
    /// Our back end with its defaults and these arguments more.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn ours(place: Place<'_>, backing: Backing<'_>, queues: u16, more: &[String]) -> Result<Self> {
        let mut command = Command::new(program("vhost-blk-backend")?);
        let socket = place.directory.join("ours.sock");
        command.arg("--socket-path").arg(&socket);
        match backing {
            Backing::Null { bytes } => command.args(["--null", &bytes.to_string()]),
            Backing::Image(disk) => command.arg("--blk-file").arg(disk.path()),
        };
        command.args(["--queues", &queues.to_string(), "--core", &place.core.to_string()]).args(more);
        Self::start(place, command, socket, "ours")
    }

    /// QEMU's storage daemon with this block device and this thread for its I/O, all of it on the server's core.
    ///
    /// # Errors
    /// It is not installed, or refuses these settings.
    pub fn daemon(place: Place<'_>, name: &str, blockdev: &str, iothread: &str, queues: u16) -> Result<Self> {
        let socket = place.directory.join(format!("{name}.sock"));
        let mut command = Command::new("taskset");
        command.args(["-c", &place.core.to_string(), "qemu-storage-daemon"]);
        command.args(["--blockdev", &format!("{blockdev},node-name=disk")]);
        command.args(["--object", &format!("iothread,id=io{iothread}"), "--export"]);
        let mut export = OsString::from("vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,");
        export.push(format!("num-queues={queues},addr.type=unix,addr.path="));
        export.push(&socket);
        command.arg(export);
        Self::start(place, command, socket, name)
    }

    /// A null device on the stock `vhost-user-backend` crate, with one queue, all of it on the server's core.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn stock_null(place: Place<'_>, bytes: u64) -> Result<Self> {
        let mut command = Command::new("taskset");
        let socket = place.directory.join("null-stock.sock");
        command.args(["-c", &place.core.to_string()]).arg(beside_us("null-stock")?);
        command.arg("--socket-path").arg(&socket).args(["--null", &bytes.to_string()]);
        Self::start(place, command, socket, "null-stock")
    }
}

/// A program of the benchmark itself, which does not move with `COLO_BIN_DIR`.
fn beside_us(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("Cannot find the running program")?;
    let path = exe.with_file_name(name);
    ensure!(path.exists(), "{} is not built: run 'make build'", path.display());
    Ok(path)
}
