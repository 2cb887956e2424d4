//! A connected socket driven by io_uring.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{IoUring, opcode, squeue, types};

/// Reads and writes a stream through a ring of its own, one operation at a time.
pub struct UringStream {
    ring: IoUring,
    socket: OwnedFd,
}

impl UringStream {
    /// Takes over a connected, blocking stream.
    ///
    /// # Errors
    /// The kernel has no io_uring, or forbids it.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        let ring = IoUring::new(4)
            .map_err(|error| io::Error::new(error.kind(), format!("io_uring cannot be used: {error}")))?;
        Ok(Self { ring, socket: stream.into() })
    }

    /// Runs one operation to its end.
    #[expect(unsafe_code, reason = "a submission queue entry names memory by address")]
    fn run(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: the callers keep the buffers that the entry names borrowed until this returns, and it returns only
        // once the completion has been taken, so the kernel touches them no more.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        let done = loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // Without a completion the kernel may still use the caller's buffer: there is no safe way on.
                    tracing::error!("io_uring_enter failed: {error}");
                    std::process::abort();
                }
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                break done;
            }
        };
        match done.result() {
            negative if negative < 0 => Err(io::Error::from_raw_os_error(-negative)),
            bytes => Ok(bytes as usize),
        }
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.socket.as_raw_fd())
    }
}

impl Drop for UringStream {
    fn drop(&mut self) {
        // Other threads may hold the same connection: it ends for them and for the peer now. One that is broken
        // already needs nothing.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

impl Read for UringStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = into.len().min(1 << 30) as u32;
        let entry = opcode::Recv::new(self.fd(), into.as_mut_ptr(), len).flags(libc::MSG_WAITALL).build();
        self.run(&entry)
    }
}

impl Write for UringStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            // IoSlice is guaranteed to have the layout of iovec; sending does not write through it
            msg_iov: from.as_ptr().cast_mut().cast(),
            msg_iovlen: from.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let entry = opcode::SendMsg::new(self.fd(), &raw const message).flags(flags).build();
        self.run(&entry)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::link::{read_frame, write_frame};

    #[test]
    fn frames_pass_and_the_end_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let left = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let right = listener.accept().unwrap().0;
        let big: Vec<u8> = (0..1_500_000u32).map(|n| n as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut out = UringStream::new(left).unwrap();
                for epoch in 0..10 {
                    write_frame(&mut out, 3, epoch, &[&big[..700_000], &big[700_000..]]).unwrap();
                }
            });
            let mut from = UringStream::new(right).unwrap();
            let mut payload = Vec::new();
            for epoch in 0..10 {
                assert_eq!(read_frame(&mut from, &mut payload).unwrap().epoch, epoch);
                assert!(payload == big);
            }
            assert!(read_frame(&mut from, &mut payload).is_err());
        });
    }
}
