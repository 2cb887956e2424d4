//! The file that all servers serve. It has no name, so it is gone when we are, whichever way we end.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};

const CHUNK: usize = 1 << 20;

/// An image, preallocated and filled.
#[derive(Debug)]
pub struct Disk {
    file: File,
    direct: bool,
}

impl Disk {
    /// Makes an image of `bytes` bytes (whole MiB) on the file system of `directory`. A `direct` one stays out of the
    /// page cache.
    ///
    /// # Errors
    /// The file system has no room, or no O_TMPFILE or O_DIRECT.
    pub fn create(directory: &Path, bytes: u64, direct: bool) -> Result<Self> {
        let place = || format!("Cannot make an image of {bytes} bytes in {}", directory.display());
        let mut flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        if direct {
            flags |= OFlags::DIRECT;
        }
        let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR).with_context(place)?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes).with_context(place)?;
        let disk = Self { file: file.into(), direct };
        let mut chunk = Aligned::new(CHUNK);
        for (at, byte) in chunk.bytes_mut().iter_mut().enumerate() {
            *byte = (at >> 3) as u8 ^ at as u8;
        }
        for offset in (0..bytes).step_by(CHUNK) {
            disk.file.write_all_at(chunk.bytes_mut(), offset).with_context(place)?;
        }
        disk.file.sync_all().with_context(place)?;
        Ok(disk)
    }

    /// How another process opens it, as long as we live.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Whether it stays out of the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Reads past every server.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_exact_at(&self, data: &mut [u8], offset: u64) -> Result<()> {
        let mut aligned = Aligned::new(data.len());
        self.file.read_exact_at(aligned.bytes_mut(), offset).context("Cannot read the image")?;
        data.copy_from_slice(aligned.bytes_mut());
        Ok(())
    }
}

/// A buffer that begins at a page, as O_DIRECT wants it.
#[derive(Debug)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Aligned {
    pub(super) fn new(bytes: usize) -> Self {
        const PAGE: usize = 4096;
        let memory = vec![0x5a; bytes + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Self { memory, start, bytes }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.bytes]
    }
}
