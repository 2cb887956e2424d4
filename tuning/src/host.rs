//! One of the two hosts: a network namespace with a bridge to the LAN, a replication link, a directory, and sudden death.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{Namespace, Process};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// host-a, the primary at first.
    A,
    /// host-b.
    B,
}

impl Side {
    /// Its node name in the configuration.
    pub fn node(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }

    /// Its address on the replication link.
    pub fn link_address(self) -> &'static str {
        match self {
            Side::A => "10.78.0.1",
            Side::B => "10.78.0.2",
        }
    }
}

/// A host.
#[derive(Debug)]
pub struct Host {
    side: Side,
    namespace: Namespace,
    directory: PathBuf,
}

impl Host {
    pub(crate) fn create(side: Side, namespace: Namespace, directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self { side, namespace, directory })
    }

    /// Which it is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Where its files are: disks, sockets, logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes a tap that leads to the LAN.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn add_tap(&self, name: &str) -> Result<()> {
        self.add_tap_with(name, "")
    }

    /// Makes one that has several queues.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn add_multi_queue_tap(&self, name: &str) -> Result<()> {
        self.add_tap_with(name, "multi_queue")
    }

    fn add_tap_with(&self, name: &str, flags: &str) -> Result<()> {
        self.namespace.ip(&format!("tuntap add dev {name} mode tap vnet_hdr {flags}"))?;
        self.namespace.ip(&format!("link set {name} up master br0"))
    }

    /// Starts a program on this host; its output goes to `LOG.log` in the host's directory.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, command: Command, log: &str) -> Result<Process> {
        Process::start(&self.namespace, command, &self.directory.join(format!("{log}.log")))
    }

    /// Runs a program on this host to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn output(&self, mut command: Command) -> Result<std::process::Output> {
        self.namespace.run(|| command.output())?.with_context(|| format!("Cannot run {command:?}"))
    }

    /// SIGKILL to everything that runs here, at once.
    ///
    /// # Errors
    /// Something survives.
    pub fn kill_everything(&self) -> Result<()> {
        self.namespace.kill_all()
    }
}
