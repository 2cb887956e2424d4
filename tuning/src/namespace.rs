//! One network namespace: made, entered by threads and by processes, emptied.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// A named network namespace. Removing it is the laboratory's business, see `run.rs`.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace, with the loopback interface up and IPv6 off.
    ///
    /// # Errors
    /// We are not root, or the name is taken.
    pub fn create(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.run(|| {
            for which in ["all", "default"] {
                // a kernel without IPv6 has nothing to switch off
                let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
                if Path::new(&path).exists() {
                    std::fs::write(&path, "1").with_context(|| path)?;
                }
            }
            anyhow::Ok(())
        })??;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Switches IPv6 on for an interface.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn enable_ipv6(&self, interface: &str) -> Result<()> {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        self.run(|| std::fs::write(&path, "0"))?.with_context(|| path.clone())
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` with these words inside.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn ip(&self, words: &str) -> Result<()> {
        let arguments: Vec<&str> = ["-n", &self.name].into_iter().chain(words.split_whitespace()).collect();
        ip(&arguments).map(drop)
    }

    /// Waits until a port of a bridge passes frames on. The kernel may take a second for that after its cable is plugged in,
    /// or its tap opened.
    ///
    /// # Errors
    /// It is no port, or does not within some seconds.
    pub fn await_port(&self, port: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let said = ip(&["-n", &self.name, "-details", "-json", "link", "show", port])?;
            let links: Value = serde_json::from_str(&said).with_context(|| format!("ip says {said:?}"))?;
            let state = links.pointer("/0/linkinfo/info_slave_data/state").and_then(Value::as_str);
            match state.with_context(|| format!("{port} is no port of a bridge: {said}"))? {
                "forwarding" => return Ok(()),
                state => ensure!(Instant::now() < deadline, "The port {port} is {state}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs `work` on a thread inside. Sockets that it opens and processes that it starts stay inside for good.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("Network namespace {}", self.name))?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// The processes inside.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let ours = std::fs::metadata(self.path()).with_context(|| format!("Namespace {}", self.name))?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").context("/proc")? {
            let entry = entry.context("/proc")?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // a process that has just ended has no namespace any more
            let Ok(theirs) = std::fs::metadata(entry.path().join("ns/net")) else {
                continue;
            };
            if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
                found.extend(Pid::from_raw(pid));
            }
        }
        Ok(found)
    }

    /// Kills every process inside with SIGKILL, those started meanwhile too.
    ///
    /// # Errors
    /// Some process survives.
    pub fn kill_all(&self) -> Result<()> {
        for _ in 0..1000 {
            let processes = self.processes()?;
            if processes.is_empty() {
                return Ok(());
            }
            for pid in processes {
                // one that has ended since is what we want
                let _ = kill_process(pid, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(1));
        }
        bail!("Processes in namespace {} cannot be killed: {:?}", self.name, self.processes()?)
    }
}

/// Runs `ip` with these arguments. Returns what it prints.
pub(crate) fn ip(arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new("ip")
        .args(arguments)
        .output()
        .context("Cannot run ip: install iproute2, or run 'make deps'")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
