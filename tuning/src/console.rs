//! The shell of a disk guest, on its second serial port: commands in, their output and status out.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// A connection to a guest's shell (`tuning/guest/disk/console`). One command at a time.
#[derive(Debug)]
pub struct Console {
    input: BufReader<UnixStream>,
    /// What has come of the line that is not whole yet.
    partial: Vec<u8>,
}

impl Console {
    /// Connects to the socket that QEMU has for the port.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        Ok(Self { input: BufReader::new(stream), partial: Vec::new() })
    }

    /// Waits until the guest has booted.
    ///
    /// # Errors
    /// It does not within `limit`.
    pub fn await_boot(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.line("boot", deadline)? != "READY" {}
        Ok(())
    }

    /// Runs a line of shell in the guest and returns what it prints.
    ///
    /// # Errors
    /// It fails, does not end within `limit`, or QEMU has ended.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String> {
        let (output, status) = self.status_of(command, limit)?;
        ensure!(status == 0, "In the guest {command:?} ends with {status}:\n{output}");
        Ok(output)
    }

    /// The same, for a command that may fail.
    ///
    /// # Errors
    /// It does not end within `limit`, or QEMU has ended.
    pub fn status_of(&mut self, command: &str, limit: Duration) -> Result<(String, i32)> {
        let deadline = Instant::now() + limit;
        self.send(command)?;
        let mut output = Vec::new();
        loop {
            let line = self.line(command, deadline)?;
            if let Some(status) = line.strip_prefix("END ") {
                return Ok((output.join("\n").trim_end().to_owned(), status.parse().context("END")?));
            }
            ensure!(line != "READY", "The guest has rebooted in {command:?}");
            output.push(line);
        }
    }

    /// Sends a command that does not come back, as `reboot -f`.
    ///
    /// # Errors
    /// QEMU has ended.
    pub fn send(&mut self, command: &str) -> Result<()> {
        let sent = self.input.get_mut().write_all(format!("{command}\n").as_bytes());
        sent.with_context(|| format!("The guest's console: {command}"))
    }

    fn line(&mut self, what: &str, deadline: Instant) -> Result<String> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "The guest does not answer in time: {what}");
            self.input.get_mut().set_read_timeout(Some(left))?;
            match self.input.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.last() == Some(&b'\n') => {
                    let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
                    self.partial.clear();
                    return Ok(line);
                }
                Ok(_) => bail!("The guest's console was closed: {what}"),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error).context("The guest's console"),
            }
        }
    }
}
