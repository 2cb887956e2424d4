//! One command to a back end that runs, as its own program gives it from another terminal.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::{Client, ClientError, Command};

/// How long the back end may take to answer. A file may have to be flushed meanwhile.
const LIMIT: Duration = Duration::from_secs(30);

/// How long it may take to greet. Then it has another controller.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OnceError {
    /// It listens for another kind of device.
    #[error("{path} is the control socket of a {device} back end")]
    Device {
        /// The socket.
        path: String,
        /// What it is of.
        device: String,
    },
    /// It cannot be reached, or refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Gives a command to the back end of a `device` at `path` and returns its answer.
///
/// # Errors
/// Nobody listens there, it is of another device, has another controller, or refuses.
pub fn command_once(path: &Path, device: &str, command: &Command) -> Result<Value, OnceError> {
    let mut client = Client::connect_within(path, GREETING_LIMIT, |_| ())?;
    let other = &client.greeting().device;
    if other != device {
        return Err(OnceError::Device { path: path.display().to_string(), device: other.clone() });
    }
    Ok(client.call(command, &[], LIMIT)?)
}
