//! The operator's socket: `colo status`, `colo checkpoint` and `colo failover` ask a running side here.
//!
//! One line of JSON each way and connection.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use crossbeam_channel::{Sender, bounded};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::event::Event;
use super::status::Shared;

/// How long a side may take to answer: a whole checkpoint may lie in between.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A request is shorter than this.
const REQUEST_BYTES_MAX: u64 = 4096;

/// What an operator can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// The figures.
    Status,
    /// A checkpoint now.
    Checkpoint,
    /// On the secondary: take over now.
    Failover,
}

/// Serves operators on threads of their own.
pub(super) fn serve(listener: UnixListener, status: Shared, events: Sender<Event>) -> anyhow::Result<()> {
    std::thread::Builder::new().name("operator".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { break };
            let (status, events) = (status.clone(), events.clone());
            let answering = std::thread::Builder::new().name("operator".into()).spawn(move || {
                if let Err(error) = answer(stream, &status, &events) {
                    tracing::debug!("Operator's socket: {error:#}");
                }
            });
            if let Err(error) = answering {
                tracing::warn!("No thread to answer an operator: {error}");
            }
        }
    })?;
    Ok(())
}

fn answer(mut stream: UnixStream, status: &Shared, events: &Sender<Event>) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut line = String::new();
    let mut reader = BufReader::new(std::io::Read::take(&stream, REQUEST_BYTES_MAX));
    reader.read_line(&mut line)?;
    let reply = match serde_json::from_str(&line) {
        Err(error) => json!({"error": format!("Not a request: {error}")}),
        Ok(request) => match ask_loop(request, events) {
            Ok(value) => json!({"return": value}),
            // A side that has no peer yet does not run its loop; what it is doing can be told all the same.
            Err(_) if request == Request::Status => json!({"return": &*status.lock()}),
            Err(error) => json!({"error": error}),
        },
    };
    writeln!(stream, "{reply}")?;
    Ok(())
}

fn ask_loop(request: Request, events: &Sender<Event>) -> Result<Value, String> {
    let (sender, receiver) = bounded(1);
    // A status is wanted now, even if the loop is not running yet or busy with a failover.
    let limit = if request == Request::Status { Duration::from_secs(1) } else { ANSWER_LIMIT };
    events.send(Event::Operator(request, sender)).map_err(|_| "This side is ending".to_owned())?;
    receiver.recv_timeout(limit).unwrap_or_else(|_| Err("This side does not answer: see its log".into()))
}

/// Asks the side whose socket this is.
///
/// # Errors
/// Nobody serves there, or the side refuses.
pub fn ask(socket: &Path, request: Request) -> anyhow::Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("No `colo run` serves {}: is the VM's name right, and does it run here?", socket.display())
    })?;
    stream.set_read_timeout(Some(ANSWER_LIMIT + Duration::from_secs(5)))?;
    writeln!(stream, "{}", serde_json::to_string(&request)?)?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let mut reply: Value = serde_json::from_str(&line).context("The answer cannot be understood")?;
    match reply.get("error") {
        None => Ok(reply["return"].take()),
        Some(error) => bail!("{}", error.as_str().unwrap_or("refused")),
    }
}
