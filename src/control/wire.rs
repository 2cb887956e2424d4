//! Lines and the descriptors that travel beside them.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// A line longer than this is refused.
const LINE_BYTES_MAX: usize = 256 << 10;

/// More descriptors than this never travel with one line.
const FDS_MAX: usize = 4;

/// Reads lines from a socket, with the descriptors that came along.
pub(super) struct LineReader {
    stream: UnixStream,
    buffer: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl LineReader {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), fds: VecDeque::new() }
    }

    /// The next line without its end and the descriptors received so far; `None` at the end of the stream.
    pub(super) fn next_line(&mut self) -> io::Result<Option<(String, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                let line =
                    String::from_utf8(line).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                return Ok(Some((line, self.fds.drain(..).collect())));
            }
            if self.buffer.len() > LINE_BYTES_MAX || self.fds.len() > FDS_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a control line is too long or brings too many descriptors",
                ));
            }
            let mut bytes = [0; 8192];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = match recvmsg(
                &self.stream,
                &mut [io::IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if received.bytes == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&bytes[..received.bytes]);
        }
    }
}

/// Writes one line and its descriptors.
pub(super) fn write_line(stream: &UnixStream, line: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(b'\n');
    let mut left = &bytes[..];
    let mut fds = fds;
    while !left.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one line"));
        }
        match sendmsg(stream.as_fd(), &[io::IoSlice::new(left)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                left = &left[sent..];
                fds = &[];
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
