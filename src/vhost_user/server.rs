//! Accepts frontends, one after the other.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bind::bind_unix;
use super::device::Device;
use super::message::Message;
use super::session::{Session, SessionError};
use crate::memory::DirtyLogs;

/// A device at a socket.
#[derive(Debug)]
pub struct Server<D> {
    listener: UnixListener,
    path: PathBuf,
    device: Arc<D>,
    logs: DirtyLogs,
    broken_rings: Arc<AtomicU64>,
}

impl<D: Device> Server<D> {
    /// Listens at `path`; writes to guest memory go to `logs`, as far as they are armed.
    ///
    /// # Errors
    /// The path is in use, is no socket, or its directory cannot be written.
    pub fn bind(path: &Path, device: Arc<D>, logs: DirtyLogs) -> io::Result<Self> {
        Ok(Self {
            listener: bind_unix(path)?,
            path: path.to_owned(),
            device,
            logs,
            broken_rings: Arc::default(),
        })
    }

    /// How many rings were broken by a malformed request so far.
    pub fn broken_rings(&self) -> u64 {
        self.broken_rings.load(Ordering::Relaxed)
    }

    /// Serves one frontend after the other, for ever.
    ///
    /// # Errors
    /// The listening socket fails.
    pub fn run(&self) -> io::Result<()> {
        loop {
            let (stream, _) = self.listener.accept()?;
            tracing::info!("vhost-user socket {}: connected", self.path.display());
            match serve(&*self.device, &self.logs, &self.broken_rings, stream) {
                Ok(()) => tracing::info!("vhost-user socket {}: disconnected", self.path.display()),
                Err(error) => {
                    tracing::error!(
                        "vhost-user socket {}: closed the connection: {error}",
                        self.path.display()
                    );
                }
            }
        }
    }
}

impl<D> Drop for Server<D> {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
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
