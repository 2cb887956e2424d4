//! One virtqueue, split layout (virtio 1.2 §2.7), as a device's worker uses it.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::{ChainError, check_chain};
use crate::memory::GuestMemory;

/// A request of the guest: well formed when it was popped, every buffer inside guest memory.
pub type Chain = DescriptorChain<Arc<GuestMemory>>;

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
}

/// Why a ring cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Size or alignment (virtio 1.2 §2.7).
    #[error("Queue {index}: size {size} or an address is against the rules of virtio: {error}")]
    Layout {
        /// The queue.
        index: usize,
        /// Its size.
        size: u16,
        /// What virtio-queue says.
        error: virtio_queue::Error,
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
#[derive(Debug)]
pub struct Ring {
    index: usize,
    queue: Queue,
    memory: Arc<GuestMemory>,
    kick: Arc<OwnedFd>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    broken_rings: Arc<AtomicU64>,
    broken: bool,
    unsignalled: bool,
}

impl Ring {
    /// Checks the layout and takes up where the used ring in guest memory stands.
    ///
    /// # Errors
    /// The layout is malformed or outside of guest memory.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let RingSetup { index, size, memory, .. } = setup;
        let layout = |error| RingError::Layout { index, size, error };
        let mut queue = Queue::new(size).map_err(layout)?;
        queue.try_set_desc_table_address(setup.descriptors).map_err(layout)?;
        queue.try_set_avail_ring_address(setup.available).map_err(layout)?;
        queue.try_set_used_ring_address(setup.used).map_err(layout)?;
        let entries = usize::from(size);
        for (part, at, bytes) in [
            ("descriptor table", setup.descriptors, size_of::<RawDescriptor>() * entries),
            ("available ring", setup.available, 6 + 2 * entries),
            ("used ring", setup.used, 6 + 8 * entries),
        ] {
            if !memory.check_range(at, bytes) {
                return Err(RingError::Memory { index, part });
            }
        }
        let used: u16 = memory
            .read_obj(GuestAddress(setup.used.0 + 2))
            .map_err(|_| RingError::Memory { index, part: "used ring" })?;
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.next_available);
        queue.set_next_used(u16::from_le(used));
        queue.set_ready(true);
        let kick = match setup.kick {
            Some(kick) => kick,
            None => Arc::new(polling_timer().map_err(|error| RingError::Io { index, error })?),
        };
        Ok(Self {
            index,
            queue,
            memory,
            kick,
            call: setup.call,
            error: setup.error,
            broken_rings: setup.broken_rings,
            broken: false,
            unsignalled: false,
        })
    }

    /// Readable when the driver has kicked.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Forgets the kicks so far. Does not block.
    pub fn drain_kick(&self) {
        let _ = rustix::io::read(&*self.kick, &mut [0u8; 8]);
    }

    /// The memory that the ring's addresses are in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Index of the next available entry that `pop` would take.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Whether the guest has broken the ring. It then gives nothing and takes nothing until the driver resets it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether `pop` would find a request.
    pub fn has_available(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.avail_idx(&*self.memory, Ordering::Acquire) {
            Ok(index) => index.0 != self.queue.next_avail(),
            Err(error) => {
                self.break_ring(&error.to_string());
                false
            }
        }
    }

    /// Takes the next request. A malformed one breaks the ring.
    pub fn pop(&mut self) -> Option<Chain> {
        if !self.has_available() {
            return None;
        }
        let popped = self.queue.iter(self.memory.clone()).map(|mut available| available.next());
        match popped {
            Ok(Some(chain)) => match self.check(&chain) {
                Ok(()) => Some(chain),
                Err(error) => {
                    self.break_ring(&error.to_string());
                    None
                }
            },
            Ok(None) => {
                self.break_ring("The available ring cannot be read");
                None
            }
            Err(error) => {
                self.break_ring(&error.to_string());
                None
            }
        }
    }

    /// Puts the last popped request back, untouched.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Tells the driver that a request is done and that `bytes` were written to its writable part. All writes to guest
    /// memory for it must have been made, and marked where the kernel made them ([`crate::memory::mark_written`]).
    pub fn add_used(&mut self, head: u16, bytes: u32) {
        if self.broken {
            return;
        }
        self.unsignalled = true;
        if let Err(error) = self.queue.add_used(&*self.memory, head, bytes) {
            self.break_ring(&error.to_string());
        }
    }

    /// Signals the driver if it wants to know of what was used since the last call.
    pub fn signal_used(&mut self) {
        if !std::mem::take(&mut self.unsignalled) {
            return;
        }
        match self.wants_signal() {
            Ok(true) => signal(self.call.as_deref()),
            Ok(false) => {}
            Err(error) => self.break_ring(&error.to_string()),
        }
    }

    /// Asks the driver to kick for the next request. Returns true when there is one already: look again before sleeping.
    pub fn enable_notification(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.queue.enable_notification(&*self.memory).unwrap_or_else(|error| {
            self.break_ring(&error.to_string());
            false
        })
    }

    /// Asks the driver not to kick while the worker polls.
    pub fn disable_notification(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&*self.memory)
        {
            self.break_ring(&error.to_string());
        }
    }

    /// Gives the ring up because of something that the guest did. Only the first ones of a process are logged.
    pub fn break_ring(&mut self, why: &str) {
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

    fn check(&self, chain: &Chain) -> Result<(), ChainError> {
        let table = GuestAddress(self.queue.desc_table());
        check_chain(&self.memory, table, self.queue.size(), chain.head_index())
    }

    fn wants_signal(&mut self) -> Result<bool, virtio_queue::Error> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(&*self.memory);
        }
        // the used index must be visible before the driver's wish is read (virtio 1.2 §2.7.7.2)
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
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
