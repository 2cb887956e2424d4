//! Guest memory as the device servers and the checkpoint engine see it.

mod page_set;

pub use page_set::PageSet;

/// Bytes of the page in which changes to guest RAM are tracked.
pub const PAGE_BYTES: usize = 4096;
