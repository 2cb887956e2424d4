//! The programs that compare.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use colo_lab::program;

use super::Feeder;
use crate::{Place, Server};

/// Whose comparison it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// `colo-filter`, which sleeps when there is nothing to do.
    Ours,
    /// A process that polls: a loop around the library ([`super::process`]).
    Polling,
    /// QEMU's.
    ColoCompare,
}

/// A comparison that runs in a process of its own.
#[derive(Debug)]
pub struct Comparer {
    server: Server,
    contender: Contender,
    sockets: [PathBuf; 3],
}

impl Comparer {
    /// Starts it on the place's core.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(place: Place<'_>, contender: Contender) -> Result<Self> {
        let sockets =
            ["primary", "secondary", "output"].map(|name| place.directory.join(format!("{name}.sock")));
        // what an earlier one has left
        sockets.iter().for_each(|socket| drop(std::fs::remove_file(socket)));
        let command = match contender {
            Contender::Polling => polling(place.core, &sockets)?,
            Contender::Ours => colo_filter(place.core, &sockets)?,
            Contender::ColoCompare => colo_compare(place.core, &sockets),
        };
        let server = Server::start(place, command, sockets[2].clone(), "compare")?;
        Ok(Self { server, contender, sockets })
    }

    /// Connects to it, when it is ready to compare.
    ///
    /// # Errors
    /// It does not become so.
    pub fn connect(&self) -> Result<Feeder> {
        let mut feeder = Feeder::connect(&self.sockets).with_context(|| self.server.output())?;
        if self.contender == Contender::ColoCompare {
            // what it releases before it has noticed who reads its output is lost
            feeder.await_passage().with_context(|| self.server.output())?;
        }
        Ok(feeder)
    }

    /// The process.
    pub fn server(&self) -> &Server {
        &self.server
    }
}

/// This program with another task.
fn polling(core: usize, sockets: &[PathBuf; 3]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("This program's own path")?);
    command.args(["serve", "--core", &core.to_string()]).args(sockets);
    Ok(command)
}

fn colo_filter(core: usize, sockets: &[PathBuf; 3]) -> Result<Command> {
    let mut command = on_core(core);
    command.arg(program("colo-filter")?);
    for (option, socket) in ["--primary-in", "--secondary-in", "--out"].iter().zip(sockets) {
        command.arg(option).arg(format!("unix:{},server", socket.display()));
    }
    // where a controller would be
    command.arg("--control-path").arg(sockets[0].with_extension("control"));
    Ok(command)
}

fn colo_compare(core: usize, sockets: &[PathBuf; 3]) -> Command {
    let mut command = on_core(core);
    command.arg("qemu-system-x86_64");
    command.args(["-machine", "none", "-nodefaults", "-display", "none", "-object", "iothread,id=thread"]);
    for (name, socket) in ["primary", "secondary", "output"].iter().zip(sockets) {
        let chardev = format!("socket,id={name},path={},server=on,wait=off", socket.display());
        command.args(["-chardev", &chardev]);
    }
    let object =
        "colo-compare,id=compare,primary_in=primary,secondary_in=secondary,outdev=output,iothread=thread";
    command.args(["-object", object]);
    command
}

/// A program, named by the next argument, on one core.
fn on_core(core: usize) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]);
    command
}
