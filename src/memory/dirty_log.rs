//! A bitmap of dirty pages in memory that two processes share: one marks, the other drains.

#![expect(unsafe_code, reason = "views a shared mapping as atomic words")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

use super::PageSet;

/// One bit a page, least significant first, in 64-bit words that are only ever touched atomically.
#[derive(Debug)]
pub struct DirtyLog {
    fd: OwnedFd,
    map: MmapRaw,
    pages: u64,
}

impl DirtyLog {
    /// A fresh log for the pages `0..pages`, in a memfd of its own.
    ///
    /// # Errors
    /// The system has no memory for it.
    pub fn create(pages: u64) -> io::Result<Self> {
        let fd = memfd_create("colo-dirty-log", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, words(pages)? * 8)?;
        Self::from_fd(fd, pages)
    }

    /// The log that another process made with [`DirtyLog::create`], or with the same layout.
    ///
    /// # Errors
    /// The file is too short for that many pages, or cannot be mapped.
    pub fn from_fd(fd: OwnedFd, pages: u64) -> io::Result<Self> {
        Self::map(fd, 0, words(pages)? * 8)
            .map(|log| Self { pages, ..log })
            .map_err(|error| io::Error::new(error.kind(), format!("Dirty log of {pages} pages: {error}")))
    }

    /// The log in the bytes `offset..offset + bytes` of a file.
    pub(crate) fn map(fd: OwnedFd, offset: u64, bytes: u64) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        if bytes == 0 || !bytes.is_multiple_of(8) || !offset.is_multiple_of(super::PAGE_BYTES as u64) {
            return Err(invalid(format!("{bytes} bytes at {offset} are no whole words on a page boundary")));
        }
        // A mapping past the end of its file kills the process at the first touch.
        let file_bytes = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        if offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(invalid(format!("the file has {file_bytes} bytes, {bytes} at {offset} are needed")));
        }
        let len = usize::try_from(bytes).map_err(|e| invalid(e.to_string()))?;
        let map = MmapOptions::new().offset(offset).len(len).map_raw(&fd)?;
        Ok(Self { fd, map, pages: bytes * 8 })
    }

    /// How many pages the log covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks the pages `first..=last`. Returns false when some of them are past the end of the log; those below are
    /// marked all the same.
    ///
    /// The atomic OR is a full barrier between the caller's write to the page before it and whoever drains: a page
    /// whose mark was taken shows the write. That is why a mark that is already there is set again.
    pub fn mark_range(&self, first: u64, last: u64) -> bool {
        let end = last.saturating_add(1).min(self.pages);
        let words = self.words();
        let mut page = first;
        while page < end {
            let next = end.min((page / 64 + 1) * 64);
            let ones = (u64::MAX >> (64 - (next - page))) << (page % 64);
            words[(page / 64) as usize].fetch_or(ones.to_le(), Ordering::SeqCst);
            page = next;
        }
        last < self.pages
    }

    /// Whether a page is marked.
    pub fn is_marked(&self, page: u64) -> bool {
        page < self.pages
            && u64::from_le(self.words()[(page / 64) as usize].load(Ordering::SeqCst)) >> (page % 64) & 1 == 1
    }

    /// Moves all marks into `into`. A page that is marked while this runs is found now or the next time.
    pub fn drain(&self, into: &mut PageSet) {
        for (index, word) in self.words().iter().enumerate() {
            // looking first keeps the clean lines shared between the two processes' caches
            if word.load(Ordering::Relaxed) != 0 {
                into.insert_word(index as u64, u64::from_le(word.swap(0, Ordering::SeqCst)));
            }
        }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, lives as long as self and covers its whole length, which `map` has
        // checked to be inside the file. Nothing but atomics ever touches it in this process.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.map.len() / 8) }
    }
}

impl AsFd for DirtyLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn words(pages: u64) -> io::Result<u64> {
    // 2^40 pages are 4 PiB of guest RAM
    if pages == 0 || pages > 1 << 40 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{pages} pages cannot be logged, 1 to 2^40 can"),
        ));
    }
    Ok(pages.div_ceil(64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn drains_exactly_what_was_marked(
            pages in 1u64..500,
            ranges in prop::collection::vec((0u64..600, 0u64..130), 0..10),
        ) {
            let log = DirtyLog::create(pages).unwrap();
            let other = DirtyLog::from_fd(log.as_fd().try_clone_to_owned().unwrap(), pages).unwrap();
            let mut expected = PageSet::new(pages);
            for (first, more) in ranges {
                let last = first + more;
                prop_assert_eq!(log.mark_range(first, last), last < pages);
                if first < pages {
                    expected.insert_range(first, pages.min(last + 1));
                }
            }
            let mut drained = PageSet::new(pages);
            other.drain(&mut drained);
            prop_assert_eq!(&drained, &expected);
            prop_assert!((0..pages).all(|page| !log.is_marked(page)));
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let log = DirtyLog::create(64).unwrap();
        let fd = || log.as_fd().try_clone_to_owned().unwrap();
        assert!(DirtyLog::from_fd(fd(), 65).unwrap_err().to_string().contains("8 bytes"));
        assert!(DirtyLog::from_fd(fd(), 0).is_err());
        assert!(DirtyLog::from_fd(fd(), u64::MAX).is_err());
        assert!(DirtyLog::map(fd(), u64::MAX - 4095, 8).is_err());
        assert!(DirtyLog::map(fd(), 0, 7).is_err());
    }
}
