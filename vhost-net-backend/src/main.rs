//! `vhost-net-backend`: see `--help`.

use std::convert::Infallible;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use colo::control::{self, Greeting};
use colo::memory::DirtyLogs;
use colo::runtime::{mailbox, pin};
use colo::vhost_user;
use vhost_net_backend::cli::Cli;
use vhost_net_backend::control::NetHandler;
use vhost_net_backend::device::NetDevice;
use vhost_net_backend::tap::Tap;
use vhost_net_backend::worker::{Settings, Worker};

fn main() -> ExitCode {
    match serve(&Cli::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("vhost-net-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(cli: &Cli) -> anyhow::Result<Infallible> {
    // before anything else is opened: the descriptor is known by its number only
    let control = match (cli.control_fd, &cli.control_path) {
        (Some(number), _) => Some(control::Server::inherit(number).context("--control-fd")?),
        (None, Some(path)) => Some(control::Server::bind(path).context("The control socket cannot be made")?),
        (None, None) => None,
    };
    colo::logging::start().map_err(anyhow::Error::msg)?;
    let tap = Tap::open(&cli.tap)?;
    let (orders, mailbox) = mailbox()?;
    let logs = DirtyLogs::new();
    let device = Arc::new(NetDevice::new(orders.clone(), cli.mac));
    let server = vhost_user::Server::bind(&cli.socket_path, device, logs.clone())
        .context("The vhost-user socket cannot be made")?;
    let events = control.as_ref().map(control::Server::events).unwrap_or_default();
    let settings = Settings {
        protected: cli.protected,
        window: Duration::from_micros(cli.poll_us),
        proxy: cli.proxy_config(),
    };
    start_worker(Worker::new(tap, mailbox, events, settings), cli.core)?;
    if let Some(control) = control {
        start_control(control, NetHandler::new(orders, logs))?;
    }
    server.run().context("The vhost-user socket has failed")?;
    bail!("The vhost-user server has ended")
}

/// Starts the worker's thread. When that ends, so does the process: a back end that is half dead would keep a VM hanging
/// that a peer could take over.
fn start_worker(worker: Worker, core: Option<usize>) -> anyhow::Result<()> {
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

fn start_control(server: control::Server, mut handler: NetHandler) -> anyhow::Result<()> {
    let greeting = Greeting {
        protocol: control::PROTOCOL_VERSION,
        device: "net".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        disk_bytes: None,
    };
    std::thread::Builder::new().name("control".into()).spawn(move || {
        // Nobody could tell us any more that the peer has taken over: fail stop.
        let Err(error) = server.run(&greeting, &mut handler) else {
            return;
        };
        eprintln!("vhost-net-backend: The control socket has failed: {error}");
        std::process::exit(1);
    })?;
    Ok(())
}
