//! What the secondary VM sees in place of the secondary disk: its own writes and the old content of what the primary
//! VM has overwritten since the last checkpoint. Pure data, no I/O.
//!
//! Content is held by the sector (512 bytes), in blocks of [`BLOCK_BYTES`]. A sector is *active* when the SVM wrote
//! it, *hidden* when its old content was saved before a PVM write, and otherwise it is read from the disk. A
//! checkpoint empties the buffer; a failover writes all of it back to the disk.

use std::collections::HashMap;
use std::ops::Range;

/// Bytes of a sector, the unit of virtio-blk addresses (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: usize = 512;

/// Bytes of the block in which the buffer takes memory.
pub const BLOCK_BYTES: usize = 4096;

const SECTORS_PER_BLOCK: u64 = (BLOCK_BYTES / SECTOR_BYTES) as u64;

/// Blocks in one allocation.
const SLAB_BLOCKS: usize = 256;

/// Where a block's content is, and which of its sectors are held (one bit each).
#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: u32,
    active: u8,
    hidden: u8,
}

/// The block buffer. The caller checks that sectors are on the disk, and [`BlockBuffer::has_room`] before it adds.
#[derive(Debug)]
pub struct BlockBuffer {
    entries: HashMap<u64, Entry>,
    /// Memory, taken as needed and kept for the next epoch.
    slabs: Vec<Box<[u8]>>,
    blocks_max: usize,
    blocks_high_water: usize,
}

/// The part of a sector range that lies in one block.
struct Part {
    block: u64,
    /// First sector within the block.
    first: u64,
    sectors: u64,
    /// Where the part's content starts in the caller's bytes.
    at: usize,
}

impl Part {
    fn mask(&self) -> u8 {
        (((1u16 << self.sectors) - 1) << self.first) as u8
    }
}

fn parts(sector: u64, bytes: usize) -> impl Iterator<Item = Part> {
    debug_assert!(bytes.is_multiple_of(SECTOR_BYTES), "{bytes} bytes are no whole sectors");
    let end = sector + (bytes / SECTOR_BYTES) as u64;
    let mut next = sector;
    std::iter::from_fn(move || {
        if next == end {
            return None;
        }
        let (block, first) = (next / SECTORS_PER_BLOCK, next % SECTORS_PER_BLOCK);
        let sectors = (SECTORS_PER_BLOCK - first).min(end - next);
        let at = (next - sector) as usize * SECTOR_BYTES;
        next += sectors;
        Some(Part { block, first, sectors, at })
    })
}

impl BlockBuffer {
    /// An empty buffer that is full at `blocks_max` blocks.
    pub fn new(blocks_max: usize) -> Self {
        Self { entries: HashMap::new(), slabs: Vec::new(), blocks_max, blocks_high_water: 0 }
    }

    /// Blocks held.
    pub fn blocks(&self) -> usize {
        self.entries.len()
    }

    /// The most blocks that were ever held.
    pub fn blocks_high_water(&self) -> usize {
        self.blocks_high_water
    }

    /// The number of blocks at which the buffer is full.
    pub fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    /// Sectors held as (written by the SVM, saved before a PVM write).
    pub fn sectors(&self) -> (u64, u64) {
        self.entries.values().fold((0, 0), |(active, hidden), entry| {
            (active + u64::from(entry.active.count_ones()), hidden + u64::from(entry.hidden.count_ones()))
        })
    }

    /// Whether a write of `bytes` at `sector`, by either VM, keeps the buffer within its limit.
    pub fn has_room(&self, sector: u64, bytes: usize) -> bool {
        let most = (bytes / BLOCK_BYTES) + 2;
        if self.entries.len() + most <= self.blocks_max {
            return true;
        }
        let new = parts(sector, bytes).filter(|part| !self.entries.contains_key(&part.block)).count();
        self.entries.len() + new <= self.blocks_max
    }

