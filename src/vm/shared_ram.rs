//! Guest RAM as an anonymous file that this process, the VMM and the device servers all map.

#![expect(
    unsafe_code,
    reason = "guest RAM is written by other processes, so it is only ever copied through raw pointers"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};

use crate::memory::{PAGE_BYTES, PageSet};

/// The guest RAM of one VM. It has no name in the file system and is gone with the last process that holds it.
#[derive(Debug)]
pub struct SharedRam {
    file: File,
    map: MmapRaw,
}

impl SharedRam {
    /// Makes guest RAM of `bytes`, all zeros.
    ///
    /// # Errors
    /// `bytes` is no multiple of the page, or there is not enough address space.
    pub fn create(bytes: u64) -> io::Result<Self> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{bytes} bytes are not whole pages"),
            ));
        }
        let memfd = memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, bytes)?;
        let file = File::from(memfd);
        let map = MmapOptions::new().map_raw(&file)?;
        Ok(Self { file, map })
    }

    /// The file, to be handed to those who map it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Where `bytes` from `offset` on lie in this process, for a system call that reads or writes them. The memory stays mapped
    /// as long as `self`. The guest may write it at any time, so no reference to it may be made.
    ///
    /// # Panics
    /// When the range is not inside guest RAM.
    pub fn range(&self, offset: u64, bytes: usize) -> *mut u8 {
        let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes());
        assert!(fits, "{bytes} bytes at {offset} of guest RAM of {} bytes", self.bytes());
        self.map.as_mut_ptr().wrapping_add(offset as usize)
    }

    /// Copies guest RAM from `offset` on into `into`.
    ///
    /// # Panics
    /// When the range is not inside guest RAM.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.range(offset, into.len());
        // SAFETY: `range` has checked that the source lies in the mapping, which lives as long as `self`, and `into` is no part
        // of it since nobody makes references to it. A guest that writes meanwhile is another process (or its vCPU): what is
        // copied is then a mixture, as for any device that reads guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Copies `from` to guest RAM at `offset`.
    ///
    /// # Panics
    /// When the range is not inside guest RAM.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let into = self.range(offset, from.len());
        // SAFETY: as in `read`, with the directions exchanged; the mapping is writable.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
    }

    /// Adds the pages that have ever been touched; all others are zeros.
    ///
    /// # Errors
    /// The file cannot be searched.
    ///
    /// # Panics
    /// When the set is too small.
    pub fn populated(&self, pages: &mut PageSet) -> io::Result<()> {
        let page = PAGE_BYTES as u64;
        let mut at = 0;
        while at < self.bytes() {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let hole = seek(&self.file, SeekFrom::Hole(data))?;
            pages.insert_range(data / page, hole.min(self.bytes()).div_ceil(page));
            at = hole;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_touched_pages_and_what_they_hold() {
        let ram = SharedRam::create(64 * PAGE_BYTES as u64).unwrap();
        ram.write(5 * PAGE_BYTES as u64 - 1, b"ab");
        ram.write(63 * PAGE_BYTES as u64, b"c");
        let mut pages = PageSet::new(70);
        ram.populated(&mut pages).unwrap();
        assert_eq!(pages.iter().collect::<Vec<_>>(), [4, 5, 63]);
        let mut two = [0; 2];
        ram.read(5 * PAGE_BYTES as u64 - 1, &mut two);
        assert_eq!(&two, b"ab");
    }

    #[test]
    fn refuses_what_is_no_whole_page() {
        assert!(SharedRam::create(0).is_err());
        assert!(SharedRam::create(4097).is_err());
    }
}
