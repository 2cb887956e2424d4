//! One of the back ends on a host, with sudden death and restart.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Disk, Host, Process, program};

/// The option of a back end whose image another one still has: the destination's of a migration.
pub const INCOMING: &[&str] = &["--incoming"];

/// A running back end and what it is started with.
#[derive(Debug)]
pub struct BackEnd {
    program: &'static str,
    name: String,
    socket: PathBuf,
    control: PathBuf,
    arguments: Vec<String>,
    process: Process,
}

impl BackEnd {
    /// Starts `vhost-blk-backend` for a disk, with these further options; returns when it listens.
    ///
    /// # Errors
    /// It ends at once.
    pub fn block(host: &Host, name: &str, disk: &Disk, options: &[&str]) -> Result<Self> {
        let path = disk.path().display().to_string();
        Self::start("vhost-blk-backend", host, name, &[&["--blk-file", &path], options].concat())
    }

    /// Starts `vhost-net-backend` with these options, which name its way to the LAN; returns when it listens.
    ///
    /// # Errors
    /// It ends at once.
    pub fn net(host: &Host, name: &str, options: &[&str]) -> Result<Self> {
        Self::start("vhost-net-backend", host, name, options)
    }

    fn start(program: &'static str, host: &Host, name: &str, options: &[&str]) -> Result<Self> {
        let file = |what: &str| host.directory().join(format!("{name}.{what}"));
        let (socket, control) = (file("socket"), file("control"));
        let path = |path: &Path| path.display().to_string();
        let mut arguments =
            vec!["--socket-path".to_owned(), path(&socket), "--control-path".to_owned(), path(&control)];
        arguments.extend(options.iter().map(ToString::to_string));
        let process = spawn(program, host, name, &arguments, &socket)?;
        Ok(Self { program, name: name.to_owned(), socket, control, arguments, process })
    }

    /// Where QEMU finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Gives the disk another length, as an operator does.
    ///
    /// # Errors
    /// The back end refuses.
    pub fn resize(&self, host: &Host, bytes: u64) -> Result<()> {
        let said = self.order(host, "resize", &[&bytes.to_string()])?;
        ensure!(said == bytes.to_string(), "resize to {bytes} says {said}");
        Ok(())
    }

    /// Its figures.
    ///
    /// # Errors
    /// It has ended.
    pub fn status(&self, host: &Host) -> Result<Value> {
        serde_json::from_str(&self.order(host, "status", &[])?).context("The figures of a back end")
    }

    fn order(&self, host: &Host, order: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program(self.program)?);
        command.args([order, "--control-path"]).arg(&self.control).args(arguments);
        let output = host.output(command)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(output.status.success(), "{order}: {}: {}", output.status, text(&output.stderr));
        Ok(text(&output.stdout))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// How many pieces of guest memory it has mapped.
    ///
    /// # Errors
    /// It has ended.
    pub fn guest_mappings(&self) -> Result<usize> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid()))
            .context("The back end has ended")?;
        Ok(maps.lines().filter(|line| line.contains("memory-backend-memfd")).count())
    }

    /// `kill -9`, and the same program again.
    ///
    /// # Errors
    /// It had ended before, or does not start again.
    pub fn kill_and_restart(&mut self, host: &Host) -> Result<()> {
        self.ensure_running()?;
        self.process.kill()?;
        self.process = spawn(self.program, host, &self.name, &self.arguments, &self.socket)?;
        Ok(())
    }

    /// That it has not ended by itself.
    ///
    /// # Errors
    /// It has; its output is in the error.
    pub fn ensure_running(&mut self) -> Result<()> {
        let ended = self.process.ended()?;
        ensure!(ended.is_none(), "The back end {} has ended: {}", self.name, self.process.output());
        Ok(())
    }
}

fn spawn(what: &str, host: &Host, name: &str, arguments: &[String], socket: &Path) -> Result<Process> {
    // the file of a dead one would be taken for the new one's
    if socket.exists() {
        std::fs::remove_file(socket).with_context(|| socket.display().to_string())?;
    }
    let mut command = Command::new(program(what)?);
    command.args(arguments);
    let mut process = host.start(command, name)?;
    process.until("socket", Duration::from_secs(10), || socket.exists().then_some(()))?;
    Ok(process)
}
