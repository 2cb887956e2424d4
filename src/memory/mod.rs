//! Guest memory as the device servers and the checkpoint engine see it.

mod dirty_log;
mod host_map;
mod page_set;
mod region_log;
mod table;

pub use dirty_log::DirtyLog;
pub use host_map::{HostMap, Piece};
pub use page_set::PageSet;
pub use region_log::{DirtyLogs, RegionLog, RegionLogSlice, mark_written};
pub use table::{MemoryError, MemoryTable, Region};

/// Bytes of the page in which changes to guest RAM are tracked.
pub const PAGE_BYTES: usize = 4096;

/// The memory of one guest, mapped into this process; every write through it reaches the armed dirty logs.
pub type GuestMemory = vm_memory::GuestMemoryMmap<RegionLog>;
