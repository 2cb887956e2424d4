//! One connection with QEMU: made, lost and made again, without ever waiting for it.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay, socket_error,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
};

use super::endpoint::{Address, Endpoint};

/// Time between two attempts to connect.
const RETRY_US: u64 = 1_000_000;

/// A host that has died without a word is noticed after so much silence, and so many questions one second apart.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 5;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// Where connections come from.
#[derive(Debug)]
enum Source {
    Listener { fd: OwnedFd, tcp: bool, path: Option<PathBuf> },
    Unix(SocketAddrUnix),
    Tcp(SocketAddr),
}

#[derive(Debug)]
enum State {
    /// For QEMU to connect, or for the time of the next attempt.
    Waiting {
        retry_us: u64,
    },
    /// An attempt to connect is on its way.
    Connecting(OwnedFd),
    Connected(File),
}

/// A connection that comes and goes.
#[derive(Debug)]
pub(super) struct Socket {
    source: Source,
    state: State,
    connections: u64,
    /// Why there is none now.
    trouble: Option<String>,
}

impl Socket {
    /// Listens, or prepares to connect.
    ///
    /// # Errors
    /// The address is taken, or means nothing.
    pub(super) fn open(endpoint: &Endpoint) -> io::Result<Self> {
        let source = match (&endpoint.address, endpoint.listens) {
            (Address::Unix(path), true) => {
                let listener = colo::vhost_user::bind_unix(path)?;
                listener.set_nonblocking(true)?;
                Source::Listener { fd: listener.into(), tcp: false, path: Some(path.clone()) }
            }
            (Address::Unix(path), false) => Source::Unix(SocketAddrUnix::new(path)?),
            (Address::Tcp { host, port }, true) => {
                let listener = TcpListener::bind((host.as_str(), *port))?;
                listener.set_nonblocking(true)?;
                Source::Listener { fd: listener.into(), tcp: true, path: None }
            }
            (Address::Tcp { host, port }, false) => {
                let address = (host.as_str(), *port).to_socket_addrs()?.next();
                Source::Tcp(address.ok_or_else(|| io::Error::other(format!("{host} has no address")))?)
            }
        };
        Ok(Self { source, state: State::Waiting { retry_us: 0 }, connections: 0, trouble: None })
    }

    /// The connection, if there is one.
    pub(super) fn stream(&mut self) -> Option<&mut File> {
        match &mut self.state {
            State::Connected(stream) => Some(stream),
            _ => None,
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(self.state, State::Connected(_))
    }

    /// How many connections there have been.
    pub(super) fn connections(&self) -> u64 {
        self.connections
    }

    /// Why there is none, if that is known.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What to wait for; `wanted` on the connection.
    pub(super) fn interest(&self, wanted: PollFlags) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.state, &self.source) {
            (State::Connected(_), _) if wanted.is_empty() => None,
            (State::Connected(stream), _) => Some((stream.as_fd(), wanted)),
            (State::Connecting(fd), _) => Some((fd.as_fd(), PollFlags::OUT)),
            (State::Waiting { .. }, Source::Listener { fd, .. }) => Some((fd.as_fd(), PollFlags::IN)),
            (State::Waiting { .. }, _) => None,
        }
    }

    /// When [`Socket::advance`] has something to do that no descriptor tells.
    pub(super) fn deadline(&self) -> Option<u64> {
        match (&self.state, &self.source) {
            (_, Source::Listener { .. }) => None,
            (State::Waiting { retry_us }, _) => Some(*retry_us),
            _ => None,
        }
    }

    /// Goes on with making the connection. Returns whether it is made by this call.
    pub(super) fn advance(&mut self, now_us: u64) -> bool {
        match self.attempt(now_us) {
            Ok(connected) => connected,
            Err(error) => {
                self.trouble = Some(error.to_string());
                self.state = State::Waiting { retry_us: now_us + RETRY_US };
                false
            }
        }
    }

    fn attempt(&mut self, now_us: u64) -> io::Result<bool> {
        let (fd, tcp) = match (&self.state, &self.source) {
            (State::Connected(_), _) => return Ok(false),
            (State::Waiting { .. }, Source::Listener { fd, tcp, .. }) => match accept_with(fd, FLAGS) {
                Ok(connection) => (connection, *tcp),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(false),
                Err(error) => return Err(error.into()),
            },
            (State::Waiting { retry_us }, _) if *retry_us > now_us => return Ok(false),
            (State::Waiting { .. }, Source::Unix(address)) => {
                let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
                connect(&fd, address)?;
                (fd, false)
            }
            (State::Waiting { .. }, Source::Tcp(address)) => {
                let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let fd = socket_with(family, SocketType::STREAM, FLAGS, None)?;
                match connect(&fd, address) {
                    Ok(()) => (fd, true),
                    Err(Errno::INPROGRESS | Errno::INTR) => {
                        self.state = State::Connecting(fd);
                        return Ok(false);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            (State::Connecting(fd), _) => {
                let mut ready = [rustix::event::PollFd::new(fd, PollFlags::OUT)];
                if rustix::event::poll(&mut ready, Some(&rustix::event::Timespec::default()))? == 0 {
                    return Ok(false);
                }
                socket_error(fd)??;
                (fd.try_clone()?, true)
            }
        };
        if tcp {
            set_tcp_nodelay(&fd, true)?;
            set_socket_keepalive(&fd, true)?;
            set_tcp_keepidle(&fd, KEEPALIVE_IDLE)?;
            set_tcp_keepintvl(&fd, Duration::from_secs(1))?;
            set_tcp_keepcnt(&fd, KEEPALIVE_PROBES)?;
        }
        self.state = State::Connected(fd.into());
        self.connections += 1;
        self.trouble = None;
        Ok(true)
    }

    /// Gives the connection up.
    pub(super) fn close(&mut self, trouble: String, now_us: u64) {
        self.trouble = Some(trouble);
        self.state = State::Waiting { retry_us: now_us + RETRY_US };
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Source::Listener { path: Some(path), .. } = &self.source {
            // a file that is left is replaced at the next start
            let _ = std::fs::remove_file(path);
        }
    }
}
