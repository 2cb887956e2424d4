//! The connected stream between two block back ends, as several threads use it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use colo::control::{Event, EventSender};
use rustix::net::Shutdown;

/// A blocking stream socket of any family. Clones are the same connection.
#[derive(Clone, Debug)]
pub(crate) struct LinkStream {
    // reading and writing a socket through `File` is plain read(2) and writev(2)
    socket: Arc<File>,
    events: EventSender,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    /// By us, or reported already.
    Closed,
}

impl LinkStream {
    /// Takes a connected socket over.
    ///
    /// # Errors
    /// It is no socket.
    pub(crate) fn new(socket: OwnedFd, events: EventSender) -> io::Result<Self> {
        rustix::net::getpeername(&socket)?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        let state = Arc::new(Mutex::new(State::Open));
        Ok(Self { socket: Arc::new(File::from(socket)), events, state })
    }

    /// Ends the connection for both directions and every thread. The controller is told, unless the connection had
    /// ended already.
    pub(crate) fn lost(&self, reason: String) {
        if self.shut_down() {
            tracing::warn!("Block link: {reason}");
            self.events.send(&Event::LinkLost { reason });
        }
    }

    /// Ends the connection because the controller wants it.
    pub(crate) fn close(&self) {
        self.shut_down();
    }

    /// Whether it has ended, as far as this side knows.
    pub(crate) fn is_closed(&self) -> bool {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) == State::Closed
    }

    fn shut_down(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // fails only when the peer has gone, and that is what is wanted
        let _ = rustix::net::shutdown(&*self.socket, Shutdown::Both);
        std::mem::replace(&mut *state, State::Closed) == State::Open
    }
}

impl Read for LinkStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.socket).read(buffer)
    }
}

impl Write for LinkStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self.socket).write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[io::IoSlice<'_>]) -> io::Result<usize> {
        (&*self.socket).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
