//! The control socket's side of this back end: what concerns frames is the workers', the dirty log is set here.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use colo::control::{Command, Handler, Request};
use colo::memory::{DirtyLog, DirtyLogs};
use colo::runtime::Sender;
use crossbeam_channel::bounded;
use serde_json::{Value, json};

use crate::device::NetDevice;
use crate::worker::Order;

/// Takes a controller's commands.
#[derive(Debug)]
pub struct NetHandler {
    device: Arc<NetDevice>,
    logs: DirtyLogs,
}

impl NetHandler {
    /// For a device, and the server that writes to `logs`.
    pub fn new(device: Arc<NetDevice>, logs: DirtyLogs) -> Self {
        Self { device, logs }
    }

    /// Has the first worker carry a command out. Only a back end with no other is ever protected.
    fn ask_first(&self, command: Command, link: Option<OwnedFd>) -> Result<Value, String> {
        ask(&self.device.workers()[0], command, link)
    }
}

/// The figures of all workers together, and the frames of each.
pub(crate) fn status(device: &NetDevice, logs: &DirtyLogs) -> Result<Value, String> {
    let (first, others) = device.workers().split_first().ok_or("There is no worker")?;
    let mut sum = ask(first, Command::Status, None)?;
    let mut pairs = vec![sum["frames"].clone()];
    for other in others {
        let one = ask(other, Command::Status, None)?;
        pairs.push(one["frames"].clone());
        for figure in ["frames", "rings_running", "rings_broken"] {
            add(&mut sum[figure], &one[figure]);
        }
    }
    sum["queue_pairs"] = pairs.into();
    let [running, broken] = device.control_rings();
    add(&mut sum["rings_running"], &json!(running));
    add(&mut sum["rings_broken"], &json!(broken));
    sum["dirty_log_missed"] = json!(logs.missed());
    Ok(sum)
}

fn ask(worker: &Sender<Order>, command: Command, link: Option<OwnedFd>) -> Result<Value, String> {
    let (reply, answer) = bounded(1);
    let gone = || "The worker has ended".to_owned();
    worker.send(Order::Command { command, link, reply }).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// Adds a number, or each of an object's.
fn add(sum: &mut Value, one: &Value) {
    match (sum, one) {
        (Value::Object(sum), Value::Object(one)) => {
            one.iter().for_each(|(name, value)| add(&mut sum[name.as_str()], value));
        }
        (sum, one) => *sum = (sum.as_u64().unwrap_or(0) + one.as_u64().unwrap_or(0)).into(),
    }
}

impl Handler for NetHandler {
    fn handle(&mut self, request: Request) -> Result<Value, String> {
        let Request { command, fds } = request;
        let expected = usize::from(matches!(command, Command::DirtyLog { .. } | Command::Attach { .. }));
        if fds.len() != expected {
            return Err(format!("{} descriptors came along, {expected} are needed", fds.len()));
        }
        let mut fd = fds.into_iter().next();
        match command {
            Command::DirtyLog { pages } => {
                let log = fd.take().map(|fd| DirtyLog::from_fd(fd, pages)).transpose();
                self.logs.set_control(log.map_err(|error| error.to_string())?);
                Ok(json!({}))
            }
            Command::Status => status(&self.device, &self.logs),
            Command::Link { up } => {
                // the first worker knows whether it may be
                let answer = self.ask_first(Command::Link { up }, None)?;
                self.device.set_link(up);
                Ok(answer)
            }
            command => self.ask_first(command, fd),
        }
    }

    fn controller_lost(&mut self) {
        for worker in self.device.workers() {
            // A worker that has ended takes the process with it, and that is as silent as can be.
            drop(worker.send(Order::ControllerLost));
        }
    }
}
