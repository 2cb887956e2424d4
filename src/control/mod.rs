//! The control socket: how `colo run`, or any other controller, gives orders to a device back end.
//!
//! JSON, one object a line, over a Unix socket; file descriptors travel beside the line with `SCM_RIGHTS`. The back
//! end greets, the controller commands, each command gets one reply, and events come in between. The protocol is
//! described for other implementers in `docs/control-protocol.md`.

mod client;
mod once;
mod protocol;
mod server;
mod wire;

pub use client::{Client, ClientError};
pub use once::{OnceError, command_once};
pub use protocol::{Command, Event, Greeting, PROTOCOL_VERSION, Role};
pub use server::{EventSender, Handler, Request, Server};
