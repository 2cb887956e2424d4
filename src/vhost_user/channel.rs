//! What the device says to the frontend unasked, on the socket that the frontend has given for it
//! (VHOST_USER_SET_BACKEND_REQ_FD).

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use vhost::vhost_user::message::BackendReq;

use super::message::{VERSION, encode};

/// The socket of the frontend that is connected, if it gave one. The device keeps it, the server sets it.
#[derive(Debug, Default)]
pub struct FrontendChannel {
    stream: Mutex<Option<UnixStream>>,
}

impl FrontendChannel {
    /// No frontend yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells the frontend that the configuration space is not what it was, so that it reads it again and interrupts
    /// the driver. Returns whether there is a frontend that can be told; one that comes later reads the new
    /// configuration anyway.
    pub fn config_changed(&self) -> bool {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(socket) = stream.as_mut() else {
            return false;
        };
        let message = encode(BackendReq::CONFIG_CHANGE_MSG.into(), VERSION, &[]);
        match socket.write_all(&message) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("vhost-user: the frontend cannot be told of a change: {error}");
                *stream = None;
                false
            }
        }
    }

    pub(super) fn set(&self, stream: Option<UnixStream>) {
        if let Some(Err(error)) = stream.as_ref().map(|stream| stream.set_nonblocking(true)) {
            tracing::warn!("vhost-user: the frontend's socket for changes cannot be used: {error}");
        }
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}
