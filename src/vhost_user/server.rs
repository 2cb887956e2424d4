//! Accepts frontends, one after the other.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::bind::bind_unix;
use super::device::Device;
use super::message::Message;
use super::session::{Session, SessionError};
use crate::inherit::Inherited;
use crate::memory::DirtyLogs;

/// A device at a socket.
#[derive(Debug)]
pub struct Server<D> {
    socket: Socket,
    device: Arc<D>,
    logs: DirtyLogs,
    broken_rings: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Socket {
    /// Of this server's own, with the path that it is removed from.
    Bound(UnixListener, PathBuf),
    Inherited(Inherited),
}

impl<D: Device> Server<D> {
    /// Listens at `path`; writes to guest memory go to `logs`, as far as they are armed.
    ///
    /// # Errors
    /// The path is in use, is no socket, or its directory cannot be written.
    pub fn bind(path: &Path, device: Arc<D>, logs: DirtyLogs) -> io::Result<Self> {
        Ok(Self::new(Socket::Bound(bind_unix(path)?, path.to_owned()), device, logs))
    }

    /// Listens on a socket, or serves a connection, that the starting process has left open.
    pub fn inherit(socket: Inherited, device: Arc<D>, logs: DirtyLogs) -> Self {
        Self::new(Socket::Inherited(socket), device, logs)
    }

    fn new(socket: Socket, device: Arc<D>, logs: DirtyLogs) -> Self {
        Self { socket, device, logs, broken_rings: Arc::default() }
    }

    /// Serves one frontend after the other, for ever; or the one that was inherited, until it closes the connection.
    ///
    /// # Errors
    /// The listening socket fails, or the inherited connection was closed for this reason.
    pub fn run(self) -> io::Result<()> {
        let (listener, name) = match &self.socket {
            Socket::Bound(listener, path) => (listener, format!("vhost-user socket {}", path.display())),
            Socket::Inherited(Inherited::Listening(listener)) => (listener, "vhost-user socket".into()),
            Socket::Inherited(Inherited::Connected(stream)) => {
                return self.serve(stream.try_clone()?).map_err(io::Error::other);
            }
        };
        loop {
            let (stream, _) = listener.accept()?;
            tracing::info!("{name}: connected");
            match self.serve(stream) {
                Ok(()) => tracing::info!("{name}: disconnected"),
                Err(error) => tracing::error!("{name}: closed the connection: {error}"),
            }
        }
    }

    fn serve(&self, stream: UnixStream) -> Result<(), SessionError> {
        serve(&*self.device, &self.logs, &self.broken_rings, stream)
    }
}

impl<D> Drop for Server<D> {
    fn drop(&mut self) {
        if let Socket::Bound(_, path) = &self.socket {
            drop(std::fs::remove_file(path));
        }
    }
}

/// Serves one frontend until it closes the connection. Every ring has then been stopped.
///
/// # Errors
/// What was wrong with a message.
pub fn serve_connection<D>(device: &D, logs: &DirtyLogs, stream: UnixStream) -> Result<(), SessionError>
where
    D: Device + ?Sized,
{
    serve(device, logs, &Arc::default(), stream)
}

fn serve<D>(
    device: &D,
    logs: &DirtyLogs,
    broken_rings: &Arc<AtomicU64>,
    mut stream: UnixStream,
) -> Result<(), SessionError>
where
    D: Device + ?Sized,
{
    let mut session = Session::new(device, logs, broken_rings.clone());
    let mut served = || {
        while let Some(message) = Message::read(&mut stream)? {
            session.handle(message, &mut stream)?;
        }
        Ok(())
    };
    let result = served();
    session.close();
    result
}
