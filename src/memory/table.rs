//! The guest's memory as a vhost-user frontend describes it, mapped.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, fstat};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestRegionCollectionError, GuestRegionMmap};

use super::{DirtyLogs, GuestMemory, RegionLog};

/// One region, as in `SET_MEM_TABLE`.
#[derive(Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Its length.
    pub bytes: u64,
    /// Where the frontend has it mapped; the addresses of rings are given in these terms.
    pub user_address: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
    /// The file, shared memory.
    pub file: OwnedFd,
}

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Addresses wrap around, or the length is zero.
    #[error("Memory region of {bytes:#x} bytes at guest address {guest_address:#x}: the range is no range")]
    Range {
        /// Where the guest sees it.
        guest_address: u64,
        /// Its length.
        bytes: u64,
    },
    /// Touching the mapping would kill this process.
    #[error(
        "Memory region at guest address {guest_address:#x}: its file ends at {file_bytes:#x}, before the region's \
         end at {end:#x}"
    )]
    PastEnd {
        /// Where the guest sees it.
        guest_address: u64,
        /// Length of the file.
        file_bytes: u64,
        /// Where the region ends in the file.
        end: u64,
    },
    /// Only files have a length that can be relied on.
    #[error("Memory region at guest address {guest_address:#x}: its descriptor is no file")]
    NoFile {
        /// Where the guest sees it.
        guest_address: u64,
    },
    /// The system refuses to look at or to map the file.
    #[error("Memory region at guest address {guest_address:#x} cannot be mapped: {error}")]
    Map {
        /// Where the guest sees it.
        guest_address: u64,
        /// What the system says.
        error: io::Error,
    },
    /// Regions overlap.
    #[error("The memory regions do not fit together: {0}")]
    Layout(#[from] GuestRegionCollectionError),
}

/// What makes a mapping reusable: the same bytes of the same file, at the same place in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    mmap_offset: u64,
    bytes: u64,
    guest_address: u64,
}

#[derive(Clone, Debug)]
struct Mapped {
    identity: Identity,
    user_address: u64,
    region: Arc<GuestRegionMmap<RegionLog>>,
}

/// The regions that are mapped now.
#[derive(Debug)]
pub struct MemoryTable {
    logs: DirtyLogs,
    mapped: Vec<Mapped>,
    memory: Arc<GuestMemory>,
}

impl MemoryTable {
    /// No memory yet; writes to what will be mapped go to `logs`.
    pub fn new(logs: DirtyLogs) -> Self {
        Self { logs, mapped: Vec::new(), memory: Arc::default() }
    }

    /// Replaces all regions. A region that is mapped already keeps its mapping, since a new one would cost a page fault
    /// for each page.
    ///
    /// # Errors
    /// A region is malformed or cannot be mapped; then everything stays as it was.
    pub fn replace(&mut self, regions: Vec<Region>) -> Result<(), MemoryError> {
        let mapped = regions.into_iter().map(|region| self.map(region)).collect::<Result<Vec<_>, _>>()?;
        self.install(mapped)
    }

    /// Adds one region (`ADD_MEM_REG`). One that is there already, byte for byte, is no change.
    ///
    /// # Errors
    /// It is malformed, overlaps with another or cannot be mapped; then everything stays as it was.
    pub fn add(&mut self, region: Region) -> Result<(), MemoryError> {
        let mut mapped = self.mapped.clone();
        let added = self.map(region)?;
        let same =
            |entry: &Mapped| (entry.identity, entry.user_address) == (added.identity, added.user_address);
        if mapped.iter().any(same) {
            return Ok(());
        }
        mapped.push(added);
        self.install(mapped)
    }

    /// Removes the region with these addresses (`REM_MEM_REG`). Returns whether there was one.
    ///
    /// # Errors
    /// The others do not fit together, which cannot be.
    pub fn remove(&mut self, guest_address: u64, bytes: u64, user_address: u64) -> Result<bool, MemoryError> {
        let mut mapped = self.mapped.clone();
        mapped.retain(|entry| {
            let identity = entry.identity;
            (identity.guest_address, identity.bytes, entry.user_address)
                != (guest_address, bytes, user_address)
        });
        let removed = mapped.len() < self.mapped.len();
        self.install(mapped)?;
        Ok(removed)
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.mapped.len()
    }

    fn install(&mut self, mut mapped: Vec<Mapped>) -> Result<(), MemoryError> {
        mapped.sort_by_key(|entry| entry.identity.guest_address);
        let same = |(old, new): (&Mapped, &Mapped)| old.identity == new.identity;
        if mapped.is_empty() {
            self.memory = Arc::default();
        } else if mapped.len() != self.mapped.len() || !self.mapped.iter().zip(&mapped).all(same) {
            let regions = mapped.iter().map(|entry| entry.region.clone()).collect();
            self.memory = Arc::new(GuestMemory::from_arc_regions(regions)?);
        }
        self.mapped = mapped;
        Ok(())
    }

    /// Forgets all regions. They are unmapped when nobody holds the [`GuestMemory`] any more.
    pub fn clear(&mut self) {
        self.mapped.clear();
        self.memory = Arc::default();
    }

