//! The io_uring of one worker: transfers between guest memory and the image, and what wakes the worker.
#![expect(
    unsafe_code,
    reason = "hands the kernel addresses that it reads and writes while an operation runs"
)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use colo::memory::{GuestMemory, mark_written};
use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::GuestMemoryBackend;

use crate::image::Image;
use crate::request::Segment;

/// The most transfers at once; further requests stay in the guest's ring.
const SLOTS: usize = 256;

/// The kernel takes no more in one call (limits.h, UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;

/// What can end the worker's sleep besides a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    Kick,
    Order,
}

const KICK: u64 = u64::MAX;
const ORDER: u64 = u64::MAX - 1;
const IGNORED: u64 = u64::MAX - 2;

impl Wake {
    fn user_data(self) -> u64 {
        match self {
            Self::Kick => KICK,
            Self::Order => ORDER,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    /// A write that is durable when it is done.
    WriteThrough,
    Sync,
}

/// A transfer that runs, with all that the kernel uses meanwhile; or a free place, whose vectors keep their memory.
struct Slot<R> {
    request: Option<R>,
    kind: Kind,
    /// Keeps mapped what `iovecs` point to.
    memory: Option<Arc<GuestMemory>>,
    /// Or keeps that allocated.
    copy: Option<Arc<Vec<u8>>>,
    iovecs: Vec<libc::iovec>,
    /// The first of `iovecs` that is not done.
    next: usize,
    /// Where in the image the transfer goes on.
    offset: u64,
    left_bytes: usize,
    /// A read's destination, to be marked when it ends.
    segments: Vec<Segment>,
}

impl<R> Slot<R> {
    fn free() -> Self {
        Self {
            request: None,
            kind: Kind::Sync,
            memory: None,
            copy: None,
            iovecs: Vec::new(),
            next: 0,
            offset: 0,
            left_bytes: 0,
            segments: Vec::new(),
        }
    }

    /// Points the iovecs at guest memory; `false` when some of it is none.
    fn map(&mut self, memory: &Arc<GuestMemory>, segments: &[Segment]) -> bool {
        self.iovecs.clear();
        self.left_bytes = 0;
        for segment in segments {
            let bytes = segment.bytes as usize;
            for slice in GuestMemoryBackend::get_slices(&**memory, segment.address, bytes) {
                let Ok(slice) = slice else {
                    return false;
                };
                let guard = slice.ptr_guard_mut();
                self.iovecs.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
            }
            self.left_bytes += bytes;
        }
        self.memory = Some(memory.clone());
        true
    }

    /// After `bytes` were transferred.
    fn advance(&mut self, mut bytes: usize) {
        self.offset += bytes as u64;
        self.left_bytes -= bytes;
        while bytes > 0 {
            let iovec = &mut self.iovecs[self.next];
            let step = bytes.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            bytes -= step;
            if iovec.iov_len == 0 {
                self.next += 1;
            }
        }
    }

    fn entry(&self, image: &Image) -> squeue::Entry {
        let file = types::Fd(image.file().as_raw_fd());
        let iovecs = &self.iovecs[self.next.min(self.iovecs.len())..];
        let count = iovecs.len().min(IOVECS_MAX) as u32;
        let write = |flags| {
            opcode::Writev::new(file, iovecs.as_ptr(), count).offset(self.offset).rw_flags(flags).build()
        };
        match self.kind {
            Kind::Read => opcode::Readv::new(file, iovecs.as_ptr(), count).offset(self.offset).build(),
            Kind::Write => write(0),
            Kind::WriteThrough => write(libc::RWF_DSYNC),
            Kind::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }
}

/// The ring with its transfers; `R` is what the worker remembers of each. Made and used by one thread.
pub(crate) struct DiskRing<R> {
    uring: IoUring,
    slots: ManuallyDrop<Vec<Slot<R>>>,
    free: Vec<u16>,
    /// Armed polls, and those that have fired and were not taken.
    armed: [bool; 2],
    fired: [bool; 2],
    completions: Vec<(u64, i32)>,
    // Not registered with the ring: the kernel takes a ring apart some time after its process has ended, and the
    // image's lock would last until then.
    image: Arc<Image>,
}

impl<R> DiskRing<R> {
    /// Call it on the thread that will use the ring.
    ///
    /// # Errors
    /// The kernel has no io_uring for us.
    pub(crate) fn new(image: Arc<Image>) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            // room for every slot, the polls and their removal: the completion queue cannot overflow
            .setup_cqsize(4 * SLOTS as u32)
            .build(2 * SLOTS as u32)?;
        Ok(Self {
            uring,
            slots: ManuallyDrop::new((0..SLOTS).map(|_| Slot::free()).collect()),
            free: (0..SLOTS as u16).rev().collect(),
            armed: [false; 2],
            fired: [false; 2],
            completions: Vec::with_capacity(4 * SLOTS),
            image,
        })
    }

    /// Keeps the kernel's helper threads, which run what would block, on `cores`: away from the worker's own.
    ///
    /// # Errors
    /// The kernel refuses; they may then run anywhere.
    pub(crate) fn keep_helpers_on(&self, cores: &[usize]) -> io::Result<()> {
        // SAFETY: cpu_set_t is plain bits, and none set is a value of it.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for core in cores.iter().filter(|core| **core < libc::CPU_SETSIZE as usize) {
            // SAFETY: `core` is below CPU_SETSIZE.
            unsafe { libc::CPU_SET(*core, &mut set) };
        }
        self.uring.submitter().register_iowq_aff(&set)
    }

    /// Whether another transfer can be started.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Transfers that run.
    pub(crate) fn in_flight(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Starts a read from the image into guest memory. Gives the request back when a segment is not in guest memory.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn read(
        &mut self,
        memory: &Arc<GuestMemory>,
        segments: &[Segment],
        offset: u64,
        request: R,
    ) -> Result<(), R> {
        let slot = self.next_slot();
        if !slot.map(memory, segments) {
            return Err(request);
        }
        slot.segments.clear();
        slot.segments.extend_from_slice(segments);
        self.start(Kind::Read, offset, request);
        Ok(())
    }

    /// Starts a write from guest memory to the image. Gives the request back when a segment is not in guest memory.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn write(
        &mut self,
        memory: &Arc<GuestMemory>,
        segments: &[Segment],
        offset: u64,
        through: bool,
        request: R,
    ) -> Result<(), R> {
        if !self.next_slot().map(memory, segments) {
            return Err(request);
        }
        self.start(if through { Kind::WriteThrough } else { Kind::Write }, offset, request);
        Ok(())
    }

    /// Starts a write of a copy that the guest cannot change.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn write_copy(&mut self, data: Arc<Vec<u8>>, offset: u64, through: bool, request: R) {
        let slot = self.next_slot();
        slot.iovecs.clear();
        // a write only reads it
        slot.iovecs.push(libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() });
        slot.left_bytes = data.len();
        slot.copy = Some(data);
        self.start(if through { Kind::WriteThrough } else { Kind::Write }, offset, request);
    }

    /// Starts to make all writes that have ended durable.
    ///
    /// # Panics
    /// Without room.
    pub(crate) fn sync(&mut self, request: R) {
        let slot = self.next_slot();
        slot.iovecs.clear();
        slot.left_bytes = 0;
        self.start(Kind::Sync, 0, request);
    }

    /// Wakes from sleep once `fd` is readable. Stays until it has fired.
    pub(crate) fn arm(&mut self, wake: Wake, fd: BorrowedFd<'_>) {
        if std::mem::replace(&mut self.armed[wake as usize], true) {
            return;
        }
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32);
        self.push(&poll.build().user_data(wake.user_data()));
    }

    /// Takes back an armed wake, so that its descriptor is not used any more. Only while no transfer runs.
    ///
    /// # Errors
    /// The ring fails.
    pub(crate) fn disarm(&mut self, wake: Wake) -> io::Result<()> {
        assert_eq!(self.in_flight(), 0, "disarm between transfers");
        if self.armed[wake as usize] {
            self.push(&opcode::PollRemove::new(wake.user_data()).build().user_data(IGNORED));
        }
        while self.armed[wake as usize] {
            self.enter(true)?;
            self.complete(|_, _| unreachable!("no transfer runs"));
        }
        self.fired[wake as usize] = false;
        Ok(())
    }

    /// Whether a wake has fired since this was asked last.
    pub(crate) fn take_fired(&mut self, wake: Wake) -> bool {
        std::mem::take(&mut self.fired[wake as usize])
    }

    /// Tells the kernel of all that was started, in one call, and lets it post completions; with `wait`, sleeps until
    /// there is one. Does not call when there is nothing to tell or post.
    ///
    /// # Errors
    /// The ring fails for good.
    pub(crate) fn enter(&mut self, wait: bool) -> io::Result<()> {
        let (submitter, submissions, completions) = self.uring.split();
        let idle = submissions.is_empty() && !submissions.taskrun() && !submissions.cq_overflow();
        if idle && (!wait || !completions.is_empty()) {
            return Ok(());
        }
        match submitter.submit_and_wait(usize::from(wait)) {
            Ok(_) => Ok(()),
            // a signal, or the kernel is short of memory or wants completions taken first: come again
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Hands out the transfers that have ended. A short one is continued.
    pub(crate) fn complete(&mut self, mut ended: impl FnMut(R, io::Result<()>)) {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.uring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (user_data, result) in completions.drain(..) {
            match user_data {
                KICK | ORDER => {
                    let wake = if user_data == KICK { Wake::Kick } else { Wake::Order } as usize;
                    self.armed[wake] = false;
                    self.fired[wake] = true;
                }
                IGNORED => {}
                index => self.transferred(index as u16, result, &mut ended),
            }
        }
        self.completions = completions;
    }

    fn transferred(&mut self, index: u16, result: i32, ended: &mut impl FnMut(R, io::Result<()>)) {
        let slot = &mut self.slots[usize::from(index)];
        let result = match result {
            again if again == -libc::EINTR || again == -libc::EAGAIN => None,
            error if error < 0 => Some(Err(io::Error::from_raw_os_error(-error))),
            0 if slot.left_bytes > 0 => Some(Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "The disk's file is shorter than it was at start",
            ))),
            bytes => {
                slot.advance(bytes as usize);
                (slot.left_bytes == 0).then_some(Ok(()))
            }
        };
        let Some(result) = result else {
            let entry = slot.entry(&self.image).user_data(u64::from(index));
            self.push(&entry);
            return;
        };
        if let (Kind::Read, Some(memory)) = (slot.kind, &slot.memory) {
            // also after an error: some of it may have been written
            for segment in &slot.segments {
                mark_written(memory, segment.address, segment.bytes as usize);
            }
        }
        slot.memory = None;
        slot.copy = None;
        let request = slot.request.take().expect("a completion of a running transfer");
        self.free.push(index);
        ended(request, result);
    }

    fn next_slot(&mut self) -> &mut Slot<R> {
        let index = *self.free.last().expect("has_room was asked");
        &mut self.slots[usize::from(index)]
    }

    fn start(&mut self, kind: Kind, offset: u64, request: R) {
        let index = self.free.pop().expect("has_room was asked");
        let slot = &mut self.slots[usize::from(index)];
        slot.kind = kind;
        slot.offset = offset;
        slot.next = 0;
        slot.request = Some(request);
        let entry = slot.entry(&self.image).user_data(u64::from(index));
        self.push(&entry);
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry of a transfer points to lives in its slot (the iovecs, on the heap) or is kept alive
        // by it (the mapping of guest memory, the copy), and the slot is neither reused nor dropped before the
        // transfer's completion was seen. That others change guest memory meanwhile concerns only bytes that no
        // reference of ours covers. The other entries point to nothing.
        while unsafe { self.uring.submission().push(entry) }.is_err() {
            if let Err(error) = self.uring.submit() {
                // Full, and cannot be emptied: the disk is lost. Fail stop; the peer takes over.
                panic!("io_uring takes no submissions: {error}");
            }
        }
    }
}

impl<R> Drop for DiskRing<R> {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.enter(true).is_err() {
                // the kernel may still use the memory: leak it
                return;
            }
            self.complete(|_, _| {});
        }
        // SAFETY: dropped once, here, and nothing uses the slots afterwards: no transfer runs.
        unsafe { ManuallyDrop::drop(&mut self.slots) };
    }
}
