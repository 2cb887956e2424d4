//! Which log learns of a write to guest memory: the controller's, the vhost-user frontend's, both or none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{DirtyLog, GuestMemory, PAGE_BYTES};

const CONTROL: u8 = 1;
const FRONTEND: u8 = 2;

/// The logs of one device server. All regions look here at every write, so that arming reaches those mapped before
/// and after alike. Clones are the same logs.
#[derive(Clone, Debug, Default)]
pub struct DirtyLogs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    // What a write looks at first: one load when nothing is armed.
    armed: AtomicU8,
    control: ArcSwapOption<DirtyLog>,
    frontend: ArcSwapOption<DirtyLog>,
    missed: AtomicU64,
}

impl DirtyLogs {
    /// Nothing is armed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Arms or disarms the controller's log, whose pages are those of the file of guest RAM.
    pub fn set_control(&self, log: Option<DirtyLog>) {
        Self::set(&self.shared.armed, CONTROL, &self.shared.control, log.map(Arc::new));
    }

    /// Arms or disarms the vhost-user frontend's log (`SET_LOG_BASE`), whose pages are guest-physical.
    pub(crate) fn set_frontend(&self, log: Option<Arc<DirtyLog>>) {
        Self::set(&self.shared.armed, FRONTEND, &self.shared.frontend, log);
    }

    /// How many writes fell past the end of an armed log, and are lost to it. More than none means that the log was
    /// made for less memory than the guest has.
    pub fn missed(&self) -> u64 {
        self.shared.missed.load(Ordering::Relaxed)
    }

    /// Whether anybody logs writes: one load.
    #[inline]
    pub(crate) fn armed(&self) -> bool {
        self.shared.armed.load(Ordering::Acquire) != 0
    }

    fn set(armed: &AtomicU8, bit: u8, slot: &ArcSwapOption<DirtyLog>, log: Option<Arc<DirtyLog>>) {
        if log.is_some() {
            slot.store(log);
            armed.fetch_or(bit, Ordering::SeqCst);
        } else {
            armed.fetch_and(!bit, Ordering::SeqCst);
            slot.store(None);
        }
    }
}

/// The bitmap of one region of guest memory, in the sense of vm-memory: it knows where the region lies in the file of
/// guest RAM and in the guest, and passes marks on to the logs that are armed.
#[derive(Debug, Default)]
pub struct RegionLog {
    logs: DirtyLogs,
    file_offset: u64,
    guest_address: u64,
}

impl RegionLog {
    pub(super) fn new(logs: DirtyLogs, file_offset: u64, guest_address: u64) -> Self {
        Self { logs, file_offset, guest_address }
    }

    #[cold]
    fn mark_armed(&self, armed: u8, offset: usize, len: usize) {
        let shared = &self.logs.shared;
        let last = (offset as u64).saturating_add(len as u64 - 1);
        let mark = |slot: &ArcSwapOption<DirtyLog>, base: u64| {
            let page = |at: u64| base.saturating_add(at) / PAGE_BYTES as u64;
            if let Some(log) = &*slot.load()
                && !log.mark_range(page(offset as u64), page(last))
            {
                shared.missed.fetch_add(1, Ordering::Relaxed);
            }
        };
        if armed & CONTROL != 0 {
            mark(&shared.control, self.file_offset);
        }
        if armed & FRONTEND != 0 {
            mark(&shared.frontend, self.guest_address);
        }
    }
}

impl Bitmap for RegionLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        let armed = self.logs.shared.armed.load(Ordering::Acquire);
        if armed != 0 && len != 0 {
            self.mark_armed(armed, offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let marked = |slot: &ArcSwapOption<DirtyLog>, base: u64| {
            slot.load().as_ref().is_some_and(|log| log.is_marked((base + offset as u64) / PAGE_BYTES as u64))
        };
        let shared = &self.logs.shared;
        marked(&shared.control, self.file_offset) || marked(&shared.frontend, self.guest_address)
    }

    fn slice_at(&self, offset: usize) -> RegionLogSlice<'_> {
        RegionLogSlice { log: self, offset }
    }
}

impl NewBitmap for RegionLog {
    /// A region whose writes nobody logs, for memory that is made for a test.
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = RegionLogSlice<'a>;
}

/// The part of a [`RegionLog`] from some offset on.
#[derive(Clone, Copy, Debug)]
pub struct RegionLogSlice<'a> {
    log: &'a RegionLog,
    offset: usize,
}

impl RegionLogSlice<'_> {
    /// The logs that marks are passed on to.
    pub(super) fn logs(&self) -> &DirtyLogs {
        &self.log.logs
    }
}

