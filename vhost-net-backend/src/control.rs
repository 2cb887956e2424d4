//! The control socket's side of this back end: what concerns frames is the workers', the dirty log is set here.

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
    /// One for each queue pair. Only a back end with one of them is ever protected.
    workers: Vec<Sender<Order>>,
    device: Arc<NetDevice>,
    logs: DirtyLogs,
}

impl NetHandler {
    /// For these workers, their device, and the server that writes to `logs`.
    pub fn new(workers: Vec<Sender<Order>>, device: Arc<NetDevice>, logs: DirtyLogs) -> Self {
        Self { workers, device, logs }
    }

    /// The figures of all workers together, and the frames of each.
    fn status(&self) -> Result<Value, String> {
        let mut all = (self.workers.iter().map(|worker| ask(worker, Command::Status, None)))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter();
        let mut sum = all.next().unwrap_or_default();
        let mut pairs = vec![sum["frames"].clone()];
        for one in all {
            pairs.push(one["frames"].clone());
            for figure in ["frames", "rings_running", "rings_broken"] {
                add(&mut sum[figure], &one[figure]);
            }
        }
        sum["queue_pairs"] = pairs.into();
        sum["dirty_log_missed"] = json!(self.logs.missed());
        Ok(sum)
    }
}

fn ask(
    worker: &Sender<Order>,
    command: Command,
    link: Option<std::os::fd::OwnedFd>,
) -> Result<Value, String> {
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
            Command::Status => self.status(),
            Command::Link { up } => {
                // the first worker knows whether it may be
                let answer = ask(&self.workers[0], Command::Link { up }, None)?;
                self.device.set_link(up);
                Ok(answer)
            }
            command => ask(&self.workers[0], command, fd),
        }
    }

    fn controller_lost(&mut self) {
        for worker in &self.workers {
            // A worker that has ended takes the process with it, and that is as silent as can be.
            drop(worker.send(Order::ControllerLost));
        }
    }
}
