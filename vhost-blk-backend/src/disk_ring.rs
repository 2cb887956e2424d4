//! The io_uring of one worker: transfers between guest memory and the image, and what wakes the worker.
#![expect(
    unsafe_code,
    reason = "hands the kernel addresses that it reads and writes while an operation runs"
)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use colo::vhost_user::Chain;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::image::Image;
use crate::transfer::{Next, Transfer};

/// The most transfers at once; further requests stay in the guest's rings.
const SLOTS: usize = 256;

/// The most that copies of the guest's data may take for one worker; a transfer that has begun may be more. What is beyond
/// stays in the guest's rings, so that no guest makes us keep more memory than this.
const COPIED_BYTES_MAX: usize = 32 << 20;

/// The most helper threads of the kernel for one worker: what would block (a flush, a discard, a file system that
/// cannot do without) waits there.
const HELPERS_MAX: u32 = 8;

/// So many ended transfers are handed out at once: the driver's answer to the first is then on its way to the disk while
/// the last are still in hand.
const BATCH: usize = 8;

/// What can end the worker's sleep besides a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    Order,
    /// A kick of one of the worker's queues.
    Kick(usize),
}

const WAKES: u64 = 1 << 32;
const IGNORED: u64 = u64::MAX;

impl Wake {
    fn index(self) -> usize {
        match self {
            Self::Order => 0,
            Self::Kick(queue) => queue + 1,
        }
    }

    fn user_data(self) -> u64 {
        WAKES + self.index() as u64
    }
}

struct Slot<R> {
    request: Option<R>,
    transfer: Transfer,
}

/// The ring with its transfers; `R` is what the worker remembers of each. Made and used by one thread.
pub(crate) struct DiskRing<R> {
    uring: IoUring,
    slots: ManuallyDrop<Vec<Slot<R>>>,
    free: Vec<u16>,
    /// In copies of the transfers that run.
    copied_bytes: usize,
    /// Polls, by [`Wake::index`]: armed, and those that have fired and were not taken.
    armed: Vec<bool>,
    fired: Vec<bool>,
    completions: Vec<(u64, i32, u32)>,
    // Not registered with the ring: the kernel takes a ring apart some 30 ms after its process was killed, and the
    // image's lock would last until then instead of 1 to 8 ms. A registered file gains nothing that could be measured
    // (random reads of 4 KiB from a disk with O_DIRECT at depth 32 and 128: the same rate, the same processor time).
    image: Arc<Image>,
}

