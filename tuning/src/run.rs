//! The life of one laboratory: its random id, its directory, and that all of it is removed whichever way its owner ends.
//!
//! A shell process (`teardown.sh`) waits for the end of a pipe that only we hold. When we close it, panic, are killed or
//! lose power to a debugger, it removes the namespaces, the processes in them and the directory. There is one way of
//! tearing down, so it is always tested.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

use crate::Namespace;
use crate::dice::random;

const TEARDOWN: &str = include_str!("../teardown.sh");

static REAPERS: Mutex<Vec<(String, Child)>> = Mutex::new(Vec::new());

/// A laboratory's identity and its place in the file system.
#[derive(Debug)]
pub struct Run {
    id: String,
    directory: PathBuf,
}

fn base() -> PathBuf {
    std::env::var_os("COLO_LAB_DIR").map_or_else(|| "/var/tmp/colo-lab".into(), PathBuf::from)
}

fn teardown(arguments: [&str; 2]) -> Command {
    let mut command = Command::new("/bin/sh");
    // a group of its own: Ctrl-C is for us, not for it
    command.args(["-c", TEARDOWN, "teardown"]).args(arguments).process_group(0);
    command
}

impl Run {
    /// Removes what dead runs left and begins a new one.
    ///
    /// # Errors
    /// We are not root, or the directory cannot be made.
    pub fn begin() -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "The laboratory makes network namespaces: run as root");
        let base = base();
        let base_text = base.to_str().context("COLO_LAB_DIR is not UTF-8")?;
        teardown(["stale", base_text]).status().context("Cannot run /bin/sh")?;

        let id = format!("{:06x}", random() & 0xff_ffff);
        let directory = base.join(&id);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("Cannot make the laboratory's directory {}", directory.display()))?;
        let stat = std::fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
        let start = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19));
        let owner = format!("{} {}\n", std::process::id(), start.context("/proc/self/stat is malformed")?);
        std::fs::write(directory.join("owner"), owner).context("Cannot write the owner file")?;
        let path = directory.to_str().context("COLO_LAB_DIR is not UTF-8")?;
        let reaper = teardown(["wait", path])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("Cannot run /bin/sh")?;
        REAPERS.lock().expect("nothing panics while it holds this lock").push((id.clone(), reaper));
        Ok(Self { id, directory })
    }

    /// Where everything of this run is kept.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The name of the namespace for `role`.
    pub(crate) fn namespace(&self, role: &str) -> String {
        format!("colo-{}-{role}", self.id)
    }

    /// Makes a namespace for `role`. Whatever runs in it ends with this run.
    ///
    /// # Errors
    /// The name is taken, or there is no `ip`.
    pub fn add_namespace(&self, role: &str) -> Result<Namespace> {
        Namespace::create(self.namespace(role))
    }

    /// Leaves the directory there for somebody to look into.
    pub fn keep(&self) {
        // no disk space for an empty file: then there is nothing worth keeping either
        drop(std::fs::write(self.directory.join("keep"), ""));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        end_runs(|id| id == self.id);
    }
}

/// Tears down all runs of this process whose id fits, and returns when that is done.
pub(crate) fn end_runs(which: impl Fn(&str) -> bool) {
    let mut reapers = match REAPERS.lock() {
        Ok(reapers) => reapers,
        Err(poisoned) => poisoned.into_inner(),
    };
    // the lock is held to the end, so that nobody ends the program while another thread is still tearing down
    for (_, mut reaper) in reapers.extract_if(.., |(id, _)| which(id)) {
        drop(reaper.stdin.take());
        // it cannot fail in a way that we could mend
        drop(reaper.wait());
    }
}
