//! The guest's memory, beside what is known to be in it, and the log of the pages that the device has written.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use colo::memory::{DirtyLog, DirtyLogs, MemoryTable, PAGE_BYTES, PageSet, Region};

pub(super) struct Ram {
    file: File,
    /// What is in memory.
    pub(super) shadow: Vec<u8>,
    log: DirtyLog,
    pub(super) table: MemoryTable,
}

impl Ram {
    /// So many bytes of memory, in several regions if it is cut, full of a pattern, which goes into it a whole number of times.
    pub(super) fn new(bytes: u64, cuts: &[u64], pattern: &[u8]) -> Self {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let logs = DirtyLogs::new();
        let pages = bytes / PAGE_BYTES as u64;
        let log = DirtyLog::create(pages).unwrap();
        logs.set_control(Some(DirtyLog::from_fd(log.as_fd().try_clone_to_owned().unwrap(), pages).unwrap()));
        let shadow = pattern.repeat(bytes as usize / pattern.len());
        let mut ram = Self { file: file.into(), shadow, log, table: MemoryTable::new(logs) };
        ram.file.write_all_at(&ram.shadow, 0).unwrap();
        ram.cut(cuts);
        ram
    }

    /// Gives the device the same memory anew, in regions that begin at 0 and at the cuts.
    pub(super) fn cut(&mut self, cuts: &[u64]) {
        let ends = cuts.iter().copied().chain([self.shadow.len() as u64]);
        let region = |(start, end): (u64, u64)| Region {
            guest_address: start,
            bytes: end - start,
            user_address: start,
            mmap_offset: start,
            file: self.file.try_clone().unwrap().into(),
        };
        let regions = [0].into_iter().chain(cuts.iter().copied()).zip(ends).map(region).collect();
        self.table.replace(regions).unwrap();
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
        self.shadow[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    pub(super) fn read(&self) -> Vec<u8> {
        let mut memory = vec![0; self.shadow.len()];
        self.file.read_exact_at(&mut memory, 0).unwrap();
        memory
    }

    /// The pages that were marked since the last time.
    pub(super) fn marked(&self) -> PageSet {
        let mut pages = PageSet::new(self.log.pages());
        self.log.drain(&mut pages);
        pages
    }
}
