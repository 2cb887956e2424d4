//! `vhost-blk-backend`: serves a disk to one virtual machine.

mod arguments;
mod order;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use colo::control;
use colo::inherit::inherited_socket;
use colo::memory::DirtyLogs;
use colo::vhost_user;
use vhost_blk_backend::backend::Backend;
use vhost_blk_backend::control::Controlled;

use crate::arguments::{Arguments, CAPABILITIES, Serve, asks_for_capabilities};

fn main() -> ExitCode {
    if asks_for_capabilities(std::env::args_os().skip(1)) {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse();
    let result = match &arguments.order {
        Some(order) => order::give(order),
        None => serve(&arguments.serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-blk-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Serves for ever, or one connection that was inherited until it ends.
fn serve(arguments: &Serve) -> anyhow::Result<()> {
    let options = arguments.options()?;
    // before anything else is opened: the descriptors are known by their numbers only
    let inherited = arguments.fd.map(inherited_socket).transpose().context("--fd")?;
    let control = match (arguments.control_fd, &arguments.control_path) {
        (Some(number), _) => Some(control::Server::inherit(number).context("--control-fd")?),
        (None, Some(path)) => Some(control::Server::bind(path).context("The control socket cannot be made")?),
        (None, None) => None,
    };
    colo::logging::start().map_err(anyhow::Error::msg)?;
    let backend = Backend::start(&options)?;
    let logs = DirtyLogs::new();
    let server = match (&arguments.socket_path, inherited) {
        (Some(path), _) => vhost_user::Server::bind(path, backend.clone(), logs.clone())
            .context("The vhost-user socket cannot be made")?,
        (None, Some(socket)) => vhost_user::Server::inherit(socket, backend.clone(), logs.clone()),
        (None, None) => unreachable!("one of the group is required"),
    };
    match control {
        None => backend.serve_alone(),
        Some(control) => start_control(control, &backend, &logs, arguments)?,
    }
    server.run().context("The vhost-user socket")
}

fn start_control(
    control: control::Server,
    backend: &Arc<Backend>,
    logs: &DirtyLogs,
    arguments: &Serve,
) -> anyhow::Result<()> {
    let mut controlled = Controlled::new(
        backend.clone(),
        logs.clone(),
        control.events(),
        arguments.protected,
        arguments.buffer_bytes,
    )
    .context("The digest of the disk")?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        let greeting = controlled.greeting();
        let Err(error) = control.run(&greeting, &mut controlled) else {
            return;
        };
        // Nobody could tell us any more that the peer has taken over: fail stop.
        tracing::error!("Control socket: {error}");
        std::process::exit(1);
    })?;
    Ok(())
}
