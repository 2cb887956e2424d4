//! The controller's end of the control socket.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};
use serde_json::{Value, json};

use super::protocol::{Command, Event, Greeting, PROTOCOL_VERSION};
use super::wire::{LineReader, write_line};

/// How long a back end may take to say that it serves: a disk is read once before, for its digest.
const GREETING_LIMIT: Duration = Duration::from_secs(600);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket cannot be reached or broke.
    #[error("Control socket {path}: {error}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The other end is not a back end, or one of another version.
    #[error("Control socket {path}: {what}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// The back end has ended.
    #[error("The back end at {path} has closed its control socket")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The back end did not greet in time.
    #[error(
        "The back end at {path} does not greet within {limit:?}: it has another controller, or is still starting"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// The back end did not answer in time.
    #[error("The back end at {path} did not answer {command} within {limit:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The back end says no.
    #[error("The back end at {path} refuses {command}: {error}")]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// The back end's words.
        error: String,
    },
}

/// A connection to one back end. A thread of its own reads replies and events.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    greeting: Greeting,
    replies: Receiver<Value>,
    next_id: u64,
}

impl Client {
    /// Connects to the back end at `path`; `on_event` is called for each event, on a thread of its own, and with
    /// `None` when the back end has closed the connection.
    ///
    /// # Errors
    /// Nobody listens there, or what listens is not a back end of our version.
    pub fn connect(
        path: &Path,
        on_event: impl FnMut(Option<Event>) + Send + 'static,
    ) -> Result<Self, ClientError> {
        Self::connect_within(path, GREETING_LIMIT, on_event)
    }

    /// The same for a back end that runs already: it greets at once, unless it has another controller.
    ///
    /// # Errors
    /// As above, or it does not greet within `limit`.
    pub fn connect_within(
        path: &Path,
        limit: Duration,
        mut on_event: impl FnMut(Option<Event>) + Send + 'static,
    ) -> Result<Self, ClientError> {
        let io_error = |error| ClientError::Io { path: path.to_owned(), error };
        let protocol = |what: String| ClientError::Protocol { path: path.to_owned(), what };
        let stream = UnixStream::connect(path).map_err(io_error)?;
        stream.set_read_timeout(Some(limit)).map_err(io_error)?;
        let mut lines = LineReader::new(stream.try_clone().map_err(io_error)?);
        let greeted = lines.next_line().map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => ClientError::Busy { path: path.to_owned(), limit },
            _ => io_error(error),
        })?;
        let Some((line, _)) = greeted else {
            return Err(ClientError::Closed { path: path.to_owned() });
        };
        stream.set_read_timeout(None).map_err(io_error)?;
        let greeting: Greeting =
            serde_json::from_str(&line).map_err(|e| protocol(format!("Greeting not understood: {e}")))?;
        if greeting.protocol != PROTOCOL_VERSION {
            return Err(protocol(format!(
                "Speaks control protocol {}, we speak {PROTOCOL_VERSION}: install matching versions",
                greeting.protocol
            )));
        }
        let (sender, replies) = unbounded();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                while let Ok(Some((line, _))) = lines.next_line() {
                    let Ok(value) = serde_json::from_str::<Value>(&line) else {
                        break;
                    };
                    if value.get("event").is_none() {
                        if sender.send(value).is_err() {
                            break;
                        }
                    } else if let Ok(event) = serde_json::from_value(value) {
                        on_event(Some(event));
                    }
                }
                drop(sender);
                on_event(None);
            })
            .map_err(io_error)?;
        Ok(Self { path: path.to_owned(), stream, greeting, replies, next_id: 1 })
    }

    /// What the back end said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Gives a command and waits for its reply, at most `limit`.
    ///
    /// # Errors
    /// The back end refuses, is gone, or does not answer in time.
    pub fn call(
        &mut self,
        command: &Command,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Value, ClientError> {
        let mut line = serde_json::to_value(command).expect("a command is always JSON");
        let name = line["execute"].as_str().unwrap_or_default().to_owned();
        let id = self.next_id;
        self.next_id += 1;
        line["id"] = json!(id);
        write_line(&self.stream, &line.to_string(), fds)
            .map_err(|error| ClientError::Io { path: self.path.clone(), error })?;
        loop {
            let mut reply = match self.replies.recv_timeout(limit) {
                Ok(reply) => reply,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ClientError::Closed { path: self.path.clone() });
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(ClientError::Timeout { path: self.path.clone(), command: name, limit });
                }
            };
            if reply["id"] != json!(id) {
                continue; // the late reply to a command that we gave up
            }
            return match reply.get("error") {
                None => Ok(reply["return"].take()),
                Some(error) => Err(ClientError::Refused {
                    path: self.path.clone(),
                    command: name,
                    error: error.as_str().unwrap_or_default().to_owned(),
                }),
            };
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // ends the reading thread
        drop(self.stream.shutdown(std::net::Shutdown::Both));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::{EventSender, Handler, Request, Role, Server};
    use super::*;

    struct Echo {
        events: EventSender,
        lost: crossbeam_channel::Sender<()>,
    }

    impl Handler for Echo {
        fn handle(&mut self, request: Request) -> Result<Value, String> {
            match request.command {
                Command::Marker { epoch } => {
                    self.events.send(&Event::Marker { epoch });
                    Ok(json!({}))
                }
                Command::DirtyLog { .. } => Ok(json!({"fds": request.fds.len()})),
                other => Err(format!("no {other:?} here")),
            }
        }

        fn controller_lost(&mut self) {
            self.lost.send(()).unwrap();
        }
    }

    #[test]
    fn commands_events_descriptors_and_refusals() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let server = Server::bind(&path).unwrap();
        let (lost_tx, lost) = unbounded();
        let mut echo = Echo { events: server.events(), lost: lost_tx };
        let greeting = Greeting {
            protocol: PROTOCOL_VERSION,
            device: "net".into(),
            version: "0".into(),
            disk_bytes: None,
        };
        std::thread::spawn(move || server.run(&greeting, &mut echo));
        let (events_tx, events) = unbounded();
        let mut client = Client::connect(&path, move |event| drop(events_tx.send(event))).unwrap();
        assert_eq!(client.greeting().device, "net");
        let limit = Duration::from_secs(5);
        client.call(&Command::Marker { epoch: 7 }, &[], limit).unwrap();
        assert_eq!(events.recv().unwrap(), Some(Event::Marker { epoch: 7 }));
        let file = std::fs::File::open("/dev/null").unwrap();
        let reply = client.call(&Command::DirtyLog { pages: 1 }, &[file.as_fd(), file.as_fd()], limit);
        assert_eq!(reply.unwrap()["fds"], 2);
        let refused =
            client.call(&Command::Attach { role: Role::Primary, epoch: 1 }, &[], limit).unwrap_err();
        assert!(refused.to_string().contains("refuses attach"), "{refused}");
        let busy = Client::connect_within(&path, Duration::from_millis(50), |_| ()).unwrap_err();
        assert!(busy.to_string().contains("another controller"), "{busy}");
        drop(client);
        lost.recv_timeout(limit).unwrap();
        assert_eq!(events.recv().unwrap(), None);
    }
}