    /// An SVM write: `data` is what the SVM reads at `sector` from now on.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        for part in parts(sector, data.len()) {
            let mask = part.mask();
            let entry = self.put(&part, data);
            entry.active |= mask;
            entry.hidden &= !mask;
        }
    }

    /// Before a PVM write of `bytes` at `sector`: the runs of sectors whose content on the disk the SVM still sees,
    /// in ascending order. [`BlockBuffer::save`] their content, then write.
    pub fn unsaved(&self, sector: u64, bytes: usize) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for part in parts(sector, bytes) {
            let held = self.entries.get(&part.block).map_or(0, |entry| entry.active | entry.hidden);
            for bit in (part.first..part.first + part.sectors).filter(|bit| held & (1 << bit) == 0) {
                let unsaved = part.block * SECTORS_PER_BLOCK + bit;
                match runs.last_mut() {
                    Some(run) if run.end == unsaved => run.end += 1,
                    _ => runs.push(unsaved..unsaved + 1),
                }
            }
        }
        runs
    }

    /// Saves the content that the disk has at `sector`, one of the runs that [`BlockBuffer::unsaved`] names.
    pub fn save(&mut self, sector: u64, old: &[u8]) {
        for part in parts(sector, old.len()) {
            let mask = part.mask();
            let entry = self.put(&part, old);
            debug_assert_eq!((entry.active | entry.hidden) & mask, 0, "saved over what the SVM sees");
            entry.hidden |= mask;
        }
    }

    /// An SVM read: `data` holds what the disk has at `sector`; what the buffer has is laid over it.
    pub fn overlay(&self, sector: u64, data: &mut [u8]) {
        for part in parts(sector, data.len()) {
            let Some(entry) = self.entries.get(&part.block) else {
                continue;
            };
            let held = entry.active | entry.hidden;
            let content = self.content(entry.slot);
            for bit in (part.first..part.first + part.sectors).filter(|bit| held & (1 << bit) != 0) {
                let from = bit as usize * SECTOR_BYTES;
                let to = part.at + (bit - part.first) as usize * SECTOR_BYTES;
                data[to..to + SECTOR_BYTES].copy_from_slice(&content[from..from + SECTOR_BYTES]);
            }
        }
    }

    /// Whether all of `bytes` at `sector` is in the buffer, so that a read need not touch the disk.
    pub fn covers(&self, sector: u64, bytes: usize) -> bool {
        parts(sector, bytes).all(|part| {
            let held = self.entries.get(&part.block).map_or(0, |entry| entry.active | entry.hidden);
            held & part.mask() == part.mask()
        })
    }

    /// A checkpoint: the disk is now what the SVM sees.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// A failover: everything held as (first sector, content), in ascending order, one call of `each` for each run of
    /// sectors within a block. Stops at the first error.
    ///
    /// # Errors
    /// What `each` says.
    pub fn write_back<E>(&self, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut blocks: Vec<u64> = self.entries.keys().copied().collect();
        blocks.sort_unstable();
        for block in blocks {
            let entry = self.entries[&block];
            let content = self.content(entry.slot);
            let mut left = entry.active | entry.hidden;
            while left != 0 {
                let first = left.trailing_zeros();
                let sectors = (left >> first).trailing_ones();
                let from = first as usize * SECTOR_BYTES;
                let to = from + sectors as usize * SECTOR_BYTES;
                each(block * SECTORS_PER_BLOCK + u64::from(first), &content[from..to])?;
                left &= !((((1u16 << sectors) - 1) << first) as u8);
            }
        }
        Ok(())
    }

    fn content(&self, slot: u32) -> &[u8] {
        let at = slot as usize % SLAB_BLOCKS * BLOCK_BYTES;
        &self.slabs[slot as usize / SLAB_BLOCKS][at..at + BLOCK_BYTES]
    }

    /// Copies a part's content to its block, which is added if it is new.
    fn put(&mut self, part: &Part, data: &[u8]) -> &mut Entry {
        // Slots are handed out in order and never given back singly, so the number of entries is the next slot.
        let next = self.entries.len();
        let entry =
            self.entries.entry(part.block).or_insert(Entry { slot: next as u32, active: 0, hidden: 0 });
        let (slab, slot) = (entry.slot as usize / SLAB_BLOCKS, entry.slot as usize % SLAB_BLOCKS);
        if slab == self.slabs.len() {
            self.slabs.push(vec![0; SLAB_BLOCKS * BLOCK_BYTES].into_boxed_slice());
        }
        let to = slot * BLOCK_BYTES + part.first as usize * SECTOR_BYTES;
        let bytes = part.sectors as usize * SECTOR_BYTES;
        self.slabs[slab][to..to + bytes].copy_from_slice(&data[part.at..part.at + bytes]);
        self.blocks_high_water = self.blocks_high_water.max(next.max(entry.slot as usize + 1));
        entry
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK_SECTORS: u64 = 64;

    /// One byte stands for a sector.
    fn sectors(values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|value| [*value; SECTOR_BYTES]).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        SvmWrite { sector: u64, values: Vec<u8> },
        SvmRead { sector: u64, count: u64 },
        PvmWrite { sector: u64, values: Vec<u8> },
        Checkpoint,
    }

    fn step() -> impl Strategy<Value = Step> {
        let write = || {
            (0..DISK_SECTORS).prop_flat_map(|sector| {
                let room = (DISK_SECTORS - sector).min(20) as usize;
                (Just(sector), prop::collection::vec(any::<u8>(), 1..=room))
            })
        };
        prop_oneof![
            4 => write().prop_map(|(sector, values)| Step::SvmWrite { sector, values }),
            4 => write().prop_map(|(sector, values)| Step::PvmWrite { sector, values }),
            4 => write().prop_map(|(sector, values)| Step::SvmRead { sector, count: values.len() as u64 }),
            1 => Just(Step::Checkpoint),
        ]
    }

    fn range(sector: u64, count: usize) -> Range<usize> {
        sector as usize..sector as usize + count
    }

    fn bytes(sector: u64, count: usize) -> Range<usize> {
        let range = range(sector, count);
        range.start * SECTOR_BYTES..range.end * SECTOR_BYTES
    }

    proptest! {
        /// The model: two maps of sectors, what the PVM has and what the SVM has. A checkpoint makes the second the
        /// first; a failover must make the disk the second.
        #[test]
        fn the_svm_sees_its_own_disk(start in prop::collection::vec(any::<u8>(), DISK_SECTORS as usize),
                                     steps in prop::collection::vec(step(), 0..60)) {
            let mut disk = sectors(&start);
            let mut pvm = start.clone();
            let mut svm = start;
            let mut buffer = BlockBuffer::new(1000);
            for step in steps {
                match step {
                    Step::SvmWrite { sector, values } => {
                        svm[range(sector, values.len())].copy_from_slice(&values);
                        buffer.write(sector, &sectors(&values));
                        prop_assert!(buffer.covers(sector, values.len() * SECTOR_BYTES));
                    }
                    Step::PvmWrite { sector, values } => {
                        pvm[range(sector, values.len())].copy_from_slice(&values);
                        for run in buffer.unsaved(sector, values.len() * SECTOR_BYTES) {
                            let old = disk[bytes(run.start, (run.end - run.start) as usize)].to_vec();
                            buffer.save(run.start, &old);
                        }
                        prop_assert!(buffer.unsaved(sector, values.len() * SECTOR_BYTES).is_empty());
                        disk[bytes(sector, values.len())].copy_from_slice(&sectors(&values));
                    }
                    Step::SvmRead { sector, count } => {
                        let mut seen = disk[bytes(sector, count as usize)].to_vec();
                        buffer.overlay(sector, &mut seen);
                        prop_assert_eq!(seen, sectors(&svm[range(sector, count as usize)]));
                    }
                    Step::Checkpoint => {
                        buffer.clear();
                        svm.copy_from_slice(&pvm);
                        prop_assert_eq!(buffer.blocks(), 0);
                    }
                }
                let (active, hidden) = buffer.sectors();
                prop_assert!(active + hidden <= buffer.blocks() as u64 * SECTORS_PER_BLOCK);
                prop_assert!(buffer.blocks() <= buffer.blocks_high_water());
            }
            let mut last = None;
            buffer.write_back(|sector, content| {
                assert!(last.is_none_or(|last| last < sector));
                last = Some(sector);
                disk[bytes(sector, content.len() / SECTOR_BYTES)].copy_from_slice(content);
                Ok::<(), ()>(())
            }).unwrap();
            prop_assert_eq!(disk, sectors(&svm));
        }

        /// `has_room` says exactly whether the write would exceed the limit.
        #[test]
        fn room_is_exact(writes in prop::collection::vec((0..200u64, 1..30usize), 1..20), blocks_max in 0usize..20) {
            let mut buffer = BlockBuffer::new(blocks_max);
            for (sector, count) in writes {
                let mut held: std::collections::BTreeSet<u64> = buffer.entries.keys().copied().collect();
                held.extend((sector..sector + count as u64).map(|sector| sector / SECTORS_PER_BLOCK));
                let room = buffer.has_room(sector, count * SECTOR_BYTES);
                prop_assert_eq!(room, held.len() <= blocks_max);
                if room {
                    buffer.write(sector, &vec![7; count * SECTOR_BYTES]);
                    prop_assert_eq!(buffer.blocks(), held.len());
                }
            }
        }
    }

    #[test]
    fn write_back_stops_at_an_error() {
        let mut buffer = BlockBuffer::new(10);
        buffer.write(0, &[1; SECTOR_BYTES]);
        buffer.write(100, &[2; SECTOR_BYTES]);
        let mut calls = 0;
        let result = buffer.write_back(|_, _| {
            calls += 1;
            Err("no space")
        });
        assert_eq!((result, calls), (Err("no space"), 1));
    }

    #[test]
    fn memory_is_kept_for_the_next_epoch_and_no_more_is_taken() {
        let mut buffer = BlockBuffer::new(10_000);
        for epoch in 0..3 {
            buffer.write(epoch * 8000, &vec![1; 600 * BLOCK_BYTES]);
            assert_eq!((buffer.blocks(), buffer.slabs.len()), (600, 3));
            buffer.clear();
        }
        assert_eq!(buffer.blocks_high_water(), 600);
    }
}
