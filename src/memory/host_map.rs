//! Where guest memory is in this process: a flat table, for code that looks addresses up for every request.

use std::sync::Arc;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{DirtyLogs, GuestMemory, mark_written};

/// A piece of guest memory that is contiguous in this process. Its pointer may be used as long as the [`HostMap`] that
/// gave it lives, and what it points to may change at any time: the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it is here.
    pub(crate) host: *mut u8,
    /// Where the guest sees it.
    pub(crate) guest: u64,
    /// Its length, never 0.
    pub(crate) bytes: u32,
}

impl Piece {
    /// Where it is in this process.
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// Where the guest sees it.
    pub fn guest_address(&self) -> u64 {
        self.guest
    }

    /// Its length in bytes, never 0.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// Removes `bytes` from the front. All of them leave an empty piece behind.
    pub(crate) fn advance(&mut self, bytes: u32) {
        self.host = self.host.wrapping_add(bytes as usize);
        self.guest = self.guest.wrapping_add(u64::from(bytes));
        self.bytes -= bytes;
    }
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    bytes: u64,
    host: *mut u8,
}

/// The regions of one guest, kept mapped.
#[derive(Debug)]
pub struct HostMap {
    spans: Box<[Span]>,
    logs: Option<DirtyLogs>,
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are into mappings that `memory`, which is Send and Sync itself, keeps alive; this type never
// follows them, and what is behind them is shared with another process anyway.
#[expect(unsafe_code, reason = "carries addresses of guest memory between threads")]
unsafe impl Send for HostMap {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "carries addresses of guest memory between threads")]
unsafe impl Sync for HostMap {}

impl HostMap {
    /// The table for this memory.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let span = |region: &vm_memory::GuestRegionMmap<super::RegionLog>| Span {
            start: region.start_addr().raw_value(),
            bytes: region.len(),
            host: region.get_host_address(MemoryRegionAddress(0)).unwrap_or(std::ptr::null_mut()),
        };
        let spans = memory.iter().map(span).filter(|span| !span.host.is_null()).collect();
        let logs = memory.iter().next().map(|region| region.bitmap().logs().clone());
        Self { spans, logs, memory }
    }

    /// The memory itself.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The beginning of the range of `bytes` bytes at `address`, as far as it is contiguous here; `None` when
    /// `address` is not in guest memory or `bytes` is 0.
    #[inline]
    pub fn piece(&self, address: u64, bytes: u32) -> Option<Piece> {
        // few regions: a linear search over one or two cache lines
        let span = self.spans.iter().find(|span| address.wrapping_sub(span.start) < span.bytes)?;
        let offset = address - span.start;
        let here = u64::from(bytes).min(span.bytes - offset) as u32;
        (here > 0).then(|| Piece {
            host: span.host.wrapping_add(offset as usize),
            guest: address,
            bytes: here,
        })
    }

    /// The whole range, if it is contiguous here.
    #[inline]
    pub fn contiguous(&self, address: u64, bytes: u32) -> Option<Piece> {
        self.piece(address, bytes).filter(|piece| piece.bytes == bytes)
    }

    /// Marks what was written past every bitmap, if somebody logs writes. Before the guest is told.
    #[inline]
    pub fn mark(&self, address: u64, bytes: usize) {
        if self.logs.as_ref().is_some_and(DirtyLogs::armed) {
            mark_written(&self.memory, vm_memory::GuestAddress(address), bytes);
        }
    }
}
