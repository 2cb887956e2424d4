//! A device program under test: started with its socket, ended when it is dropped.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::{Namespace, Process, program};

use super::{Disk, cpu_time};

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    socket: PathBuf,
}

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

/// Where servers run and leave their sockets and logs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The laboratory that ends them, whatever becomes of us.
    pub namespace: &'a Namespace,
    /// Its directory.
    pub directory: &'a Path,
    /// The core for the thread that serves.
    pub core: usize,
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

    fn start(place: Place<'_>, command: Command, socket: PathBuf, name: &str) -> Result<Self> {
        let log = place.directory.join(format!("{name}.log"));
        let mut process = Process::start(place.namespace, command, &log)?;
        process.until("its socket", Duration::from_secs(10), || socket.exists().then_some(()))?;
        Ok(Self { process, socket })
    }

    /// Where it waits for a frontend.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Processor time of all its threads so far.
    ///
    /// # Errors
    /// It has ended; what it said is in the error.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.process.pid()).with_context(|| format!("It said:\n{}", self.process.output()))
    }
}

/// A program of the benchmark itself, which does not move with `COLO_BIN_DIR`.
fn beside_us(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("Cannot find the running program")?;
    let path = exe.with_file_name(name);
    ensure!(path.exists(), "{} is not built: run 'make build'", path.display());
    Ok(path)
}

impl Drop for Server {
    fn drop(&mut self) {
        // one that is killed leaves it; it may never have been there
        drop(std::fs::remove_file(&self.socket));
    }
}
