//! Which requests a queue has taken and not answered, in memory that outlives this process (VHOST_USER_GET_INFLIGHT_FD).
//!
//! The frontend keeps the memory. A back end that was killed is started again, gets it back with SET_INFLIGHT_FD, and
//! submits again what its predecessor had not answered. The layout and the order of the steps are those of the
//! specification, "Inflight I/O tracking", split virtqueue; other back ends can take over from us and we from them.
#![expect(unsafe_code, reason = "views a shared mapping as atomic fields")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};

/// Of the region of one queue: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16.
const HEADER_BYTES: usize = 16;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
/// Of one descriptor: inflight u8, padding [u8; 5], next u16, counter u64.
const ENTRY_BYTES: usize = 16;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

const VERSION: u16 = 1;

/// The memory of all queues of a device.
#[derive(Debug)]
pub struct InflightMemory {
    fd: OwnedFd,
    map: MmapRaw,
    queues: u16,
    entries: u16,
}

impl InflightMemory {
    /// Fresh memory for `queues` queues of at most `entries` entries.
    pub(super) fn create(queues: u16, entries: u16) -> io::Result<Self> {
        let fd = memfd_create("vhost-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, (usize::from(queues) * region_bytes(entries)) as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        Self::map(fd, 0, queues, entries)
    }

    /// The memory at `offset` of a file that the frontend has kept.
    pub(super) fn map(fd: OwnedFd, offset: u64, queues: u16, entries: u16) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let len = usize::from(queues) * region_bytes(entries);
        if len == 0 {
            return Err(invalid(format!("{queues} queues of {entries} entries need no memory")));
        }
        // A mapping past the end of its file kills the process at the first touch.
        let file_bytes = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        if !offset.is_multiple_of(crate::memory::PAGE_BYTES as u64)
            || offset.checked_add(len as u64).is_none_or(|end| end > file_bytes)
        {
            return Err(invalid(format!("{len} bytes at {offset} are not in a file of {file_bytes}")));
        }
        let map = MmapOptions::new().offset(offset).len(len).map_raw(&fd)?;
        Ok(Self { fd, map, queues, entries })
    }

    /// Length in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    pub(super) fn entries(&self) -> u16 {
        self.entries
    }
}

impl AsFd for InflightMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Regions are apart by whole cache lines.
fn region_bytes(entries: u16) -> usize {
    (HEADER_BYTES + usize::from(entries) * ENTRY_BYTES).next_multiple_of(64)
}

/// One queue's part of the memory.
#[derive(Debug)]
pub(super) struct Inflight {
    memory: Arc<InflightMemory>,
    at: usize,
    /// What the next request that is taken is numbered; the order in which a successor submits again.
    counter: u64,
    /// The last one of the batch that is being put together.
    last_batch_head: u16,
}

impl Inflight {
    /// Takes up queue `index`, whose used ring stands at `used_index`. Returns also the heads that were taken and not
    /// answered, in the order in which they were taken. `None`: there is no such queue in the memory.
    pub(super) fn take_up(
        memory: Arc<InflightMemory>,
        index: usize,
        used_index: u16,
    ) -> Option<(Self, Vec<u16>)> {
        if index >= usize::from(memory.queues) {
            return None;
        }
        let at = index * region_bytes(memory.entries);
        let mut inflight = Self { memory, at, counter: 0, last_batch_head: 0 };
        inflight.last_batch_head = inflight.field(LAST_BATCH_HEAD_AT).load(Ordering::Acquire);
        if inflight.field(VERSION_AT).load(Ordering::Acquire) != VERSION {
            inflight.field(ENTRIES_AT).store(inflight.memory.entries, Ordering::Relaxed);
            inflight.field(VERSION_AT).store(VERSION, Ordering::Release);
        }
        // The used index was published, and its process died before it took the batch out of flight.
        let batch = used_index.wrapping_sub(inflight.field(USED_INDEX_AT).load(Ordering::Acquire));
        let mut head = inflight.last_batch_head;
        for _ in 0..batch.min(inflight.memory.entries) {
            if head >= inflight.memory.entries {
                break;
            }
            inflight.flag(head).store(0, Ordering::Release);
            head = inflight.next(head).load(Ordering::Acquire);
        }
        inflight.field(USED_INDEX_AT).store(used_index, Ordering::Release);

        let mut taken: Vec<(u64, u16)> = (0..inflight.memory.entries)
            .filter(|head| inflight.flag(*head).load(Ordering::Acquire) == 1)
            .map(|head| (inflight.count(head).load(Ordering::Relaxed), head))
            .collect();
        taken.sort_unstable();
        inflight.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some((inflight, taken.into_iter().map(|(_, head)| head).collect()))
    }

