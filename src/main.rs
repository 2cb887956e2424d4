//! The `colo` program.

mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use colo::config::Config;
use colo::pair::operator::{self, Request};
use colo::pair::{End, Options};

/// Exit code of `colo run` when the peer goes on with the VM.
const EXIT_LOST: u8 = 3;

/// Keeps a virtual machine running when its host dies.
///
/// Two VMs run the same guest on two hosts. Only the primary's output reaches the network, once the secondary has
/// produced the same; when they differ, the secondary is synchronised to the primary. When one host dies the other
/// goes on, and so do open TCP connections.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check that this host can protect the VM of a configuration. Every point that fails is told, with its remedy.
    Check(Check),
    /// Run this host's side of a VM: QEMU, the device back ends, checkpoints, failover.
    ///
    /// Ends with 0 when the guest has switched itself off or SIGTERM came, with 3 when the peer goes on with the VM,
    /// with 1 on any failure. SIGTERM on the primary ends the VM on both hosts; on the secondary it ends protection.
    Run(Run),
    /// Show what a running VM does.
    Status(Status),
    /// Take a checkpoint now. Ask the primary.
    Checkpoint(Ask),
    /// Take over now, as if the primary had died. Ask the secondary; the primary stops its VM.
    Failover(Ask),
}

#[derive(Debug, Args)]
struct Node {
    /// Which [node.NAME] of the configuration this host is. Default: the one that has the host's name.
    #[arg(long, value_name = "NAME", env = "COLO_NODE")]
    node: Option<String>,
}

#[derive(Debug, Args)]
struct Sockets {
    /// Directory for the sockets of running VMs.
    #[arg(long, value_name = "DIR", env = "COLO_RUNTIME_DIR", default_value = "/run/colo")]
    runtime_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Check {
    /// The VM's configuration file.
    config: PathBuf,
    #[command(flatten)]
    node: Node,
}

#[derive(Debug, Args)]
struct Run {
    /// The VM's configuration file, the same on both hosts.
    config: PathBuf,
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    sockets: Sockets,
    /// Compare every page of guest memory on both sides after each checkpoint, with both VMs still paused. A
    /// difference ends protection. Slow; it proves that no changed page is missed.
    #[arg(long)]
    verify: bool,
}

#[derive(Debug, Args)]
struct Ask {
    /// The VM's name.
    vm: String,
    /// Which side, when both run on this host.
    #[arg(long, value_name = "NAME", env = "COLO_NODE")]
    node: Option<String>,
    #[command(flatten)]
    sockets: Sockets,
}

#[derive(Debug, Args)]
struct Status {
    #[command(flatten)]
    ask: Ask,
    /// Everything, as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = colo::logging::start() {
        eprintln!("colo: {error}");
        return ExitCode::FAILURE;
    }
    match carry_out(cli.command) {
        Ok(code) => code,
        Err(error) => {
            // One line: what was being done, then why it failed.
            eprintln!("colo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check(check) => {
            let config = Config::load(&check.config)?;
            let node = this_node(&config, check.node.node)?;
            let faults = colo::check::faults(&config, &node);
            for fault in &faults {
                println!("{fault}");
            }
            if !faults.is_empty() {
                bail!(
                    "{} points must be put right before VM {} can be protected",
                    faults.len(),
                    config.vm.name
                );
            }
            println!("Node {node} can protect VM {}", config.vm.name);
        }
        Command::Run(run) => {
            let config = Config::load(&run.config)?;
            let node = this_node(&config, run.node.node)?;
            let options = Options { node, verify: run.verify, runtime_dir: run.sockets.runtime_dir };
            match colo::pair::run(config, &options)? {
                End::Ended(why) => tracing::info!("Ended: {why}"),
                End::Lost(why) => {
                    tracing::warn!("Stopped: {why}");
                    return Ok(ExitCode::from(EXIT_LOST));
                }
            }
        }
        Command::Status(status) => {
            let value = operator::ask(&socket_of(&status.ask)?, Request::Status)?;
            if status.json {
                println!("{value}");
            } else {
                print!("{}", report::status(&value));
            }
        }
        Command::Checkpoint(ask) => {
            let done = operator::ask(&socket_of(&ask)?, Request::Checkpoint)?;
            println!("Checkpoint {} taken, the VM paused for {} us", done["epoch"], done["pause_us"]);
        }
        Command::Failover(ask) => {
            operator::ask(&socket_of(&ask)?, Request::Failover)?;
            println!("Taking over; `colo status {}` tells how it went", ask.vm);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn this_node(config: &Config, asked: Option<String>) -> anyhow::Result<String> {
    let names = config.node.keys().map(String::as_str).collect::<Vec<_>>().join(" and ");
    match asked {
        Some(node) if config.node.contains_key(&node) => Ok(node),
        Some(node) => bail!("There is no [node.{node}] in the configuration; it has {names}"),
        None => {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            if config.node.contains_key(&host) {
                return Ok(host);
            }
            bail!("Which node is this host? Its name, {host}, is none of {names}: give --node")
        }
    }
}

/// The socket of a VM's side on this host.
fn socket_of(ask: &Ask) -> anyhow::Result<PathBuf> {
    let directory = &ask.sockets.runtime_dir;
    let socket = |side: &Path| side.join("operator.sock");
    if let Some(node) = &ask.node {
        return Ok(socket(&directory.join(format!("{}@{node}", ask.vm))));
    }
    let prefix = format!("{}@", ask.vm);
    let mut sides = Vec::new();
    for entry in std::fs::read_dir(directory)
        .with_context(|| format!("No VM runs here: {} cannot be read", directory.display()))?
    {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            sides.push(entry.path());
        }
    }
    match &sides[..] {
        [side] => Ok(socket(side)),
        [] => bail!("VM {} does not run here: nothing of it is in {}", ask.vm, directory.display()),
        _ => bail!("Both sides of VM {} run here: give --node", ask.vm),
    }
}
