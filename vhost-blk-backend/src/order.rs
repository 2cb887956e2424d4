//! `resize` and `status`: what a back end that runs is told or asked over its control socket.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use colo::control::{Client, Command};
use serde_json::Value;

use crate::arguments::Order;

/// How long the back end may take to say that it listens to us, and to answer. A file may have to be flushed meanwhile.
const LIMIT: Duration = Duration::from_secs(30);

/// How long it may take to greet. Then it has another controller.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// Carries an order out and prints what comes of it.
pub(crate) fn give(order: &Order) -> anyhow::Result<()> {
    let answer = match order {
        Order::Resize { control_path, bytes } => {
            let reply = call(control_path, &Command::Resize { bytes: *bytes })?;
            reply["disk_bytes"].as_u64().context("The back end does not tell the new length")?.to_string()
        }
        Order::Status { control_path } => {
            serde_json::to_string_pretty(&call(control_path, &Command::Status)?)?
        }
    };
    // a reader that has gone is no reason to panic
    writeln!(std::io::stdout(), "{answer}").context("The answer cannot be printed")
}

fn call(path: &Path, command: &Command) -> anyhow::Result<Value> {
    let mut client = Client::connect_within(path, GREETING_LIMIT, |_| ())?;
    let device = &client.greeting().device;
    ensure!(
        device == "block",
        "{} is the control socket of a {device} back end, not of a disk",
        path.display()
    );
    Ok(client.call(command, &[], LIMIT)?)
}
