//! The back end's end of the control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::protocol::{Command, Event, Greeting};
use super::wire::{LineReader, write_line};

/// A command with the descriptors that came with it.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Descriptors, in the order of the command's description.
    pub fds: Vec<OwnedFd>,
}

/// What a back end does when it is told something.
pub trait Handler {
    /// Carries a command out. The value is the reply; the error's text goes to the controller.
    ///
    /// # Errors
    /// A sentence that says what was wrong with the command or what failed.
    fn handle(&mut self, request: Request) -> Result<Value, String>;

    /// The controller's connection has ended. A back end that protects a VM fails closed here: without its
    /// controller nobody takes checkpoints, and another side may take over at any time.
    fn controller_lost(&mut self);

    /// Length of the disk in bytes now, for the greeting of the next controller; `None` if it cannot change.
    fn disk_bytes(&self) -> Option<u64> {
        None
    }
}

/// Sends events to the controller, from any thread. Without a controller an event is dropped.
#[derive(Clone, Debug, Default)]
pub struct EventSender {
    stream: Arc<Mutex<Option<UnixStream>>>,
}

impl EventSender {
    /// Sends one event. A controller that cannot be reached is noticed by the reading side, so no error here.
    pub fn send(&self, event: &Event) {
        self.write(&serde_json::to_string(event).expect("an event is always JSON"));
    }

    fn write(&self, line: &str) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*stream
            && let Err(error) = write_line(stream, line, &[])
        {
            tracing::debug!("Control socket: {error}");
        }
    }

    fn set(&self, to: Option<UnixStream>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = to;
    }
}

/// Listens for one controller at a time.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// The socket file, if this server made it.
    path: Option<PathBuf>,
    events: EventSender,
}

impl Server {
    /// Listens on `path`.
    ///
    /// # Errors
    /// The path is taken or its directory cannot be written.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = crate::vhost_user::bind_unix(path)?;
        Ok(Self { listener, path: Some(path.to_owned()), events: EventSender::default() })
    }

    /// Serves a socket that is listening already, as one that a controller made for the back end it starts.
    pub fn from_listener(listener: UnixListener) -> Self {
        Self { listener, path: None, events: EventSender::default() }
    }

    /// Serves the listening socket that the starting process left open under this number (`--control-fd`). To be
    /// called once, at start, before anything else is opened.
    ///
    /// # Errors
    /// The number is not that of a listening Unix socket.
    pub fn inherit(number: i32) -> io::Result<Self> {
        crate::inherit::inherited_listener(number).map(Self::from_listener)
    }

    /// The way to send events.
    pub fn events(&self) -> EventSender {
        self.events.clone()
    }

    /// Serves controllers, one after the other, for ever.
    ///
    /// # Errors
    /// The listening socket fails.
    pub fn run(&self, greeting: &Greeting, handler: &mut impl Handler) -> io::Result<()> {
        loop {
            let (stream, _) = self.listener.accept()?;
            if let Err(error) = self.serve(stream, greeting, handler) {
                tracing::warn!("Control socket: {error}");
            }
            self.events.set(None);
            handler.controller_lost();
        }
    }

    fn serve(&self, stream: UnixStream, greeting: &Greeting, handler: &mut impl Handler) -> io::Result<()> {
        let mut greeting = greeting.clone();
        greeting.disk_bytes = handler.disk_bytes().or(greeting.disk_bytes);
        let greeting = serde_json::to_string(&greeting).expect("a greeting is always JSON");
        write_line(&stream, &greeting, &[])?;
        self.events.set(Some(stream.try_clone()?));
        let mut lines = LineReader::new(stream);
        while let Some((line, fds)) = lines.next_line()? {
            let reply = match parse(&line) {
                Err((id, error)) => json!({"id": id, "error": error}),
                Ok((id, command)) => match handler.handle(Request { command, fds }) {
                    Ok(value) => json!({"id": id, "return": value}),
                    Err(error) => json!({"id": id, "error": error}),
                },
            };
            self.events.write(&reply.to_string());
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // A file that is left is replaced at the next start.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn parse(line: &str) -> Result<(Value, Command), (Value, String)> {
    let mut value: Value =
        serde_json::from_str(line).map_err(|error| (Value::Null, format!("Not a JSON object: {error}")))?;
    let id = value.get("id").cloned().unwrap_or(Value::Null);
    if let Some(object) = value.as_object_mut() {
        object.remove("id");
    }
    match serde_json::from_value(value) {
        Ok(command) => Ok((id, command)),
        Err(error) => Err((id, format!("Not a command: {error}"))),
    }
}
