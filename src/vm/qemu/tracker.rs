//! Which pages another process wrote: asynchronous write protection (userfaultfd) in its address space, read and armed again
//! with PAGEMAP_SCAN from outside. Linux 6.7.

#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use memmap2::MmapMut;
use rustix::process::{Pid, PidfdGetfdFlags, getpid, pidfd_getfd};

use super::inject::Stopped;
use crate::memory::{PAGE_BYTES, PageSet};

// linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURES: u64 = UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC;
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

// linux/fs.h
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// Runs of dirty pages taken with one system call.
const RUNS: usize = 4096;

/// struct uffdio_api
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// struct uffdio_register
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// struct uffdio_writeprotect
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// struct page_region
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// struct pm_scan_arg
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A piece of the other process's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// Its address there, at a page boundary.
    pub(super) address: u64,
    /// Its length, whole pages.
    pub(super) bytes: u64,
    /// The number of its first page.
    pub(super) first_page: u64,
}

/// Watches the writes of one process. Dropping it ends the protection.
pub(super) struct Tracker {
    userfaultfd: OwnedFd,
    pagemap: File,
    areas: Vec<Area>,
    runs: Box<[PageRegion]>,
}

impl Tracker {
    /// Begins to watch `areas` of `process`, none of whose pages counts as written yet.
    ///
    /// A userfaultfd belongs to the address space of the process that made it, so the process has to make it; everything else
    /// is done through a duplicate of it from here.
    pub(super) fn attach(process: Pid, pidfd: BorrowedFd<'_>, areas: Vec<Area>) -> io::Result<Self> {
        let mut stopped = Stopped::seize(process)?;
        let flags = (libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) as u64;
        let theirs = stopped.syscall(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0])?;
        let duplicate = pidfd_getfd(pidfd, theirs as i32, PidfdGetfdFlags::empty());
        stopped.syscall(libc::SYS_close, [theirs, 0, 0, 0, 0, 0])?;
        drop(stopped);
        Self::new(process, duplicate?, areas)
    }

    fn new(process: Pid, userfaultfd: OwnedFd, areas: Vec<Area>) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{}/pagemap", process.as_raw_nonzero()))?;
        let runs = vec![PageRegion::default(); RUNS].into_boxed_slice();
        let tracker = Self { userfaultfd, pagemap, areas, runs };
        tracker.ioctl(UFFDIO_API, &mut Api { api: UFFD_API, features: FEATURES, ioctls: 0 })?;
        for area in &tracker.areas {
            let (start, len) = (area.address, area.bytes);
            let mut register = Register { start, len, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
            tracker.ioctl(UFFDIO_REGISTER, &mut register)?;
        }
        tracker.forget_all()?;
        Ok(tracker)
    }

    /// Takes every page for not written.
    pub(super) fn forget_all(&self) -> io::Result<()> {
        self.areas.iter().try_for_each(|area| self.protect(area.address, area.bytes))
    }

    /// Takes the pages `from..to` of one area for not written.
    pub(super) fn forget(&self, from: u64, to: u64) -> io::Result<()> {
        let page = PAGE_BYTES as u64;
        let holds = |area: &&Area| (area.first_page..area.first_page + area.bytes / page).contains(&from);
        let Some(area) = self.areas.iter().find(holds) else { return Ok(()) };
        self.protect(area.address + (from - area.first_page) * page, (to - from) * page)
    }

    /// Adds the pages written since the last call, and takes them for not written from then on.
    pub(super) fn take(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        let page = PAGE_BYTES as u64;
        for area in &self.areas {
            let end = area.address + area.bytes;
            let mut at = area.address;
            while at < end {
                let mut argument = ScanArgument {
                    size: size_of::<ScanArgument>() as u64,
                    flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                    start: at,
                    end,
                    walk_end: 0,
                    vec: self.runs.as_mut_ptr() as u64,
                    vec_len: self.runs.len() as u64,
                    max_pages: 0,
                    category_inverted: 0,
                    category_mask: PAGE_IS_WRITTEN,
                    category_anyof_mask: 0,
                    return_mask: PAGE_IS_WRITTEN,
                };
                let fd = self.pagemap.as_raw_fd();
                // SAFETY: the structure is the kernel's; `vec` is a buffer of `vec_len` regions that outlives the call.
                let found = unsafe { libc::ioctl(fd, PAGEMAP_SCAN, &raw mut argument) };
                let Ok(found) = usize::try_from(found) else {
                    match io::Error::last_os_error() {
                        error if error.kind() == io::ErrorKind::Interrupted => continue,
                        error => return Err(error),
                    }
                };
                for run in &self.runs[..found] {
                    let page_of = |address: u64| area.first_page + (address - area.address) / page;
                    dirty.insert_range(page_of(run.start), page_of(run.end));
                }
                at = argument.walk_end;
            }
        }
        Ok(())
    }

    fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        loop {
            let mut protect = WriteProtect { start, len, mode: UFFDIO_WRITEPROTECT_MODE_WP };
            match self.ioctl(UFFDIO_WRITEPROTECT, &mut protect) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    /// `argument` must be the structure of `request`.
    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request of this module is used with its own structure, which the kernel reads and writes.
        match unsafe { libc::ioctl(self.userfaultfd.as_raw_fd(), request, std::ptr::from_mut(argument)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Tries the tracker on this process itself: one written page out of four must be found, once.
pub(super) fn self_test() -> io::Result<()> {
    const PAGES: usize = 4;
    // SAFETY: the call takes no pointer, and its result is a new descriptor or an error.
    let userfaultfd =
        match unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) } {
            // SAFETY: a descriptor that nobody else has.
            fd @ 0.. => unsafe { OwnedFd::from_raw_fd(fd as i32) },
            _ => return Err(io::Error::last_os_error()),
        };
    let mut memory = MmapMut::map_anon(PAGES * PAGE_BYTES)?;
    let area = Area { address: memory.as_ptr() as u64, bytes: memory.len() as u64, first_page: 0 };
    let mut tracker = Tracker::new(getpid(), userfaultfd, vec![area])?;
    for written in [2, 3] {
        memory[written * PAGE_BYTES + 17] = 1;
        let mut dirty = PageSet::new(PAGES as u64);
        tracker.take(&mut dirty)?;
        if !dirty.iter().eq([written as u64]) {
            let found = dirty.iter().collect::<Vec<_>>();
            return Err(io::Error::other(format!("page {written} was written and {found:?} found")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_this_process_writes() {
        self_test().unwrap();
    }
}
