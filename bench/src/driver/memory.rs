//! The memory of a guest that is this process.
#![expect(unsafe_code, reason = "a mapping that another process shares is reached through raw pointers only")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What parts of a guest's memory begin at.
pub(crate) const PAGE: usize = 4096;

/// Guest memory: a memfd that both sides map.
#[derive(Debug)]
pub(crate) struct Memory {
    file: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its mapping, and nothing in it is tied to a thread.
unsafe impl Send for Memory {}
// SAFETY: `&Memory` gives out addresses only; who reads and writes there says why that is right.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(bytes: usize) -> Result<Arc<Self>> {
        let bytes = bytes.next_multiple_of(PAGE);
        let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC).context("Cannot make guest memory")?;
        ftruncate(&file, bytes as u64).context("Cannot make guest memory")?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let base = unsafe { mmap(null_mut(), bytes, protection, flags, &file, 0) }.context("Guest memory")?;
        let base = NonNull::new(base.cast()).context("Guest memory is at address 0")?;
        Ok(Arc::new(Self { file, base, bytes }))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address in this process, which vhost-user calls the user address.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A pointer to `bytes` bytes at `offset`, inside the mapping.
    pub(crate) fn at<T>(&self, offset: usize, bytes: usize) -> *mut T {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "outside of guest memory");
        let pointer = self.base.as_ptr().wrapping_add(offset).cast::<T>();
        assert!(pointer.is_aligned());
        pointer
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every ring that points into it holds a reference to us.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
