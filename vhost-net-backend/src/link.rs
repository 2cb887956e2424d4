//! The connection to the peer's net back end, without ever waiting for it.

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use colo::link::{Decoder, FrameError, Header, encode};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{getpeername, getsockname};

/// With more than this waiting to be sent, what would add to it is left where it is: in the tap, in the guest's ring.
const OUTGOING_BYTES_MAX: usize = 4 << 20;

/// What a read of the link brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Bytes, perhaps whole frames.
    Some,
    /// Nothing so far.
    Nothing,
    /// The peer has closed it.
    End,
}

/// A connected stream with a buffer on either side.
#[derive(Debug)]
pub struct Link {
    stream: File,
    outgoing: Vec<u8>,
    sent: usize,
    decoder: Decoder,
}

impl Link {
    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// It cannot be made nonblocking.
    pub fn new(stream: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&stream, fcntl_getfl(&stream)? | OFlags::NONBLOCK)?;
        Ok(Self { stream: stream.into(), outgoing: Vec::new(), sent: 0, decoder: Decoder::default() })
    }

    /// Whether the peer is on this host, as far as the addresses tell: there is no network between us then.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn is_local(&self) -> io::Result<bool> {
        // what has no IP address is a Unix socket
        let ip = |end| SocketAddr::try_from(end).ok().map(|address: SocketAddr| address.ip());
        Ok(ip(getsockname(&self.stream)?) == getpeername(&self.stream)?.and_then(ip))
    }

    /// Queues a frame; [`Link::flush`] sends it.
    pub fn send(&mut self, kind: u16, epoch: u64, payload: &[u8]) {
        encode(kind, epoch, &[payload], &mut self.outgoing);
    }

    /// Sends as much as the socket takes. Returns whether it took anything.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        let before = self.sent;
        while self.sent < self.outgoing.len() {
            match self.stream.write(&self.outgoing[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let any = self.sent > before;
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        } else if self.sent > OUTGOING_BYTES_MAX {
            self.outgoing.drain(..self.sent);
            self.sent = 0;
        }
        Ok(any)
    }

    /// Bytes that wait to be sent.
    pub fn outgoing_bytes(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Whether nothing more should be queued for now.
    pub fn congested(&self) -> bool {
        self.outgoing_bytes() > OUTGOING_BYTES_MAX
    }

    /// Reads once.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn fill(&mut self) -> io::Result<Received> {
        match self.decoder.fill(&mut self.stream) {
            Ok(0) => Ok(Received::End),
            Ok(_) => Ok(Received::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// What came is no frame: the link is unusable.
    pub fn next_frame(&mut self) -> Result<Option<(Header, &[u8])>, FrameError> {
        self.decoder.next_frame()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_on_this_host_is_known_by_its_address() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(Link::new(a.into()).unwrap().is_local().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(Link::new(stream.into()).unwrap().is_local().unwrap());
        // any address of 127/8 is this host's, but two of them are as good as two hosts
        let (domain, kind) = (rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM);
        let socket = rustix::net::socket(domain, kind, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
        rustix::net::connect(&socket, &listener.local_addr().unwrap()).unwrap();
        assert!(!Link::new(socket).unwrap().is_local().unwrap());
    }

    #[test]
    fn frames_pass_a_full_socket_in_pieces() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (Link::new(a.into()).unwrap(), Link::new(b.into()).unwrap());
        assert_eq!(b.fill().unwrap(), Received::Nothing);
        let payload = |n: u64| vec![n as u8; 50_000];
        for n in 0..200 {
            a.send(7, n, &payload(n));
        }
        assert!(a.congested());
        let mut next = 0;
        while next < 200 {
            a.flush().unwrap();
            while b.fill().unwrap() == Received::Some {
                while let Some((header, bytes)) = b.next_frame().unwrap() {
                    assert_eq!((header.kind, header.epoch, bytes), (7, next, &payload(next)[..]));
                    next += 1;
                }
            }
        }
        assert_eq!(a.outgoing_bytes(), 0);
        assert!(!a.flush().unwrap());
        drop(a);
        assert_eq!(b.fill().unwrap(), Received::End);
        b.send(1, 1, &[]);
        assert!(b.flush().is_err());
    }
}
