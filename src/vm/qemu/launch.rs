//! Starts a QEMU: makes what it inherits, shakes hands, and learns what the checkpoint engine needs to know.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::check::VERSION_MIN;
use super::config::{Accelerator, Inherited, QemuConfig};
use super::device_state::DeviceState;
use super::process::Process;
use super::qmp::{Qmp, QmpError};
use super::ram::GuestRam;
use super::{END_LIMIT, QemuVm};
use crate::vm::SharedRam;

/// QEMU greets when its devices are made; it waits for the back ends before.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Why there is no VM. The text names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program is not there.
    #[error(
        "Cannot start {binary}: {error}; install QEMU (Debian: qemu-system-x86), or name the program in the configuration"
    )]
    Binary {
        /// The program.
        binary: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// Guest RAM does not fit.
    #[error("Cannot make {mib} MiB of guest RAM: {error}")]
    Ram {
        /// Its length.
        mib: u64,
        /// What the system says.
        error: io::Error,
    },
    /// QEMU gave up at its start.
    #[error("{binary} did not start the VM: {words}")]
    Ended {
        /// The program.
        binary: PathBuf,
        /// QEMU's words.
        words: String,
    },
    /// QEMU runs, but not as it should.
    #[error("{binary} started, but {error}")]
    Monitor {
        /// The program.
        binary: PathBuf,
        /// What is wrong.
        error: QmpError,
    },
    /// This QEMU or this VM cannot be protected.
    #[error("{0}")]
    Unsupported(String),
    /// A system call failed.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the system says.
        error: io::Error,
    },
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> LaunchError {
    move |error| LaunchError::Io { what, error }
}

impl QemuVm {
    /// Starts QEMU with the VM paused. The back ends' sockets must be there.
    ///
    /// # Errors
    /// The program is missing, gives up, is too old, or the VM is one that cannot be checkpointed.
    pub fn launch(config: &QemuConfig) -> Result<Self, LaunchError> {
        let config = QemuConfig { accelerator: config.accelerator.resolve(), ..config.clone() };
        let mib = config.memory_bytes >> 20;
        let ram = SharedRam::create(config.memory_bytes).map_err(|error| LaunchError::Ram { mib, error })?;
        let devices = DeviceState::create().map_err(io("Cannot make files for the device state"))?;
        let log = memfd_create("qemu-log", MemfdFlags::CLOEXEC)
            .map_err(|error| io("Cannot make a file")(error.into()))?;
        let mut log = File::from(log);
        let (ours, theirs) = UnixStream::pair().map_err(io("Cannot make a socket"))?;

        let inherited = Inherited {
            ram: ram.fd().as_raw_fd(),
            monitor: theirs.as_raw_fd(),
            vmstate: devices.image_fd().as_raw_fd(),
            log: log.as_fd().as_raw_fd(),
        };
        let fds = [
            inherited.ram,
            inherited.monitor,
            inherited.vmstate,
            inherited.log,
            devices.saved_fd().as_raw_fd(),
        ];
        let process = Process::spawn(&config.binary, &config.arguments(&inherited), &fds)
            .map_err(|error| LaunchError::Binary { binary: config.binary.clone(), error })?;
        drop(theirs);

        let failed = |error| {
            let binary = config.binary.clone();
            let ended = matches!(error, QmpError::Closed).then(|| process.ended(END_LIMIT)).flatten();
            match ended {
                Some(words) => LaunchError::Ended { binary, words },
                None => LaunchError::Monitor { binary, error },
            }
        };
        let mut qmp = Qmp::connect(ours, START_LIMIT, config.command_limit).map_err(failed)?;
        let list = ("human-monitor-command", json!({"command-line": "info ramblock"}));
        let machine = ("qom-get", json!({"path": "/machine", "property": "type"}));
        let [version, list, machine] =
            qmp.execute_all([("query-version", Value::Null), list, machine]).map_err(failed)?;
        let number = |part| version["qemu"][part].as_u64().unwrap_or(0);
        let (major, minor, micro) = (number("major"), number("minor"), number("micro"));
        if (major, minor) < VERSION_MIN {
            return Err(LaunchError::Unsupported(format!(
                "{} is QEMU {major}.{minor}: {}.{} or later is needed",
                config.binary.display(),
                VERSION_MIN.0,
                VERSION_MIN.1
            )));
        }
        let mut allocations = String::new();
        log.rewind()
            .and_then(|()| log.read_to_string(&mut allocations))
            .map_err(io("Cannot read QEMU's log"))?;
        let ram = GuestRam::find(process.pid(), Arc::new(ram), list.as_str().unwrap_or(""), &allocations)
            .map_err(LaunchError::Unsupported)?;

        let kvm = config.accelerator == Accelerator::Kvm;
        let mut identity = format!("QEMU: {major}.{minor}.{micro}\n");
        identity += &format!("machine: {} ({})\n", machine.as_str().unwrap_or(""), config.machine);
        identity += &format!("accelerator: {}\n", if kvm { "kvm" } else { "tcg" });
        let cpu = config.cpu_model();
        identity += &format!("CPUs: {} of {cpu}\n", config.vcpus);
        if cpu.starts_with("host") {
            identity += &format!("host CPU: {}\n", host_cpu());
        }
        for block in ram.blocks() {
            identity += &format!("memory {}: {} bytes\n", block.name, block.bytes);
        }
        for (index, nic) in config.nics.iter().enumerate() {
            identity += &format!("network card {index}: {}\n", nic.mac);
        }
        for (index, disk) in config.disks.iter().enumerate() {
            identity += &format!("disk {index}: {} queues\n", disk.queues);
        }
        identity += &format!("more arguments: {:?}\n", config.extra_args);
        Ok(Self { process, qmp, ram, devices, tracker: None, identity })
    }
}

/// What the guest sees of the processor when its model is `host`.
fn host_cpu() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let facts = told.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(':'));
    let wanted = ["vendor_id", "cpu family", "model", "stepping", "flags"];
    let values = facts.filter(|(name, _)| wanted.contains(&name.trim())).map(|(_, value)| value.trim());
    values.collect::<Vec<_>>().join(" / ")
}
