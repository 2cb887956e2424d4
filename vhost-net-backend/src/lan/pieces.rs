//! Frames in pieces: on their way to a descriptor that keeps frames apart, and in buffers of the guest.
#![expect(unsafe_code, reason = "I/O on guest memory has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use colo::vhost_user::Chain;

/// Linux gives no more in one call (limits.h, UIO_MAXIOV).
pub(crate) const IOVECS_MAX: usize = 1024;

/// A frame with its header that is no longer is copied: that costs less than what the kernel does for each piece (measured
/// with 76 and 1526 bytes in one piece beside the header: 12 and 4 % more frames a second).
const SMALL_BYTES: usize = 2048;

/// What became of a frame that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The kernel has it.
    Taken,
    /// The kernel does not take it (too short, interface down, no memory), as on any network.
    Refused,
    /// There is no room now; the descriptor can be written when there is.
    Later,
}

/// Pieces of memory for one call.
#[derive(Debug, Default)]
pub(super) struct Vectors(pub(super) Vec<libc::iovec>);

// SAFETY: nobody follows its pointers but the call that they were put in for.
unsafe impl Send for Vectors {}

/// Room for a frame on its way to the kernel, used again and again.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Its pieces; what they point to matters during a call only.
    vectors: Vectors,
    /// Or all of it.
    small: Box<[u8; SMALL_BYTES]>,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self { vectors: Vectors::default(), small: Box::new([0; SMALL_BYTES]) }
    }
}

impl Outgoing {
    /// Sends a header and what can be read of the chain as one frame. It is refused when it is in too many pieces.
    pub(super) fn send(&mut self, fd: BorrowedFd<'_>, header: &[u8], chain: &Chain) -> Sent {
        let Self { vectors: Vectors(vectors), small } = self;
        let bytes = header.len() + chain.readable_bytes() as usize;
        if bytes <= SMALL_BYTES {
            small[..header.len()].copy_from_slice(header);
            chain.copy_to(&mut small[header.len()..bytes]);
            return write(fd, &small[..bytes]);
        }
        vectors.clear();
        vectors.push(piece(header));
        vectors.extend(
            chain
                .readable()
                .iter()
                .map(|piece| libc::iovec { iov_base: piece.host().cast(), iov_len: piece.bytes() as usize }),
        );
        if vectors.len() > IOVECS_MAX {
            return Sent::Refused;
        }
        // SAFETY: the buffers are a slice that is borrowed and pieces of guest memory that the chain keeps mapped.
        unsafe { write_pieces(fd, vectors) }
    }
}

