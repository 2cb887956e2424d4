//! A device program under test: started with its socket, ended when it is dropped.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use colo_lab::{Namespace, Process};

use crate::cpu_time;
use crate::resident::resident_bytes;

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    socket: PathBuf,
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
    /// Starts a program that makes `socket`.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn start(place: Place<'_>, command: Command, socket: PathBuf, name: &str) -> Result<Self> {
        let log = place.directory.join(format!("{name}.log"));
        // what an earlier one has said
        drop(std::fs::remove_file(&log));
        let mut process = Process::start(place.namespace, command, &log)?;
        process.until("its socket", Duration::from_secs(10), || socket.exists().then_some(()))?;
        Ok(Self { process, socket })
    }

    /// Where it waits for a frontend.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until it has said this.
    ///
    /// # Errors
    /// It does not, or ends.
    pub(crate) fn await_output(&mut self, text: &str) -> Result<()> {
        let log = self.process.log().to_owned();
        let said = || std::fs::read(&log).is_ok_and(|all| String::from_utf8_lossy(&all).contains(text));
        self.process.until(text, Duration::from_secs(10), || said().then_some(()))
    }

    /// What it has said.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Processor time of all its threads so far.
    ///
    /// # Errors
    /// It has ended; what it said is in the error.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.process.pid()).with_context(|| format!("It said:\n{}", self.process.output()))
    }

    /// How much memory it uses.
    ///
    /// # Errors
    /// It has ended; what it said is in the error.
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.process.pid()).with_context(|| format!("It said:\n{}", self.process.output()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // one that is killed leaves it; it may never have been there
        drop(std::fs::remove_file(&self.socket));
    }
}
