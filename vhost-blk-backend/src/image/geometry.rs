//! What a disk says of its blocks, in the terms in which virtio tells it to a guest (virtio 1.2 §5.2.4).

use std::path::{Path, PathBuf};

/// No guest gains from hearing that a file system prefers more than this (NFS and others say 1 MiB).
const FILE_BLOCK_BYTES_MAX: u32 = 4096;

/// `virtio_blk_topology`. The sizes count logical blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Logical blocks to a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// The first logical block that begins a physical one.
    pub alignment_offset: u8,
    /// The least that is transferred without a read before.
    pub min_io_blocks: u16,
    /// What is transferred best; 0 when the disk does not say.
    pub opt_io_blocks: u32,
}

/// Topology, and what a discard can free.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Geometry {
    pub(super) topology: Topology,
    /// 0 where nothing can be discarded.
    pub(super) discard_granularity_bytes: u32,
}

/// In bytes, as the kernel has them.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    physical: u32,
    /// -1 for a device that is misaligned.
    alignment_offset: i64,
    min_io: u32,
    opt_io: u32,
}

impl Geometry {
    /// Of a file whose file system allocates `st_blksize` at a time.
    pub(super) fn of_file(st_blksize: u64, block_bytes: u32) -> Self {
        let bytes = u32::try_from(st_blksize).unwrap_or(u32::MAX).min(FILE_BLOCK_BYTES_MAX).max(block_bytes);
        let sizes = Sizes { physical: bytes, min_io: bytes, ..Sizes::default() };
        Self { topology: topology(sizes, block_bytes), discard_granularity_bytes: bytes }
    }

    /// Of the block device with this number. What sysfs does not tell is taken for unknown.
    pub(super) fn of_device(device: u64, physical_bytes: u32, block_bytes: u32) -> Self {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let node = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        // a partition's queue is that of its disk
        let queue = if node.join("partition").exists() { node.join("../queue") } else { node.join("queue") };
        let sizes = Sizes {
            physical: physical_bytes,
            alignment_offset: attribute(&node.join("alignment_offset")),
            min_io: attribute(&queue.join("minimum_io_size")),
            opt_io: attribute(&queue.join("optimal_io_size")),
        };
        let discards = attribute::<u64>(&queue.join("discard_max_bytes")) > 0;
        let granularity: u32 = attribute(&queue.join("discard_granularity"));
        let discard_granularity_bytes = if discards { granularity.max(block_bytes) } else { 0 };
        Self { topology: topology(sizes, block_bytes), discard_granularity_bytes }
    }
}

fn attribute<T: std::str::FromStr + Default>(path: &Path) -> T {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

fn topology(sizes: Sizes, block_bytes: u32) -> Topology {
    let physical_blocks = (sizes.physical / block_bytes).max(1);
    let saturated = |blocks: u32| u16::try_from(blocks).unwrap_or(u16::MAX);
    Topology {
        physical_block_exp: physical_blocks.ilog2() as u8,
        alignment_offset: u8::try_from(sizes.alignment_offset / i64::from(block_bytes)).unwrap_or(0),
        min_io_blocks: saturated((sizes.min_io / block_bytes).max(1)),
        opt_io_blocks: sizes.opt_io / block_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_counted_in_logical_blocks() {
        let disk = Sizes { physical: 4096, alignment_offset: 3584, min_io: 65536, opt_io: 1 << 20 };
        let shown =
            Topology { physical_block_exp: 3, alignment_offset: 7, min_io_blocks: 128, opt_io_blocks: 2048 };
        assert_eq!(topology(disk, 512), shown);
        let shown =
            Topology { physical_block_exp: 0, alignment_offset: 0, min_io_blocks: 16, opt_io_blocks: 256 };
        assert_eq!(topology(disk, 4096), shown);
    }

    #[test]
    fn what_a_disk_does_not_say_or_says_absurdly_is_harmless() {
        let nothing = Topology { min_io_blocks: 1, ..Topology::default() };
        assert_eq!(topology(Sizes::default(), 4096), nothing);
        let absurd = Sizes { physical: 512, alignment_offset: -1, min_io: u32::MAX, opt_io: 0 };
        assert_eq!(topology(absurd, 512), Topology { min_io_blocks: u16::MAX, ..Topology::default() });
        assert_eq!(Geometry::of_file(1 << 20, 512).topology.physical_block_exp, 3);
        assert_eq!(Geometry::of_file(512, 4096).discard_granularity_bytes, 4096);
        // a device that is not there
        let none = Geometry::of_device(rustix::fs::makedev(4095, 1_048_575), 512, 512);
        assert_eq!((none.topology, none.discard_granularity_bytes), (nothing, 0));
    }
}