/// For a call that only reads it.
fn piece(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// # Safety
/// The pieces are mapped and stay so.
unsafe fn write_pieces(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> Sent {
    loop {
        // SAFETY: the caller's promise. Not libc's own function, see `read_pieces`.
        let bytes = unsafe { libc::syscall(libc::SYS_writev, fd.as_raw_fd(), pieces.as_ptr(), pieces.len()) };
        if bytes >= 0 {
            return Sent::Taken;
        }
        match io::Error::last_os_error().kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Sent::Later,
            _ => return Sent::Refused,
        }
    }
}

/// Reads a frame into the pieces, and cuts off what does not fit.
///
/// # Safety
/// The pieces are mapped and stay so, and no reference to them exists.
pub(super) unsafe fn read_pieces(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    // Not libc's own functions: where a thread may be cancelled they cost a tenth more. And one piece costs less than a
    // list of one.
    // SAFETY: the caller's promise.
    let bytes = unsafe {
        match pieces {
            [one] => libc::syscall(libc::SYS_read, fd.as_raw_fd(), one.iov_base, one.iov_len),
            _ => {
                let count = pieces.len().min(IOVECS_MAX);
                libc::syscall(libc::SYS_readv, fd.as_raw_fd(), pieces.as_ptr(), count)
            }
        }
    };
    if bytes < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}

/// Sends a frame that is in one piece.
fn write(fd: BorrowedFd<'_>, frame: &[u8]) -> Sent {
    loop {
        return match rustix::io::write(fd, frame) {
            Ok(_) => Sent::Taken,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => Sent::Later,
            Err(_) => Sent::Refused,
        };
    }
}

/// Sends a frame behind a header, or without one if that is empty.
pub(super) fn write_behind(fd: BorrowedFd<'_>, header: &[u8], frame: &[u8]) -> bool {
    if header.is_empty() {
        return write(fd, frame) == Sent::Taken;
    }
    // SAFETY: both are slices that are borrowed.
    unsafe { write_pieces(fd, &[piece(header), piece(frame)]) == Sent::Taken }
}

/// Calls `with` for the piece of each buffer that lies behind `offset`, and how far it is from there, until it returns
/// false.
fn behind(buffers: &[libc::iovec], mut offset: usize, mut with: impl FnMut(*mut u8, usize) -> bool) {
    for buffer in buffers {
        let skipped = offset.min(buffer.iov_len);
        offset -= skipped;
        if skipped < buffer.iov_len
            && !with(buffer.iov_base.cast::<u8>().wrapping_add(skipped), buffer.iov_len - skipped)
        {
            return;
        }
    }
}

/// What of the buffers lies behind `offset`.
pub(super) fn append_behind(to: &mut Vec<libc::iovec>, buffers: &[libc::iovec], offset: usize) {
    behind(buffers, offset, |at, bytes| {
        to.push(libc::iovec { iov_base: at.cast(), iov_len: bytes });
        to.len() < IOVECS_MAX
    });
}

/// Copies into the buffers from `offset` on, as far as there is room.
///
/// # Safety
/// The buffers are mapped and stay so, and no reference to them exists.
pub(crate) unsafe fn scatter(buffers: &[libc::iovec], offset: usize, mut data: &[u8]) {
    behind(buffers, offset, |at, room| {
        let (now, rest) = data.split_at(data.len().min(room));
        // SAFETY: the caller's promise; `now` is no longer than the piece.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), at, now.len()) };
        data = rest;
        !data.is_empty()
    });
}

/// Copies out of the buffers from `offset` on, as far as there is something.
///
/// # Safety
/// As for [`scatter`].
pub(crate) unsafe fn gather(buffers: &[libc::iovec], offset: usize, into: &mut [u8]) {
    let mut filled = 0;
    behind(buffers, offset, |at, bytes| {
        let now = bytes.min(into.len() - filled);
        // SAFETY: the caller's promise; `now` is no longer than the piece, nor than the room.
        unsafe { std::ptr::copy_nonoverlapping(at, into[filled..].as_mut_ptr(), now) };
        filled += now;
        filled < into.len()
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_are_one_buffer(
            mut buffers in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6), 0..6),
            offset in 0usize..20,
            data in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut whole = buffers.concat();
            let vectors: Vec<_> = buffers
                .iter_mut()
                .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
                .collect();
            let rest = whole.get_mut(offset..).unwrap_or_default();
            let mut read = vec![0; data.len()];
            // SAFETY: the buffers are vectors that nobody else uses meanwhile.
            unsafe { gather(&vectors, offset, &mut read) };
            let bytes = rest.len().min(data.len());
            prop_assert_eq!(&read[..bytes], &rest[..bytes]);
            prop_assert!(read[bytes..].iter().all(|byte| *byte == 0));
            let mut behind = Vec::new();
            append_behind(&mut behind, &vectors, offset);
            prop_assert_eq!(behind.iter().map(|piece| piece.iov_len).sum::<usize>(), rest.len());
            rest[..bytes].copy_from_slice(&data[..bytes]);
            // SAFETY: as above.
            unsafe { scatter(&vectors, offset, &data) };
            prop_assert_eq!(buffers.concat(), whole);
        }
    }
}
