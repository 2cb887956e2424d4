//! The Unix socket that a server listens on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Listens on a Unix socket. A socket file that nobody listens on any more is replaced.
///
/// # Errors
/// The path is in use, is no socket, or its directory cannot be written.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let in_use = |what: &str| io::Error::new(io::ErrorKind::AddrInUse, format!("{} {what}", path.display()));
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => match UnixStream::connect(path) {
            Ok(_) => {
                return Err(in_use("is taken by a running program: stop it or choose another path"));
            }
            Err(_) => std::fs::remove_file(path)?,
        },
        Ok(_) => {
            return Err(in_use("exists and is no socket: remove it or choose another path"));
        }
        Err(_) => {}
    }
    UnixListener::bind(path)
}
