//! The laboratory leaves nothing behind, whichever way its owner ends.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::program;
use rustix::process::{Pid, Signal, kill_process};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("an_interrupted_demo_leaves_nothing_behind", || ended_by(Signal::INT)),
        ("a_killed_demo_leaves_nothing_behind", || ended_by(Signal::KILL)),
    ])
}

fn ended_by(signal: Signal) -> Result<()> {
    let base = std::env::temp_dir().join(format!("colo-lab-{}", std::process::id()));
    let mut command = Command::new(program("colo-demo")?);
    command.env("COLO_LAB_DIR", &base).stdout(Stdio::null()).stderr(Stdio::null());
    let mut demo = Ended(command.spawn().context("Cannot start colo-demo")?);
    // in the middle of it: the guest boots
    let booting = || processes_of(&base).is_ok_and(|all| all.iter().any(|name| name.starts_with("qemu")));
    await_that("a booting guest", booting)?;
    thread::sleep(Duration::from_secs(1));
    let runs = runs_in(&base)?;
    ensure!(
        !namespaces_of(&runs)?.is_empty(),
        "The demo made no network namespace that has its name: {runs:?}"
    );

    kill_process(Pid::from_child(&demo.0), signal)?;
    let status = demo.0.wait().context("colo-demo")?;
    ensure!(!status.success(), "An interrupted demo must not say that all is well");
    // Ctrl-C returns when all is gone; after SIGKILL somebody else has to clean up
    if signal == Signal::KILL {
        await_that("end of the laboratory", || !base.exists())?;
    }
    ensure!(!base.exists(), "{} is still there", base.display());
    let left = namespaces_of(&runs)?;
    ensure!(left.is_empty(), "Network namespaces are left: {left:?}");
    let left = processes_of(&base)?;
    ensure!(left.is_empty(), "Processes are left: {left:?}");
    Ok(())
}

/// A child that does not outlive a test that fails.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn await_that(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        ensure!(Instant::now() < deadline, "No {what} after 30 s");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The laboratories in a directory, each named by its run.
fn runs_in(base: &Path) -> Result<Vec<String>> {
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    std::fs::read_dir(base).context("The demo's directory")?.map(name).collect()
}

/// The network namespaces of these runs. Others may come and go: somebody else may have a laboratory.
fn namespaces_of(runs: &[String]) -> Result<Vec<String>> {
    let output = Command::new("ip").args(["netns", "list"]).output().context("ip netns list")?;
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(all.lines().filter(|line| runs.iter().any(|run| line.contains(run))).map(str::to_owned).collect())
}

/// Names of the programs whose command line names a file of the laboratory.
fn processes_of(base: &Path) -> Result<Vec<String>> {
    let base = base.to_string_lossy();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        // a process may end while we look
        let Ok(line) = std::fs::read(entry?.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).into_owned();
        let program = line.split('\0').next().unwrap_or_default();
        if line.contains(&*base) && !program.ends_with("/sh") {
            found.push(program.rsplit('/').next().unwrap_or_default().to_owned());
        }
    }
    Ok(found)
}
