//! `vhost-net-backend`: see `--help`.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use colo::control::{self, Command, Greeting, command_once};
use colo::inherit::{inherited_descriptor, inherited_socket};
use colo::memory::DirtyLogs;
use colo::runtime::{mailbox, pin};
use colo::vhost_user;
use vhost_net_backend::cli::{CAPABILITIES, Cli, LinkState, Order, Serve};
use vhost_net_backend::control::NetHandler;
use vhost_net_backend::control_queue::ControlQueue;
use vhost_net_backend::device::{Config, NetDevice};
use vhost_net_backend::lan::{Packet, Port, Tap, TapOptions};
use vhost_net_backend::offload::Offloads;
use vhost_net_backend::worker::{Settings, Worker};

fn main() -> ExitCode {
    // the conventions: whatever else is on the line
    if std::env::args_os().any(|argument| argument == "--print-capabilities") {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let cli = Cli::parse();
    let result = match &cli.order {
        Some(order) => give(order),
        None => serve(&cli.serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-net-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Carries out an order to a back end that runs.
fn give(order: &Order) -> anyhow::Result<()> {
    match order {
        Order::Link { control_path, state } => {
            command_once(control_path, "net", &Command::Link { up: *state == LinkState::Up })?;
        }
        Order::Status { control_path } => {
            let status = command_once(control_path, "net", &Command::Status)?;
            println!("{}", serde_json::to_string_pretty(&status)?);
        }
    }
    Ok(())
}

/// Serves for ever, or one connection that was inherited until it ends.
fn serve(cli: &Serve) -> anyhow::Result<()> {
    // before anything else is opened: the descriptors are known by their numbers only
    let inherited = cli.fd.map(inherited_socket).transpose().context("--fd")?;
    let taps = cli.tap_fd.iter().map(|number| Ok((*number, inherited_descriptor(*number)?)));
    let taps = taps.collect::<std::io::Result<Vec<_>>>().context("--tap-fd")?;
    let control = match (cli.control_fd, &cli.control_path) {
        (Some(number), _) => Some(control::Server::inherit(number).context("--control-fd")?),
        (None, Some(path)) => Some(control::Server::bind(path).context("The control socket cannot be made")?),
        (None, None) => None,
    };
    colo::logging::start().map_err(anyhow::Error::msg)?;
    ensure!(
        !cli.protected || cli.queue_pairs == 1,
        "--protected is possible with one queue pair only: what several send has no order that could be compared"
    );
    let ports = ports(cli, taps)?;
    let (offloads, mtu) = match &ports[0] {
        Port::Null(_) => (0, 1500),
        port if cli.protected => (Offloads::of_pair(port.offloads()), 1500),
        port => (port.offloads(), port.mtu()),
    };
    let (senders, mailboxes): (Vec<_>, Vec<_>) =
        ports.iter().map(|_| mailbox()).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    let logs = DirtyLogs::new();
    let config = cli.mac.map(|mac| Config { mac, mtu });
    let mut device = NetDevice::new(senders, offloads, config);
    // what a driver says by it would be known to one half of a pair only
    let control_queue = if cli.protected { None } else { device.add_control_queue()? };
    let device = Arc::new(device);
    let server = match (&cli.socket_path, inherited) {
        (Some(path), _) => vhost_user::Server::bind(path, device.clone(), logs.clone())
            .context("The vhost-user socket cannot be made")?,
        (None, Some(socket)) => vhost_user::Server::inherit(socket, device.clone(), logs.clone()),
        (None, None) => unreachable!("one of the group is required"),
    };
    for (pair, (port, mailbox)) in ports.into_iter().zip(mailboxes).enumerate() {
        let events = control.as_ref().map(control::Server::events).unwrap_or_default();
        let settings = Settings {
            pair,
            protected: cli.protected,
            window: Duration::from_micros(cli.poll_us),
            proxy: cli.proxy_config(),
        };
        let core = cli.core.get(pair % cli.core.len().max(1)).copied();
        start_worker(Worker::new(port, mailbox, events, settings), pair, core)?;
    }
    if let Some(control_queue) = control_queue {
        start_control_queue(control_queue)?;
    }
    if let Some(control) = control {
        start_control(control, NetHandler::new(device, logs))?;
    }
    server.run().context("The vhost-user socket")
}

/// The way to the LAN of each queue pair.
fn ports(cli: &Serve, taps: Vec<(i32, OwnedFd)>) -> anyhow::Result<Vec<Port>> {
    let queues = usize::from(cli.queue_pairs);
    let options = TapOptions { queues, headers: true };
    if let Some(null) = cli.null {
        return Ok(std::iter::repeat_with(|| Port::Null(null)).take(queues).collect());
    }
    if let Some(name) = &cli.interface {
        let shares = Packet::open(name, queues, options.headers)?;
        return Ok(shares.into_iter().map(|share| Port::Packet(Box::new(share))).collect());
    }
    let taps = match (&cli.tap, &cli.macvtap) {
        (Some(name), _) => Tap::open(name, options)?,
        (None, Some(name)) => Tap::open_macvtap(name, options)?,
        (None, None) => {
            ensure!(
                taps.len() == queues,
                "--tap-fd has {} descriptors, --queue-pairs is {queues}",
                taps.len()
            );
            taps.into_iter()
                .map(|(number, fd)| Tap::inherit(number, fd, options))
                .collect::<Result<Vec<_>, _>>()?
        }
    };
    Ok(taps.into_iter().map(Port::Tap).collect())
}

/// Starts a worker's thread. When that ends, so does the process: a back end that is half dead would keep a VM hanging
/// that a peer could take over.
fn start_worker(worker: Worker, pair: usize, core: Option<usize>) -> anyhow::Result<()> {
    let (pinned_tx, pinned) = std::sync::mpsc::channel();
    start_thread(format!("net-worker-{pair}"), move || {
        let _ = pinned_tx.send(core.map_or(Ok(()), pin));
        match worker.run() {
            Ok(never) => match never {},
            Err(error) => eprintln!("vhost-net-backend: The way to the LAN is gone: {error}"),
        }
    })?;
    pinned.recv()?.context("--core")
}

fn start_control_queue(control_queue: ControlQueue) -> std::io::Result<()> {
    start_thread("control-queue".into(), move || match control_queue.run() {
        Ok(never) => match never {},
        Err(error) => eprintln!("vhost-net-backend: The control queue cannot be served: {error}"),
    })
}

/// Starts a thread that the process ends with.
fn start_thread(name: String, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            eprintln!("vhost-net-backend: The thread {name} has failed");
        }
        std::process::exit(1);
    })?;
    Ok(())
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
