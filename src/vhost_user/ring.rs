//! One virtqueue, split layout (virtio 1.2 §2.7), as a device's worker uses it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::GuestAddress;

use super::chain::Chain;
use super::inflight::{Inflight, InflightMemory};
use super::split::SplitQueue;
use crate::memory::{GuestMemory, HostMap};

/// How many chains ahead the first descriptor is fetched into the cache, where the driver's processor has it; and what
/// that points to, a header or an indirect table, half as far ahead.
const PREFETCH: u16 = 8;

/// What a ring is made of. Addresses are the guest's.
#[derive(Debug)]
pub struct RingSetup {
    /// Which queue of the device it is, for messages.
    pub index: usize,
    /// Entries, a power of two up to 32768.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: GuestAddress,
    /// Available ring.
    pub available: GuestAddress,
    /// Used ring; it also says how many requests were used so far.
    pub used: GuestAddress,
    /// The first available entry to take.
    pub next_available: u16,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The memory that the addresses are in.
    pub memory: Arc<GuestMemory>,
    /// What the driver kicks. Without one the ring is polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// What the driver wants to be signalled by.
    pub call: Option<Arc<OwnedFd>>,
    /// What the frontend wants to be told of a broken ring by.
    pub error: Option<Arc<OwnedFd>>,
    /// Counts the rings that the guest broke.
    pub broken_rings: Arc<AtomicU64>,
    /// Where to keep what is in flight, if the frontend keeps it for us.
    pub inflight: Option<Arc<InflightMemory>>,
}

/// Why a ring cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Size or alignment (virtio 1.2 §2.7).
    #[error("Queue {index} with {size} entries is against the rules of virtio: {what}")]
    Layout {
        /// The queue.
        index: usize,
        /// Its size.
        size: u16,
        /// Which rule.
        what: &'static str,
    },
    /// A part of the ring is not in guest memory.
    #[error("Queue {index}: its {part} is not in guest memory")]
    Memory {
        /// The queue.
        index: usize,
        /// Which part.
        part: &'static str,
    },
    /// No timer for a ring without a kick.
    #[error("Queue {index}: {error}")]
    Io {
        /// The queue.
        index: usize,
        /// What the system says.
        error: io::Error,
    },
}

/// A ring that is running. Dropping it gives it back to the server.
///
/// Taking requests and answering them are each done in batches: [`Ring::add_used`] only notes an answer,
/// [`Ring::publish_used`] makes all noted ones the driver's, and [`Ring::signal_used`] also tells it.
#[derive(Debug)]
pub struct Ring {
    index: usize,
    queue: SplitQueue,
    event_idx: bool,
    /// The next available entry to take.
    next_available: u16,
    /// The driver's available index, as it was seen last.
    available: u16,
    /// The next used entry to write.
    next_used: u16,
    /// The used index as the driver sees it, and as it was when the driver was signalled or passed over last.
    published: u16,
    signalled: u16,
    inflight: Option<Inflight>,
    /// Heads that a process before this one had taken, the first to be taken last.
    again: Vec<u16>,
    /// The last pop came from there.
    was_again: bool,
    kick: Arc<OwnedFd>,
    polled: bool,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    broken_rings: Arc<AtomicU64>,
    broken: bool,
}

