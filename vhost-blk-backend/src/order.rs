//! `resize` and `status`: what a back end that runs is told or asked over its control socket.

use std::io::Write;

use anyhow::Context;
use colo::control::{Command, command_once};

use crate::arguments::Order;

/// Carries an order out and prints what comes of it.
pub(crate) fn give(order: &Order) -> anyhow::Result<()> {
    let answer = match order {
        Order::Resize { control_path, bytes } => {
            let reply = command_once(control_path, "block", &Command::Resize { bytes: *bytes })?;
            reply["disk_bytes"].as_u64().context("The back end does not tell the new length")?.to_string()
        }
        Order::Status { control_path } => {
            serde_json::to_string_pretty(&command_once(control_path, "block", &Command::Status)?)?
        }
    };
    // a reader that has gone is no reason to panic
    writeln!(std::io::stdout(), "{answer}").context("The answer cannot be printed")
}
