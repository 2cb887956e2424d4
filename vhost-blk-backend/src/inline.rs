//! Transfers in one system call, without the ring, for images that seldom make the caller wait.
//!
//! A file in memory has nothing to wait for, and the ring would hand each request to a helper thread. A file in the
//! page cache is asked with RWF_NOWAIT and says so when it would have to wait. What such a call costs is measured: when
//! it takes as long as a disk does, or is refused too often, the ring is used for a while before the next attempt.
#![expect(unsafe_code, reason = "preadv2 and pwritev2 with guest memory")]

use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::image::{Access, Image};
use crate::transfer::{Kind, Transfer};

/// One call in so many is timed.
const SAMPLE: u32 = 64;
/// A call that takes longer than this on average has waited for something: memory is copied at gigabytes a second,
/// and a disk answers no sooner.
const CALL_NS_MAX: u64 = 30_000;
/// For so many requests the ring is used after that; after a refusal it is used twice as long each time, from 1 on.
const SKIP_MAX: u32 = 1024;

/// What is known of one direction.
#[derive(Debug)]
struct Direction {
    possible: bool,
    flags: i32,
    /// Requests that go to the ring without an attempt.
    skip: u32,
    /// The length of the next such time.
    next_skip: u32,
    calls: u32,
    average_ns: u64,
}

/// The policy of one worker.
#[derive(Debug)]
pub(crate) struct Inline {
    reads: Direction,
    writes: Direction,
}

impl Direction {
    fn new(possible: bool, flags: i32) -> Self {
        Self { possible, flags, skip: 0, next_skip: 1, calls: 0, average_ns: 0 }
    }

    /// Whether this request is worth an attempt.
    #[inline]
    fn tries(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
        }
        self.possible && self.skip == 0
    }

    fn refused(&mut self) {
        self.skip = self.next_skip + 1;
        self.next_skip = (self.next_skip * 2).min(SKIP_MAX);
    }

    fn took(&mut self, ns: u64) {
        self.average_ns = (7 * self.average_ns + ns) / 8;
        if self.average_ns > CALL_NS_MAX {
            self.average_ns = 0;
            self.skip = SKIP_MAX;
        }
    }
}

impl Inline {
    pub(crate) fn new(image: &Image) -> Self {
        let (reads, writes, flags) = match image.access() {
            // tmpfs knows no RWF_NOWAIT, and does not need it
            Access::Memory => (true, true, 0),
            // what is written to the page cache may wait for writeback, and most file systems refuse to try
            Access::Buffered => (image.never_waits(), false, libc::RWF_NOWAIT),
            Access::Direct { .. } | Access::Null => (false, false, 0),
        };
        Self { reads: Direction::new(reads, flags), writes: Direction::new(writes, flags) }
    }

    /// Whether a transfer of this kind is worth an attempt. Asked once for each.
    #[inline]
    pub(crate) fn tries(&mut self, kind: Kind) -> bool {
        match kind {
            Kind::Read => self.reads.tries(),
            Kind::Write => self.writes.tries(),
            Kind::Sync | Kind::Discard | Kind::Zero | Kind::WriteZeros => false,
        }
    }

    /// Attempts a prepared transfer as a whole. `false`: it is still to be done, from its beginning; so is one that
    /// failed or was cut short, for the ring to find out why.
    #[inline]
    pub(crate) fn attempt(&mut self, transfer: &Transfer, image: &Image) -> bool {
        let (iovecs, offset, bytes) = transfer.rest();
        let (fd, count, at) = (image.file().as_raw_fd(), iovecs.len() as i32, offset as i64);
        let direction = if transfer.kind() == Kind::Read { &mut self.reads } else { &mut self.writes };
        direction.calls = direction.calls.wrapping_add(1);
        let began = direction.calls.is_multiple_of(SAMPLE).then(Instant::now);
        // SAFETY: the iovecs are those of a prepared transfer: they point to guest memory or a copy that it keeps, and
        // no reference to that memory exists. The descriptor is open as long as the image is borrowed.
        let done = unsafe {
            match (transfer.kind(), iovecs) {
                (Kind::Read, [one]) if direction.flags == 0 => libc::pread(fd, one.iov_base, one.iov_len, at),
                (Kind::Read, _) => libc::preadv2(fd, iovecs.as_ptr(), count, at, direction.flags),
                (_, [one]) if direction.flags == 0 => libc::pwrite(fd, one.iov_base, one.iov_len, at),
                _ => libc::pwritev2(fd, iovecs.as_ptr(), count, at, direction.flags),
            }
        };
        if let Some(began) = began {
            direction.took(began.elapsed().as_nanos() as u64);
        }
        if done == bytes as isize {
            direction.next_skip = 1;
            return true;
        }
        direction.refused();
        false
    }
}