impl Ring {
    /// Checks the layout and takes up where the used ring in guest memory stands.
    ///
    /// # Errors
    /// The layout is malformed or outside of guest memory.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let (index, size) = (setup.index, setup.size);
        let queue = SplitQueue::new(&setup, Arc::new(HostMap::new(setup.memory.clone())))?;
        let used = queue.used_index();
        let mut next_available = setup.next_available;
        let (mut inflight, mut again) = (None, Vec::new());
        if let Some(memory) = setup.inflight {
            let what = "it is not covered by the memory of SET_INFLIGHT_FD";
            let refused = RingError::Layout { index, size, what };
            if size > memory.entries() {
                return Err(refused);
            }
            let (taken_up, mut heads) = Inflight::take_up(memory, index, used).ok_or(refused)?;
            if !heads.is_empty() {
                // what was taken is what was answered and what was not
                next_available = used.wrapping_add(heads.len() as u16);
                tracing::info!(
                    "Queue {index}: {} requests of a process before this one are done again",
                    heads.len()
                );
            }
            heads.reverse();
            // it may have died between publishing and signalling
            signal(setup.call.as_deref());
            (inflight, again) = (Some(taken_up), heads);
        }
        let polled = setup.kick.is_none();
        let kick = match setup.kick {
            Some(kick) => kick,
            None => Arc::new(polling_timer().map_err(|error| RingError::Io { index, error })?),
        };
        Ok(Self {
            index,
            queue,
            event_idx: setup.event_idx,
            next_available,
            available: next_available,
            next_used: used,
            published: used,
            signalled: used,
            inflight,
            again,
            was_again: false,
            kick,
            polled,
            call: setup.call,
            error: setup.error,
            broken_rings: setup.broken_rings,
            broken: false,
        })
    }

    /// Readable when the driver has kicked.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Whether the frontend does not kick: what is readable then is a timer, which ticks on only when it is drained.
    pub fn is_polled(&self) -> bool {
        self.polled
    }

    /// Forgets the kicks so far. Does not block.
    pub fn drain_kick(&self) {
        let _ = rustix::io::read(&*self.kick, &mut [0u8; 8]);
    }

    /// The memory that the ring's addresses are in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.queue.map().memory()
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Index of the next available entry that `pop` would take.
    pub fn next_avail(&self) -> u16 {
        self.next_available
    }

    /// Whether the guest has broken the ring. It then gives nothing and takes nothing until the driver resets it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether there are requests that a process before this one had taken. They come first, and a ring that is given
    /// back with some of them leaves them to the next process that gets the same inflight memory.
    pub fn has_again(&self) -> bool {
        !self.broken && !self.again.is_empty()
    }

    /// To be called a while before the ring is looked at again: fetches what is looked at first into the cache.
    #[inline]
    pub fn prefetch(&self) {
        self.queue.prefetch_available(self.next_available);
    }

    /// Whether `pop` would find a request.
    #[inline]
    pub fn has_available(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.available != self.next_available || !self.again.is_empty() || self.look()
    }

    /// Looks whether the driver has made more available.
    #[inline]
    fn look(&mut self) -> bool {
        self.available = self.queue.available_index();
        let more = self.available.wrapping_sub(self.next_available);
        if more > self.queue.size() {
            self.break_ring(&format!("The available index claims {more} requests"));
            return false;
        }
        if more > 0 {
            // the chains of a batch come from the driver's cache: fetch them while the first is worked on
            for ahead in 0..more.min(PREFETCH) {
                let head = self.queue.available_head(self.next_available.wrapping_add(ahead));
                self.queue.table().prefetch(head);
            }
            for near in 0..more.min(PREFETCH / 2) {
                let head = self.queue.available_head(self.next_available.wrapping_add(near));
                self.queue.table().prefetch_buffer(self.queue.map(), head);
            }
        }
        more > 0
    }

    /// Takes the next request into `chain`. A malformed one breaks the ring.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if !self.has_available() {
            return false;
        }
        self.was_again = !self.again.is_empty();
        let head = match self.again.pop() {
            Some(head) => head,
            None => {
                let head = self.queue.available_head(self.next_available);
                let ahead = self.next_available.wrapping_add(PREFETCH);
                if self.available.wrapping_sub(ahead) as i16 > 0 {
                    self.queue.table().prefetch(self.queue.available_head(ahead));
                }
                let near = self.next_available.wrapping_add(PREFETCH / 2);
                if self.available.wrapping_sub(near) as i16 > 0 {
                    self.queue.table().prefetch_buffer(self.queue.map(), self.queue.available_head(near));
                }
                self.next_available = self.next_available.wrapping_add(1);
                head
            }
        };
        if let Err(error) = chain.read(self.queue.map(), self.queue.table(), head) {
            self.break_ring(&error.to_string());
            return false;
        }
        if let Some(inflight) = self.inflight.as_mut().filter(|_| !self.was_again) {
            inflight.taken(head);
        }
        true
    }

    /// Puts the request that was popped last back, untouched. On a ring without inflight memory it may be called again for
    /// the one popped before, and so on.
    pub fn undo_pop(&mut self, chain: &Chain) {
        if self.was_again {
            self.again.push(chain.head());
            return;
        }
        self.next_available = self.next_available.wrapping_sub(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.put_back(chain.head());
        }
    }

    /// Notes that a request is done and that `bytes` were written to its writable part. All writes to guest memory
    /// for it must have been made, and marked where the kernel made them ([`Chain::mark_written`]).
    #[inline]
    pub fn add_used(&mut self, head: u16, bytes: u32) {
        if self.broken {
            return;
        }
        self.queue.put_used(self.next_used, head, bytes);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.used(head);
        }
    }

    /// Makes all that was noted the driver's.
    #[inline]
    pub fn publish_used(&mut self) {
        let batch = self.next_used.wrapping_sub(self.published);
        if batch == 0 || self.broken {
            return;
        }
        self.queue.publish_used(self.published, self.next_used);
        self.published = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used, batch);
        }
    }

    /// Publishes, and signals the driver if it wants to know of what was published since the last call.
    pub fn signal_used(&mut self) {
        self.publish_used();
        if self.signalled == self.published {
            return;
        }
        // the used index must be visible before the driver's wish is read (§2.7.7.2, §2.7.10)
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let since = self.published.wrapping_sub(self.signalled);
            self.published.wrapping_sub(self.queue.used_event()).wrapping_sub(1) < since
        } else {
            u32::from(self.queue.available_flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.signalled = self.published;
        if wanted {
            signal(self.call.as_deref());
        }
    }

    /// Asks the driver to kick for the next request. Returns true when there is one already: look again before sleeping.
    pub fn enable_notification(&mut self) -> bool {
        if self.broken {
            return false;
        }
        if self.event_idx {
            self.queue.set_available_event(self.next_available);
        } else {
            self.queue.set_used_flags(0);
        }
        // the wish must be visible before the index is read (§2.7.10)
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Asks the driver not to kick while the worker polls. With EVENT_IDX there is no need to: it kicks once for the
    /// index that was asked for last.
    pub fn disable_notification(&mut self) {
        if !self.broken && !self.event_idx {
            self.queue.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Gives the ring up because of something that the guest did. Only the first ones of a process are logged.
    #[cold]
    pub fn break_ring(&mut self, why: &str) {
        // what was answered before is the driver's; unpublished it would be in its memory, and in no dirty log
        self.publish_used();
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        let count = self.broken_rings.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(
                "Queue {}: the guest broke the ring ({count} so far); its driver must reset the device: {why}",
                self.index
            );
        }
        signal(self.error.as_deref());
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // the next ring on this memory starts counting anew and would not know of these
        self.signal_used();
    }
}

/// Adds one to an eventfd. One that is full has not been read yet: its owner will look.
pub(super) fn signal(fd: Option<&OwnedFd>) {
    if let Some(fd) = fd {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}

/// What stands for the kick of a frontend that wants its ring polled: ticks often enough for it to seem so.
fn polling_timer() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let tick = Timespec { tv_sec: 0, tv_nsec: 100_000 };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: tick, it_value: tick })?;
    Ok(timer)
}
