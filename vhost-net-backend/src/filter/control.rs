//! The control socket's side of this program (`docs/control-protocol.md`).

use colo::control::{Command, Handler, Request};
use colo::runtime::Sender;
use crossbeam_channel::bounded;
use serde_json::Value;

/// A controller's command on its way to the thread that serves the connections.
#[derive(Debug)]
pub struct Order {
    /// What to do.
    pub command: Command,
    /// Where the answer goes.
    pub reply: crossbeam_channel::Sender<Result<Value, String>>,
}

/// Takes a controller's commands.
#[derive(Debug)]
pub struct FilterHandler {
    orders: Sender<Order>,
}

impl FilterHandler {
    /// For the thread that takes `orders`.
    pub fn new(orders: Sender<Order>) -> Self {
        Self { orders }
    }
}

impl Handler for FilterHandler {
    fn handle(&mut self, request: Request) -> Result<Value, String> {
        if !request.fds.is_empty() {
            return Err("No command of this program takes a descriptor".into());
        }
        let (reply, answer) = bounded(1);
        let gone = || "The program is ending".to_owned();
        self.orders.send(Order { command: request.command, reply }).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }

    // What differs waits for a controller that comes back; what both VMs say leaves without one, as it does while a
    // controller is there.
    fn controller_lost(&mut self) {}
}