    /// A request was taken from the available ring.
    #[inline]
    pub(super) fn taken(&mut self, head: u16) {
        self.count(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// It is put back, as if it had not been taken.
    pub(super) fn put_back(&mut self, head: u16) {
        self.flag(head).store(0, Ordering::Release);
    }

    /// A request was put into the used ring, whose index is not published yet.
    #[inline]
    pub(super) fn used(&mut self, head: u16) {
        self.next(head).store(self.last_batch_head, Ordering::Relaxed);
        self.last_batch_head = head;
        self.field(LAST_BATCH_HEAD_AT).store(head, Ordering::Release);
    }

    /// The used ring's index was published as `used_index`, with the last `batch` of what was given to
    /// [`Inflight::used`].
    #[inline]
    pub(super) fn published(&mut self, used_index: u16, batch: u16) {
        let mut head = self.last_batch_head;
        for _ in 0..batch {
            self.flag(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
            if head >= self.memory.entries {
                // only a frontend that writes here itself can bring this about
                break;
            }
        }
        self.field(USED_INDEX_AT).store(used_index, Ordering::Release);
    }

    fn entry(&self, head: u16, offset: usize) -> *mut u8 {
        assert!(head < self.memory.entries, "a head of this queue");
        let at = self.at + HEADER_BYTES + usize::from(head) * ENTRY_BYTES + offset;
        self.memory.map.as_mut_ptr().wrapping_add(at)
    }

    fn field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: one of the header's even offsets, in the region of a queue that exists; the mapping is page-aligned,
        // regions are apart by 64 bytes, and only atomics touch it.
        unsafe { AtomicU16::from_ptr(self.memory.map.as_mut_ptr().wrapping_add(self.at + offset).cast()) }
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        // SAFETY: `entry` is inside the mapping; only atomics touch it.
        unsafe { AtomicU8::from_ptr(self.entry(head, 0)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: as above, aligned to 2 bytes.
        unsafe { AtomicU16::from_ptr(self.entry(head, NEXT_AT).cast()) }
    }

    fn count(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as above, aligned to 8 bytes.
        unsafe { AtomicU64::from_ptr(self.entry(head, COUNTER_AT).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ENTRIES: u16 = 8;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// Takes a head, if it is free.
        Take(u16),
        /// Answers one that was taken.
        Answer(u16),
        /// Publishes the used index; the process may die right after.
        Publish {
            dies: bool,
        },
        Dies,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..ENTRIES).prop_map(Step::Take),
            4 => (0..ENTRIES).prop_map(Step::Answer),
            2 => any::<bool>().prop_map(|dies| Step::Publish { dies }),
            1 => Just(Step::Dies),
        ]
    }

    proptest! {
        /// Whenever a process dies, its successor finds what was taken and whose answer the driver cannot see.
        #[test]
        fn a_successor_finds_exactly_what_is_unanswered(steps in prop::collection::vec(step(), 0..200)) {
            let memory = Arc::new(InflightMemory::create(2, ENTRIES).unwrap());
            let (mut inflight, none) = Inflight::take_up(memory.clone(), 1, 0).unwrap();
            prop_assert!(none.is_empty());
            // the used ring in guest memory, and what was put there and not published
            let (mut used, mut batch) = (0u16, Vec::new());
            let mut taken: Vec<u16> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(head) if !taken.contains(&head) => {
                        inflight.taken(head);
                        taken.push(head);
                    }
                    Step::Answer(at) if !taken.is_empty() => {
                        let head = taken[usize::from(at) % taken.len()];
                        if !batch.contains(&head) {
                            inflight.used(head);
                            batch.push(head);
                        }
                    }
                    Step::Take(_) | Step::Answer(_) => {}
                    Step::Publish { dies } => {
                        used = used.wrapping_add(batch.len() as u16);
                        taken.retain(|head| !batch.contains(head));
                        if dies {
                            batch.clear();
                            let (next, again) = Inflight::take_up(memory.clone(), 1, used).unwrap();
                            prop_assert_eq!(&again, &taken);
                            inflight = next;
                        } else {
                            inflight.published(used, batch.len() as u16);
                            batch.clear();
                        }
                    }
                    Step::Dies => {
                        batch.clear();
                        let (next, again) = Inflight::take_up(memory.clone(), 1, used).unwrap();
                        prop_assert_eq!(&again, &taken);
                        inflight = next;
                    }
                }
            }
        }

        #[test]
        fn no_content_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 64..400), used in any::<u16>()) {
            let fd = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, 4096).unwrap();
            rustix::io::pwrite(&fd, &bytes, 0).unwrap();
            let memory = Arc::new(InflightMemory::map(fd, 0, 1, ENTRIES).unwrap());
            let (mut inflight, again) = Inflight::take_up(memory, 0, used).unwrap();
            prop_assert!(again.len() <= usize::from(ENTRIES));
            inflight.used(3);
            inflight.published(used.wrapping_add(5), 5);
        }
    }

    #[test]
    fn memory_that_is_too_short_is_refused() {
        let memory = InflightMemory::create(1, ENTRIES).unwrap();
        let fd = || memory.as_fd().try_clone_to_owned().unwrap();
        assert!(InflightMemory::map(fd(), 0, 2, ENTRIES).is_err());
        assert!(InflightMemory::map(fd(), 4096, 1, ENTRIES).is_err());
        assert!(InflightMemory::map(fd(), 0, 0, ENTRIES).is_err());
        let memory = Arc::new(InflightMemory::map(fd(), 0, 1, ENTRIES).unwrap());
        assert!(Inflight::take_up(memory, 1, 0).is_none());
    }
}
