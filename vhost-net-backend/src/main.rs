//! `vhost-net-backend`: see `--help`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use colo::memory::DirtyLogs;
use colo::runtime::{mailbox, pin};
use colo::vhost_user::Server;
use vhost_net_backend::cli::Cli;
use vhost_net_backend::device::NetDevice;
use vhost_net_backend::tap::Tap;
use vhost_net_backend::worker::Worker;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match serve(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-net-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(cli: &Cli) -> anyhow::Result<()> {
    colo::logging::start().map_err(anyhow::Error::msg)?;
    let tap = Tap::open(&cli.tap)?;
    let (orders, mailbox) = mailbox()?;
    let device = Arc::new(NetDevice::new(orders, cli.mac));
    let server = Server::bind(&cli.socket_path, device, DirtyLogs::new())
        .with_context(|| format!("vhost-user socket {}", cli.socket_path.display()))?;
    let worker = Worker::new(tap, mailbox, cli.protected, Duration::from_micros(cli.poll_us));
    start(worker, cli.core)?;
    server.run().context("The vhost-user socket has failed")
}

/// Starts the worker's thread. When that ends, so does the process: a back end that is half dead would keep a VM hanging
/// that a peer could take over.
fn start(worker: Worker, core: Option<usize>) -> anyhow::Result<()> {
    let (pinned_tx, pinned) = std::sync::mpsc::channel();
    let work = move || {
        let _ = pinned_tx.send(core.map_or(Ok(()), pin));
        match worker.run() {
            Ok(never) => match never {},
            Err(error) => eprintln!("vhost-net-backend: The tap is gone: {error}"),
        }
    };
    std::thread::Builder::new().name("net".into()).spawn(|| {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            eprintln!("vhost-net-backend: The worker has failed");
        }
        std::process::exit(1);
    })?;
    pinned.recv()?.context("--core")
}
