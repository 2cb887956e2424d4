//! `colo-filter`: see `--help`.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use colo::control::{self, Command, Greeting, command_once};
use colo::runtime::mailbox;
use vhost_net_backend::filter::arguments::{Cli, CliOrder, Serve};
use vhost_net_backend::filter::{DEVICE, Filter, FilterHandler};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.order {
        Some(order) => give(order),
        None => serve(&cli.serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("colo-filter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Carries out an order to a program that runs.
fn give(order: &CliOrder) -> anyhow::Result<()> {
    match order {
        CliOrder::Status { control_path } => {
            let status = command_once(control_path, DEVICE, &Command::Status)?;
            println!("{}", serde_json::to_string_pretty(&status)?);
        }
        CliOrder::TakeOver { control_path } => {
            command_once(control_path, DEVICE, &Command::TakeOver)?;
        }
    }
    Ok(())
}

/// Serves for ever.
fn serve(cli: &Serve) -> anyhow::Result<()> {
    // before anything else is opened: the descriptor is known by its number only
    let control = match (cli.control_fd, &cli.control_path) {
        (Some(number), _) => Some(control::Server::inherit(number).context("--control-fd")?),
        (None, Some(path)) => Some(control::Server::bind(path).context("The control socket cannot be made")?),
        (None, None) => None,
    };
    colo::logging::start().map_err(anyhow::Error::msg)?;
    let ends = cli.ends();
    let (orders, mailbox) = mailbox()?;
    let events = control.as_ref().map(control::Server::events).unwrap_or_default();
    let filter = Filter::open(&ends, &cli.config(), mailbox, events)?;
    if let Some(control) = control {
        let mut handler = FilterHandler::new(orders);
        let greeting = Greeting {
            protocol: control::PROTOCOL_VERSION,
            device: DEVICE.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            disk_bytes: None,
        };
        std::thread::Builder::new().name("control".into()).spawn(move || {
            // nobody could commit a checkpoint any more
            let Err(error) = control.run(&greeting, &mut handler) else {
                return;
            };
            eprintln!("colo-filter: The control socket has failed: {error}");
            std::process::exit(1);
        })?;
    }
    match filter.run() {
        Ok(never) => match never {},
        Err(error) => Err(error).context("The connections cannot be served"),
    }
}
