//! Messages on the socket: a header of 12 bytes, a payload, and descriptors that travel beside the header.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag, VhostUserMsgValidator,
};
use vm_memory::ByteValued;

const HEADER_BYTES: usize = 12;
/// Version of the protocol, in the flags of every message.
pub(super) const VERSION: u32 = 1;

type Header = ([u8; HEADER_BYTES], Vec<OwnedFd>);

/// What makes a message malformed. The connection that brought it is closed.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The header's flags are those of another protocol version, of a reply, or unknown.
    #[error("Message {request} has flags {flags:#x}: this is no vhost-user request of version 1")]
    Flags {
        /// Number of the request.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// No request is that long.
    #[error("Message {request} announces {bytes} bytes, {MAX_MSG_SIZE} are the most")]
    TooLong {
        /// Number of the request.
        request: u32,
        /// Announced payload.
        bytes: u32,
    },
    /// A request that the protocol, or this server, does not have.
    #[error("Message {request} is not one that this back end has offered to understand")]
    Unknown {
        /// Number of the request.
        request: u32,
    },
    /// The payload is not what the request needs.
    #[error("{request:?} with {bytes} bytes of payload is malformed")]
    Payload {
        /// The request.
        request: FrontendReq,
        /// Length of its payload.
        bytes: usize,
    },
    /// Too many, too few, or lost descriptors.
    #[error("{request:?} came with {count} descriptors, it must have {expected}")]
    Descriptors {
        /// The request.
        request: FrontendReq,
        /// How many came.
        count: usize,
        /// How many are right.
        expected: usize,
    },
    /// More descriptors than any request has.
    #[error("A message brings more than {MAX_ATTACHED_FD_ENTRIES} descriptors")]
    TooManyDescriptors,
    /// The socket failed or was closed in the middle of a message.
    #[error("The vhost-user socket failed: {0}")]
    Io(#[from] io::Error),
}

/// A request as it came.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: FrontendReq,
    pub(super) need_reply: bool,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// Waits for the next request; `None` when the frontend has closed the connection.
    pub(super) fn read(stream: &mut UnixStream) -> Result<Option<Self>, MessageError> {
        let Some((header, fds)) = read_header(stream)? else {
            return Ok(None);
        };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let (number, flags, bytes) = (word(0), word(4), word(8));
        let need_reply = VhostUserHeaderFlag::NEED_REPLY.bits();
        if flags & !need_reply != VERSION {
            return Err(MessageError::Flags { request: number, flags });
        }
        if bytes as usize > MAX_MSG_SIZE {
            return Err(MessageError::TooLong { request: number, bytes });
        }
        let mut payload = vec![0; bytes as usize];
        stream.read_exact(&mut payload)?;
        let request = FrontendReq::try_from(number).map_err(|_| MessageError::Unknown { request: number })?;
        Ok(Some(Self { request, need_reply: flags & need_reply != 0, payload, fds }))
    }

    /// The payload as the structure that the request has, checked as far as it can be without context.
    pub(super) fn body<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Result<T, MessageError> {
        self.body_and_rest()
            .and_then(|(body, rest)| if rest.is_empty() { Ok(body) } else { Err(self.malformed()) })
    }

    /// The structure at the beginning of the payload and what follows it.
    pub(super) fn body_and_rest<T>(&self) -> Result<(T, &[u8]), MessageError>
    where
        T: ByteValued + Default + VhostUserMsgValidator,
    {
        let (head, rest) = self.payload.split_at_checked(size_of::<T>()).ok_or_else(|| self.malformed())?;
        let mut body = T::default();
        body.as_mut_slice().copy_from_slice(head);
        if body.is_valid() { Ok((body, rest)) } else { Err(self.malformed()) }
    }

    /// That exactly so many descriptors came.
    pub(super) fn expect_fds(&self, expected: usize) -> Result<(), MessageError> {
        if self.fds.len() == expected {
            return Ok(());
        }
        Err(MessageError::Descriptors { request: self.request, count: self.fds.len(), expected })
    }

    pub(super) fn malformed(&self) -> MessageError {
        MessageError::Payload { request: self.request, bytes: self.payload.len() }
    }

    /// Answers this request, with a descriptor where the request has one in its answer.
    pub(super) fn reply(
        &self,
        stream: &mut UnixStream,
        payload: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let mut bytes = encode(self.request.into(), flags, payload);
        if let Some(fd) = fd {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            // the descriptor goes with the first byte; what does not fit into the socket follows
            let sent = sendmsg(&*stream, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
            bytes.drain(..sent);
        }
        stream.write_all(&bytes)
    }
}

/// A message of ours as it travels.
pub(super) fn encode(number: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for word in [number, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Reads a header and the descriptors that came with it, which the kernel delivers with the first of its bytes.
fn read_header(stream: &UnixStream) -> Result<Option<Header>, MessageError> {
    let mut header = [0; HEADER_BYTES];
    let mut fds = Vec::new();
    let mut filled = 0;
    while filled < HEADER_BYTES {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut header[filled..])];
        let received = match recvmsg(stream, into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(MessageError::TooManyDescriptors);
        }
        if received.bytes == 0 {
            if filled == 0 {
                return Ok(None);
            }
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        filled += received.bytes;
    }
    Ok(Some((header, fds)))
}
