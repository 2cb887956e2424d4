//! The secondary's second copy of guest memory: the primary's at the last checkpoint, and pages of the next one.

use std::io;

use memmap2::MmapMut;

use super::wire::{page_numbers, split_pages};
use crate::memory::{PAGE_BYTES, PageSet};

/// A copy of every page of a VM, zero at first. Pages that were never written cost no memory.
pub(super) struct Cache {
    bytes: MmapMut,
    /// Pages received since the last checkpoint was applied.
    received: PageSet,
}

impl Cache {
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(pages as usize * PAGE_BYTES)?;
        Ok(Self { bytes, received: PageSet::new(pages) })
    }

    /// Takes the payload of a `PAGES` frame in. Nothing of a malformed one is stored.
    pub(super) fn receive(&mut self, payload: &[u8]) -> io::Result<()> {
        let (numbers, contents) = split_pages(payload)?;
        if let Some(page) = page_numbers(numbers).find(|page| *page >= self.received.limit()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("page {page} of {} was sent", self.received.limit()),
            ));
        }
        for (page, content) in page_numbers(numbers).zip(contents.chunks_exact(PAGE_BYTES)) {
            let at = page as usize * PAGE_BYTES;
            self.bytes[at..at + PAGE_BYTES].copy_from_slice(content);
            self.received.insert(page);
        }
        Ok(())
    }

    /// Adds the pages that were received since the last call, and forgets which they were.
    pub(super) fn take_received(&mut self, into: &mut PageSet) {
        into.union(&self.received);
        self.received.clear();
    }

    /// One page.
    pub(super) fn page(&self, page: u64) -> &[u8] {
        let at = page as usize * PAGE_BYTES;
        &self.bytes[at..at + PAGE_BYTES]
    }
}
