//! A program started inside a namespace, its output in a file, killed when it is dropped.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Namespace;

/// A running program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` inside `namespace`; what it prints is appended to `log`.
    ///
    /// # Errors
    /// The program is not there or the log cannot be written.
    pub fn start(namespace: &Namespace, mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let name =
            Path::new(&name).file_name().map_or(name.clone(), |base| base.to_string_lossy().into_owned());
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("Cannot write {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stderr(output.try_clone().context("Cannot share the log file")?)
            .stdout(output)
            // a group of its own: Ctrl-C is for the owner of the laboratory
            .process_group(0);
        let child = namespace.run(|| command.spawn())?.with_context(|| format!("Cannot start {name}"))?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, when it has.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("Cannot ask for {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} has not ended after {limit:?}; it says:\n{}", self.name, self.output());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL; returns when it is gone.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        // fails only where it has ended already
        drop(self.child.kill());
        self.child.wait().with_context(|| format!("Cannot wait for {}", self.name))
    }

    /// The file with what it prints.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything that it has printed.
    pub fn output(&self) -> String {
        fs::read(&self.log)
            .map_or_else(|error| error.to_string(), |text| String::from_utf8_lossy(&text).into_owned())
    }

    /// Waits until `done` gives something, or the program has ended.
    ///
    /// # Errors
    /// The program ends first, or `limit` passes; its output is in the error.
    pub fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = done() {
                return Ok(value);
            }
            if let Some(status) = self.ended()? {
                bail!("{} ended with {status} before {what}; it said:\n{}", self.name, self.output());
            }
            if Instant::now() > deadline {
                bail!("{}: no {what} after {limit:?}; it says:\n{}", self.name, self.output());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.kill());
    }
}

/// The end of every log below `directory`, for somebody who looks for the cause of a failure.
pub(crate) fn log_tails(directory: &Path) -> String {
    const LINES: usize = 60;
    let Ok(entries) = fs::read_dir(directory) else {
        return String::new();
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let mut tails = String::new();
    for path in paths {
        if path.is_dir() {
            tails += &log_tails(&path);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LINES)..].join("\n");
            tails += &format!("---- {} ({} lines)\n{tail}\n", path.display(), lines.len());
        }
    }
    tails
}