    /// The guest's memory as it is now.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The guest's address for one of the frontend's.
    pub fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        self.mapped.iter().find_map(|entry| {
            let offset = user_address.checked_sub(entry.user_address)?;
            (offset < entry.identity.bytes).then(|| GuestAddress(entry.identity.guest_address + offset))
        })
    }

    fn map(&self, region: Region) -> Result<Mapped, MemoryError> {
        let Region { guest_address, bytes, user_address, mmap_offset, file } = region;
        let range = || MemoryError::Range { guest_address, bytes };
        let end = mmap_offset.checked_add(bytes).ok_or_else(range)?;
        let len = usize::try_from(bytes).map_err(|_| range())?;
        if bytes == 0
            || guest_address.checked_add(bytes).is_none()
            || user_address.checked_add(bytes).is_none()
            || i64::try_from(end).is_err()
        {
            return Err(range());
        }
        let failed = |error| MemoryError::Map { guest_address, error };
        let stat = fstat(&file).map_err(|errno| failed(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NoFile { guest_address });
        }
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if end > file_bytes {
            return Err(MemoryError::PastEnd { guest_address, file_bytes, end });
        }
        let identity =
            Identity { device: stat.st_dev, inode: stat.st_ino, mmap_offset, bytes, guest_address };
        if let Some(known) = self.mapped.iter().find(|entry| entry.identity == identity) {
            return Ok(Mapped { user_address, ..known.clone() });
        }
        let log = RegionLog::new(self.logs.clone(), mmap_offset, guest_address);
        let mapping = MmapRegionBuilder::new_with_bitmap(len, log)
            .with_file_offset(FileOffset::new(File::from(file), mmap_offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| {
                failed(match error {
                    MmapRegionError::Mmap(error) => error,
                    other => io::Error::other(other),
                })
            })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or_else(range)?;
        Ok(Mapped { identity, user_address, region: Arc::new(region) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;

    fn ram(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file
    }

    fn region(file: &OwnedFd, guest_address: u64, bytes: u64, mmap_offset: u64) -> Region {
        Region {
            guest_address,
            bytes,
            user_address: 0x7000_0000_0000 + guest_address,
            mmap_offset,
            file: file.try_clone().unwrap(),
        }
    }

    fn host(table: &MemoryTable, at: u64) -> *mut u8 {
        let region = table.memory().find_region(GuestAddress(at)).unwrap();
        region.get_host_address(MemoryRegionAddress(0)).unwrap()
    }

    #[test]
    fn the_same_file_keeps_its_mapping() {
        let file = ram(1 << 20);
        let other = ram(1 << 20);
        let mut table = MemoryTable::new(DirtyLogs::new());
        table.replace(vec![region(&file, 0x10000, 0x8000, 0x8000), region(&file, 0, 0x8000, 0)]).unwrap();
        let before = (table.memory().clone(), host(&table, 0), host(&table, 0x10000));
        assert_eq!(table.guest_address(0x7000_0001_7fff), Some(GuestAddress(0x17fff)));
        assert_eq!(table.guest_address(0x7000_0000_8000), None);

        table.replace(vec![region(&file, 0, 0x8000, 0), region(&file, 0x10000, 0x8000, 0x8000)]).unwrap();
        assert!(Arc::ptr_eq(&before.0, table.memory()));

        table.replace(vec![region(&other, 0, 0x8000, 0), region(&file, 0x10000, 0x8000, 0x8000)]).unwrap();
        assert_ne!(host(&table, 0), before.1);
        assert_eq!(host(&table, 0x10000), before.2);

        // a refused table changes nothing
        let overlap = vec![region(&file, 0, 0x8000, 0), region(&file, 0x7000, 0x8000, 0)];
        assert!(matches!(table.replace(overlap), Err(MemoryError::Layout(_))));
        assert_eq!(host(&table, 0x10000), before.2);
        table.clear();
        assert_eq!(table.memory().num_regions(), 0);
    }

    #[test]
    fn what_is_no_file_or_too_short_is_refused() {
        let file = ram(4096);
        let mut table = MemoryTable::new(DirtyLogs::new());
        let past = table.replace(vec![region(&file, 0, 8192, 0)]).unwrap_err();
        assert!(past.to_string().contains("ends at 0x1000"), "{past}");
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(matches!(table.replace(vec![region(&null, 0, 4096, 0)]), Err(MemoryError::NoFile { .. })));
    }

    proptest! {
        #[test]
        fn no_numbers_make_it_panic(
            regions in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..4),
            user in any::<u64>(),
        ) {
            let file = ram(1 << 16);
            let mut table = MemoryTable::new(DirtyLogs::new());
            let regions = regions.into_iter().map(|(guest_address, bytes, user_address, mmap_offset, tame)| {
                let (bytes, mmap_offset) = if tame { (bytes % 65536, mmap_offset % 8 * 4096) } else { (bytes, mmap_offset) };
                Region { guest_address, bytes, user_address, mmap_offset, file: file.try_clone().unwrap() }
            });
            drop(table.replace(regions.collect()));
            table.guest_address(user);
        }
    }
}