impl WithBitmapSlice<'_> for RegionLogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for RegionLogSlice<'_> {}

impl Bitmap for RegionLogSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        // the access that is marked here was in bounds, so this cannot wrap
        self.log.mark_dirty(self.offset.wrapping_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.offset.wrapping_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { log: self.log, offset: self.offset.wrapping_add(offset) }
    }
}

/// Marks bytes that the kernel has written for us (io_uring), past every bitmap. To be called when the completion is
/// seen and before the guest is told. Addresses outside of guest memory are ignored.
pub fn mark_written(memory: &GuestMemory, start: GuestAddress, bytes: usize) {
    let mut at = start;
    let mut left = bytes as u64;
    while left > 0 {
        let Some(region) = memory.find_region(at) else {
            return;
        };
        let offset = at.unchecked_offset_from(region.start_addr());
        let here = left.min(region.len() - offset);
        region.bitmap().mark_dirty(offset as usize, here as usize);
        left -= here;
        let Some(next) = at.checked_add(here) else {
            return;
        };
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::{MemoryTable, PageSet, Region};
    use super::*;

    /// Two regions of eight pages each, at 0 and 1 MiB, from file pages 8..16 and 0..8.
    fn table(logs: &DirtyLogs) -> MemoryTable {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 16 * 4096).unwrap();
        let region = |guest_address, mmap_offset| Region {
            guest_address,
            bytes: 8 * 4096,
            user_address: guest_address,
            mmap_offset,
            file: file.try_clone().unwrap(),
        };
        let mut table = MemoryTable::new(logs.clone());
        table.replace(vec![region(0, 8 * 4096), region(1 << 20, 0)]).unwrap();
        table
    }

    fn drain(log: &DirtyLog) -> Vec<u64> {
        let mut set = PageSet::new(log.pages());
        log.drain(&mut set);
        set.iter().collect()
    }

    #[test]
    fn each_log_has_its_own_numbering_and_switches_alone() {
        let logs = DirtyLogs::new();
        let memory = table(&logs).memory().clone();
        memory.write_obj(1u64, GuestAddress(0)).unwrap();

        let control = DirtyLog::create(16).unwrap();
        logs.set_control(Some(
            DirtyLog::from_fd(rustix::io::fcntl_dupfd_cloexec(&control, 0).unwrap(), 16).unwrap(),
        ));
        memory.write_slice(&[1; 4097], GuestAddress(4095)).unwrap();
        assert_eq!(drain(&control), [8, 9]);
        memory.write_obj(1u64, GuestAddress((1 << 20) + 7 * 4096)).unwrap();
        assert_eq!(drain(&control), [7]);

        let frontend = Arc::new(DirtyLog::create(264).unwrap());
        logs.set_frontend(Some(frontend.clone()));
        memory.store(1u32, GuestAddress((1 << 20) + 4096), Ordering::Release).unwrap();
        assert_eq!((drain(&control), drain(&frontend)), (vec![1], vec![257]));

        // reading marks nothing
        let _: u64 = memory.read_obj(GuestAddress(0)).unwrap();
        logs.set_control(None);
        memory.write_obj(1u8, GuestAddress(2 * 4096)).unwrap();
        assert_eq!((drain(&control), drain(&frontend)), (vec![], vec![2]));
        logs.set_frontend(None);
        memory.write_obj(1u8, GuestAddress(2 * 4096)).unwrap();
        assert_eq!((drain(&control), drain(&frontend)), (vec![], vec![]));
        assert_eq!(logs.missed(), 0);
    }

    #[test]
    fn a_log_that_is_too_short_is_noticed() {
        let logs = DirtyLogs::new();
        let memory = table(&logs).memory().clone();
        logs.set_control(Some(DirtyLog::create(8).unwrap()));
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(logs.missed(), 1);
    }

    #[test]
    fn what_the_kernel_wrote_is_marked_across_a_boundary_and_never_outside() {
        let logs = DirtyLogs::new();
        let memory = table(&logs).memory().clone();
        let control = Arc::new(DirtyLog::create(16).unwrap());
        logs.set_control(Some(
            DirtyLog::from_fd(rustix::io::fcntl_dupfd_cloexec(&control, 0).unwrap(), 16).unwrap(),
        ));
        mark_written(&memory, GuestAddress(4096 * 7 + 1), 8192);
        assert_eq!(drain(&control), [15]);
        mark_written(&memory, GuestAddress(u64::MAX - 3), usize::MAX);
        mark_written(&memory, GuestAddress(1 << 20), 0);
        assert!(drain(&control).is_empty());
        mark_written(&memory, GuestAddress(1 << 20), 4097);
        assert_eq!(drain(&control), [0, 1]);
    }
}
