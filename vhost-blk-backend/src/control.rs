//! What the controller may order when: the disk's part in protection, as a state machine.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use colo::control::{Command, EventSender, Greeting, Handler, PROTOCOL_VERSION, Request, Role};
use colo::memory::{DirtyLog, DirtyLogs};
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::digest::digest_of;
use crate::replication::primary::Primary;
use crate::replication::secondary::Secondary;
use crate::worker::Mode;

/// Where the disk stands.
#[derive(Debug)]
enum State {
    /// No peer, and none needed: a plain disk, or the survivor's.
    Alone,
    /// Protected, and no peer yet. Requests wait.
    Waiting,
    Primary(Arc<Primary>),
    Secondary(Arc<Secondary>),
    /// Was attached; requests wait for how it goes on. A secondary's buffer is still there.
    Detached(Option<Arc<Secondary>>),
    /// Requests wait for ever.
    Silenced,
}

/// Carries out the controller's commands.
#[derive(Debug)]
pub struct Controlled {
    backend: Arc<Backend>,
    logs: DirtyLogs,
    events: EventSender,
    buffer_bytes: usize,
    state: State,
    /// Of the disk before anybody wrote to it, for the controllers of a pair to compare.
    digest: Option<String>,
}

impl Controlled {
    /// Takes the disk under control. When `protected`, requests wait until it is attached, and the digest of the disk
    /// is computed, which takes as long as reading it does; otherwise it is served alone at once.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn new(
        backend: Arc<Backend>,
        logs: DirtyLogs,
        events: EventSender,
        protected: bool,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        let (state, digest) = if protected {
            let image = backend.image();
            (State::Waiting, Some(format!("{:032x}", digest_of(image.file(), image.bytes())?)))
        } else {
            backend.serve_alone();
            (State::Alone, None)
        };
        Ok(Self { backend, logs, events, buffer_bytes, state, digest })
    }

    /// What the back end says of itself.
    pub fn greeting(&self) -> Greeting {
        Greeting {
            protocol: PROTOCOL_VERSION,
            device: "block".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            disk_bytes: Some(self.backend.image().bytes()),
        }
    }

    fn attach(&mut self, role: Role, epoch: u64, link: OwnedFd) -> Result<(), String> {
        match (&self.state, role) {
            (State::Waiting, _) | (State::Alone, Role::Primary) => {}
            (State::Alone, Role::Secondary) => {
                return Err(
                    "A disk that was served alone cannot become a secondary: start with --protected".into()
                );
            }
            _ => return Err(format!("Attach while the disk is {}", self.name())),
        }
        if self.backend.image().read_only() {
            return Err(
                "A disk that is opened read-only cannot be protected: start without --read-only".into()
            );
        }
        let failed = |error| format!("The block link cannot be used: {error}");
        let (events, wakers) = (self.events.clone(), self.backend.wakers());
        match role {
            Role::Primary => {
                let primary = Primary::attach(link, epoch, events, wakers).map_err(failed)?;
                self.backend.set_mode(&Mode::Primary(primary.clone()));
                self.state = State::Primary(primary);
            }
            Role::Secondary => {
                let image = self.backend.image().clone();
                let secondary = Secondary::attach(link, epoch, image, self.buffer_bytes, events, wakers)
                    .map_err(failed)?;
                self.backend.set_mode(&Mode::Secondary(secondary.clone()));
                self.state = State::Secondary(secondary);
            }
        }
        Ok(())
    }

    /// Lets the link go. Requests wait from here on.
    fn detach(&mut self) -> Result<(), String> {
        match &self.state {
            State::Primary(primary) => {
                self.backend.set_mode(&Mode::Held);
                primary.detach();
                self.state = State::Detached(None);
            }
            State::Secondary(secondary) => {
                self.backend.set_mode(&Mode::Held);
                secondary.detach();
                self.state = State::Detached(Some(secondary.clone()));
            }
            State::Detached(_) | State::Waiting => {}
            State::Alone | State::Silenced => {
                return Err(format!("Detach while the disk is {}", self.name()));
            }
        }
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), String> {
        if let State::Primary(_) | State::Secondary(_) = self.state {
            self.detach()?;
        }
        match &self.state {
            State::Detached(Some(secondary)) => {
                secondary.write_back().map_err(|error| {
                    format!("The buffer cannot be written to the disk: {error}; requests wait, it may be tried again")
                })?;
                self.backend.sync_in_background();
            }
            State::Detached(None) | State::Waiting | State::Alone => {}
            _ => return Err(format!("Take-over while the disk is {}", self.name())),
        }
        self.backend.serve_alone();
        self.state = State::Alone;
        Ok(())
    }

    fn resize(&self, bytes: Option<u64>) -> Result<Value, String> {
        match self.state {
            State::Alone => Ok(json!({"disk_bytes": self.backend.resize(bytes)?})),
            _ => Err(format!(
                "The disk is {}, and a protected disk cannot be resized, since both hosts must have the same length: \
                 stop the VM, resize both images, start it again",
                self.name()
            )),
        }
    }

    fn silence(&mut self) {
        self.backend.set_mode(&Mode::Held);
        match std::mem::replace(&mut self.state, State::Silenced) {
            State::Primary(primary) => primary.detach(),
            State::Secondary(secondary) => secondary.detach(),
            _ => {}
        }
    }

    fn name(&self) -> &'static str {
        match self.state {
            State::Alone => "alone",
            State::Waiting => "waiting",
            State::Primary(_) => "primary",
            State::Secondary(_) => "secondary",
            State::Detached(_) => "detached",
            State::Silenced => "silenced",
        }
    }

    fn status(&self) -> Value {
        let mut status = self.backend.status();
        status["role"] = self.name().into();
        status["disk_digest"] = self.digest.clone().into();
        status["dirty_log_missed"] = self.logs.missed().into();
        match &self.state {
            State::Primary(primary) => status["primary"] = primary.status(),
            State::Secondary(secondary) | State::Detached(Some(secondary)) => {
                status["secondary"] = secondary.status();
            }
            _ => {}
        }
        status
    }
}

