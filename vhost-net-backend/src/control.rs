//! The control socket's side of this back end: what concerns frames is the worker's, the dirty log is set here.

use colo::control::{Command, Handler, Request};
use colo::memory::{DirtyLog, DirtyLogs};
use colo::runtime::Sender;
use crossbeam_channel::bounded;
use serde_json::{Value, json};

use crate::worker::Order;

/// Takes a controller's commands.
#[derive(Debug)]
pub struct NetHandler {
    orders: Sender<Order>,
    logs: DirtyLogs,
}

impl NetHandler {
    /// For the worker that takes `orders` and the server that writes to `logs`.
    pub fn new(orders: Sender<Order>, logs: DirtyLogs) -> Self {
        Self { orders, logs }
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
        if let Command::DirtyLog { pages } = command {
            let log = fd.take().map(|fd| DirtyLog::from_fd(fd, pages)).transpose();
            self.logs.set_control(log.map_err(|error| error.to_string())?);
            return Ok(json!({}));
        }
        let status = command == Command::Status;
        let (reply, answer) = bounded(1);
        let gone = || "The worker has ended".to_owned();
        self.orders.send(Order::Command { command, link: fd, reply }).map_err(|_| gone())?;
        let mut answer = answer.recv().map_err(|_| gone())??;
        if status {
            answer["dirty_log_missed"] = json!(self.logs.missed());
        }
        Ok(answer)
    }

    fn controller_lost(&mut self) {
        // A worker that has ended takes the process with it, and that is as silent as can be.
        drop(self.orders.send(Order::ControllerLost));
    }
}
