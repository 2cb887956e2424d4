//! Where the programs under test are, and what this machine lacks to run them.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The path of one of our programs: in the directory `COLO_BIN_DIR`, else beside the running program (Cargo puts tests
/// one directory below).
///
/// # Errors
/// It has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("COLO_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let exe = std::env::current_exe().context("Cannot find the running program")?;
            let mut directory = exe.parent().context("The running program has no directory")?.to_owned();
            if directory.ends_with("deps") {
                directory.pop();
            }
            directory
        }
    };
    let path = directory.join(name);
    ensure!(
        path.exists(),
        "{} is not built: run 'cargo build --workspace --bins', or 'make build' and set COLO_BIN_DIR=target/release",
        path.display()
    );
    // children run elsewhere
    path.canonicalize().with_context(|| path.display().to_string())
}

/// What this machine lacks to run a laboratory with protected guests, as a sentence; `None` when it can.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    for tool in ["qemu-system-x86_64", "ip", "mke2fs", "redis-benchmark", "ping"] {
        let found = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            return Some(format!("needs {tool}: run tuning/install-deps.sh"));
        }
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Some("needs /dev/net/tun".into());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(7)) {
        return Some(format!("needs Linux 6.7 or newer (PAGEMAP_SCAN), this is {}", release.trim()));
    }
    None
}
