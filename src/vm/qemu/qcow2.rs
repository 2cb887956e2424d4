//! A qcow2 image that holds nothing but one snapshot, whose VM state lies in one piece at a known place, so that it can be
//! overwritten without QEMU's knowing. The format is QEMU's docs/interop/qcow2.txt.

use std::io;

/// A cluster. Loading walks over the clusters of the VM state and writes a whole cluster of reference counts twice, so neither
/// many small nor few big ones are good: measured, 64 KiB and 256 KiB are equally fast, 1 MiB and above slower.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Room for the VM state. What is never written takes no memory.
pub(super) const VMSTATE_BYTES: u64 = 16 << 20;

/// Where the VM state begins in the file.
pub(super) const VMSTATE_OFFSET: u64 = Cluster::VmState as u64 * CLUSTER;

/// Length of the file.
const FILE_BYTES: u64 = VMSTATE_OFFSET + VMSTATE_BYTES;

/// In the order of the file.
enum Cluster {
    Header,
    RefcountTable,
    RefcountBlock,
    ActiveL1,
    SnapshotL1,
    SnapshotTable,
    L2,
    VmState,
}

impl Cluster {
    const fn offset(self) -> u64 {
        self as u64 * CLUSTER
    }
}

/// The flag of a table entry whose target has one reference only.
const COPIED: u64 = 1 << 63;
/// Entry 0 is the disk, of one unallocated cluster; entry 1 begins behind it and is the VM state.
const L1_ENTRIES: u32 = 2;
const VMSTATE_L1_INDEX: u64 = 1;
const DISK_BYTES: u64 = CLUSTER;
const HEADER_BYTES: u32 = 104;
/// Counts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// Writes the image through `write_at(bytes, offset)`, then `set_len`. The VM state is left empty.
pub(super) fn write(
    snapshot: &str,
    write_at: impl Fn(&[u8], u64) -> io::Result<()>,
    set_len: impl Fn(u64) -> io::Result<()>,
) -> io::Result<()> {
    let vmstate_clusters = VMSTATE_BYTES / CLUSTER;
    set_len(FILE_BYTES)?;
    write_at(&header(), Cluster::Header.offset())?;
    write_at(&Cluster::RefcountBlock.offset().to_be_bytes(), Cluster::RefcountTable.offset())?;
    let clusters = FILE_BYTES / CLUSTER;
    let once = 1u16.to_be_bytes().repeat(clusters as usize);
    write_at(&once, Cluster::RefcountBlock.offset())?;
    // The active table has no entries: it gets the snapshot's at the first load.
    let entry = (Cluster::L2.offset() | COPIED).to_be_bytes();
    write_at(&entry, Cluster::SnapshotL1.offset() + VMSTATE_L1_INDEX * entry.len() as u64)?;
    let entries =
        (0..vmstate_clusters).flat_map(|index| ((VMSTATE_OFFSET + index * CLUSTER) | COPIED).to_be_bytes());
    write_at(&entries.collect::<Vec<_>>(), Cluster::L2.offset())?;
    write_at(&snapshot_table(snapshot), Cluster::SnapshotTable.offset())
}

fn header() -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes()); // version
    header.extend(0u64.to_be_bytes()); // no backing file
    header.extend(0u32.to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(DISK_BYTES.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // no encryption
    header.extend(L1_ENTRIES.to_be_bytes());
    header.extend(Cluster::ActiveL1.offset().to_be_bytes());
    header.extend(Cluster::RefcountTable.offset().to_be_bytes());
    header.extend(1u32.to_be_bytes()); // clusters of the refcount table
    header.extend(1u32.to_be_bytes()); // snapshots
    header.extend(Cluster::SnapshotTable.offset().to_be_bytes());
    header.extend([0; 3 * 8]); // feature bits
    header.extend(REFCOUNT_ORDER.to_be_bytes());
    header.extend(HEADER_BYTES.to_be_bytes());
    debug_assert_eq!(header.len(), HEADER_BYTES as usize);
    header
}

fn snapshot_table(name: &str) -> Vec<u8> {
    const ID: &str = "1";
    let mut table = Vec::new();
    table.extend(Cluster::SnapshotL1.offset().to_be_bytes());
    table.extend(L1_ENTRIES.to_be_bytes());
    table.extend((ID.len() as u16).to_be_bytes());
    table.extend((name.len() as u16).to_be_bytes());
    table.extend([0; 2 * 4]); // date
    table.extend(0u64.to_be_bytes()); // time that the VM has run
    table.extend((VMSTATE_BYTES as u32).to_be_bytes());
    table.extend(24u32.to_be_bytes()); // bytes of the three fields that follow
    table.extend(VMSTATE_BYTES.to_be_bytes());
    table.extend(DISK_BYTES.to_be_bytes());
    table.extend(u64::MAX.to_be_bytes()); // no instruction count
    table.extend(ID.as_bytes());
    table.extend(name.as_bytes());
    table.resize(table.len().next_multiple_of(8), 0);
    table
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn qemu_img_finds_nothing_wrong_with_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(
            "colo",
            |bytes, offset| file.as_file().write_all_at(bytes, offset),
            |bytes| file.as_file().set_len(bytes),
        )
        .unwrap();
        let Ok(check) = Command::new("qemu-img").arg("check").arg(file.path()).output() else {
            println!("skipped: no qemu-img");
            return;
        };
        let said =
            String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
        assert!(check.status.success() && said.contains("No errors were found"), "{said}");
        let list = Command::new("qemu-img").args(["snapshot", "-l"]).arg(file.path()).output().unwrap();
        let said = String::from_utf8_lossy(&list.stdout);
        assert!(said.contains("colo") && said.contains("16 MiB"), "{said}");
    }
}