impl<R> DiskRing<R> {
    /// For a worker of `queues` queues. Call it on the thread that will use the ring.
    ///
    /// # Errors
    /// The kernel has no io_uring for us.
    pub(crate) fn new(image: Arc<Image>, queues: usize) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            // room for every slot, the polls and their removal; a kick that finds no place is kept by the kernel
            .setup_cqsize((4 * (SLOTS + queues)).next_power_of_two() as u32)
            .build((2 * SLOTS) as u32)?;
        uring.submitter().register_iowq_max_workers(&mut [HELPERS_MAX, HELPERS_MAX])?;
        let slot = || Slot { request: None, transfer: Transfer::new() };
        Ok(Self {
            uring,
            slots: ManuallyDrop::new(std::iter::repeat_with(slot).take(SLOTS).collect()),
            free: (0..SLOTS as u16).rev().collect(),
            copied_bytes: 0,
            armed: vec![false; queues + 1],
            fired: vec![false; queues + 1],
            completions: Vec::with_capacity(4 * SLOTS),
            image,
        })
    }

    /// Keeps the kernel's helper threads on `cores`: away from the worker's own.
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
        !self.free.is_empty() && self.copied_bytes < COPIED_BYTES_MAX
    }

    /// Transfers that run.
    pub(crate) fn in_flight(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// The transfer that [`DiskRing::start`] will start next, to be filled in.
    ///
    /// # Panics
    /// Without room.
    #[inline]
    pub(crate) fn next(&mut self) -> &mut Transfer {
        let index = *self.free.last().expect("has_room was asked");
        &mut self.slots[usize::from(index)].transfer
    }

    /// Starts the transfer that was filled in.
    ///
    /// # Panics
    /// Without room.
    #[inline]
    pub(crate) fn start(&mut self, request: R) {
        let index = self.free.pop().expect("has_room was asked");
        let slot = &mut self.slots[usize::from(index)];
        slot.request = Some(request);
        self.copied_bytes += slot.transfer.copied_bytes();
        let entry = slot.transfer.entry(&self.image).user_data(u64::from(index));
        self.push(&entry);
    }

    /// Forgets the guest's memory that ended transfers have used. Only while none runs.
    pub(crate) fn forget_memory(&mut self) {
        assert_eq!(self.in_flight(), 0, "memory is forgotten between transfers");
        for slot in self.slots.iter_mut() {
            slot.transfer.chain.clear();
        }
    }

    /// Wakes from sleep when `fd` becomes readable, again and again until it is disarmed.
    pub(crate) fn arm(&mut self, wake: Wake, fd: BorrowedFd<'_>) {
        if std::mem::replace(&mut self.armed[wake.index()], true) {
            return;
        }
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).multi(true);
        self.push(&poll.build().user_data(wake.user_data()));
    }

    pub(crate) fn is_armed(&self, wake: Wake) -> bool {
        self.armed[wake.index()]
    }

    /// Begins to take back an armed wake. Its descriptor is in use until [`DiskRing::is_armed`] denies it.
    pub(crate) fn disarm(&mut self, wake: Wake) {
        if self.armed[wake.index()] {
            // not PollRemove, which leaves alone a poll that is just firing
            self.push(&opcode::AsyncCancel::new(wake.user_data()).build().user_data(IGNORED));
        }
    }

    /// Whether a wake has fired that was not taken.
    pub(crate) fn has_fired(&self, wake: Wake) -> bool {
        self.fired[wake.index()]
    }

    /// Whether a wake has fired since this was asked last.
    pub(crate) fn take_fired(&mut self, wake: Wake) -> bool {
        std::mem::take(&mut self.fired[wake.index()])
    }

    /// Tells the kernel of all that was started, in one call, and lets it post completions; with `wait`, sleeps until
    /// there is one. Does not call when there is nothing to tell or post.
    ///
    /// # Errors
    /// The ring fails for good.
    #[inline]
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

    /// Hands out the transfers that have ended, what was read being in guest memory and marked. A short one is
    /// continued.
    #[inline]
    pub(crate) fn complete(&mut self, mut ended: impl FnMut(R, &Chain, io::Result<()>)) {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(
            self.uring
                .completion()
                .take(BATCH)
                .map(|entry| (entry.user_data(), entry.result(), entry.flags())),
        );
        for (user_data, result, flags) in completions.drain(..) {
            match user_data {
                IGNORED => {}
                wake if wake >= WAKES => {
                    let index = (wake - WAKES) as usize;
                    self.armed[index] = cqueue::more(flags);
                    self.fired[index] = true;
                }
                index => self.stepped(index as u16, result, &mut ended),
            }
        }
        self.completions = completions;
    }

    fn stepped(&mut self, index: u16, result: i32, ended: &mut impl FnMut(R, &Chain, io::Result<()>)) {
        let slot = &mut self.slots[usize::from(index)];
        match slot.transfer.stepped(result) {
            Next::Step => {
                let entry = slot.transfer.entry(&self.image).user_data(u64::from(index));
                self.push(&entry);
            }
            Next::Ended(result) => {
                self.copied_bytes -= slot.transfer.copied_bytes();
                slot.transfer.finish();
                let request = slot.request.take().expect("a completion of a running transfer");
                self.free.push(index);
                ended(request, &slot.transfer.chain, result);
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry of a transfer points to lives in its slot (the iovecs and copies, on the heap) or is
        // kept mapped by it (guest memory, by the chain), or is static (the zeros). The slot is neither reused nor
        // dropped before the transfer's completion was seen. That others change guest memory meanwhile concerns only
        // bytes that no reference of ours covers. The other entries point to nothing.
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
            self.complete(|_, _, _| {});
        }
        // SAFETY: dropped once, here, and nothing uses the slots afterwards: no transfer runs.
        unsafe { ManuallyDrop::drop(&mut self.slots) };
    }
}