impl Handler for Controlled {
    fn handle(&mut self, request: Request) -> Result<Value, String> {
        let mut fds = request.fds.into_iter();
        let mut fd =
            |what: &str| fds.next().ok_or_else(|| format!("No descriptor came with the command: {what}"));
        match request.command {
            Command::DirtyLog { pages } => {
                let log = DirtyLog::from_fd(fd("a memfd")?, pages).map_err(|error| error.to_string())?;
                self.logs.set_control(Some(log));
            }
            Command::Attach { role, epoch } => self.attach(role, epoch, fd("the connection to the peer")?)?,
            Command::Marker { epoch } => match &self.state {
                State::Primary(primary) => primary.marker(epoch)?,
                _ => return Err(format!("Marker while the disk is {}", self.name())),
            },
            Command::Commit { epoch } => match &self.state {
                State::Primary(primary) => primary.commit(epoch)?,
                State::Secondary(secondary) => secondary.commit(epoch)?,
                _ => return Err(format!("Commit while the disk is {}", self.name())),
            },
            Command::Detach => self.detach()?,
            Command::TakeOver => self.take_over()?,
            Command::Silence => self.silence(),
            Command::Resize { bytes } => return self.resize(bytes),
            Command::Link { .. } => return Err("A disk has no cable".into()),
            Command::Status => return Ok(self.status()),
        }
        Ok(json!({}))
    }

    fn disk_bytes(&self) -> Option<u64> {
        Some(self.backend.image().bytes())
    }

    fn controller_lost(&mut self) {
        match self.state {
            // Nothing is shared with a peer. The next controller may begin.
            State::Alone | State::Waiting | State::Silenced => {}
            State::Primary(_) | State::Secondary(_) | State::Detached(_) => {
                tracing::error!("The controller is gone: the disk is not touched any more");
                self.silence();
            }
        }
    }
}
