//! Where QEMU keeps guest memory: one shared file, and private blocks (firmware, video RAM) that only its own process maps.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use rustix::process::Pid;

use super::tracker::Area;
use crate::memory::{PAGE_BYTES, PageSet};
use crate::vm::{RamBlock, SharedRam};

const PAGE: u64 = PAGE_BYTES as u64;

/// The name that the command line gives to shared guest RAM.
const SHARED_NAME: &str = "ram";

/// All memory of one VM.
pub(super) struct GuestRam {
    shared: Arc<SharedRam>,
    /// QEMU's address space, for the private blocks.
    memory: File,
    blocks: Vec<RamBlock>,
    addresses: Vec<u64>,
    pages: u64,
}

impl GuestRam {
    /// Finds every block of the process. `listed` is what `info ramblock` says, `log` QEMU's trace of its allocations.
    ///
    /// The error is a sentence for the operator.
    pub(super) fn find(
        process: Pid,
        shared: Arc<SharedRam>,
        listed: &str,
        log: &str,
    ) -> Result<Self, String> {
        let cannot = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| format!("Cannot inspect {what} of QEMU: {error}")
        };
        let maps = format!("/proc/{}/maps", process.as_raw_nonzero());
        let maps = std::fs::read_to_string(&maps).map_err(cannot(&maps))?;
        let memory = format!("/proc/{}/mem", process.as_raw_nonzero());
        let memory = File::options().read(true).write(true).open(&memory).map_err(cannot(&memory))?;
        let file = File::from(shared.fd().try_clone_to_owned().map_err(cannot("guest RAM"))?);
        let inode = file.metadata().map_err(cannot("guest RAM"))?.ino();
        let found = locate(&parse_list(listed)?, &parse_log(log), &parse_maps(&maps), inode, shared.bytes())?;

        let (mut blocks, mut addresses, mut pages) = (Vec::new(), Vec::new(), 0);
        for Located { name, bytes, address } in found {
            blocks.push(RamBlock { name, bytes, first_page: pages });
            addresses.push(address);
            pages += bytes / PAGE;
        }
        Ok(Self { shared, memory, blocks, addresses, pages })
    }

    pub(super) fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    pub(super) fn shared(&self) -> &Arc<SharedRam> {
        &self.shared
    }

    /// What the tracker is to watch.
    pub(super) fn areas(&self) -> Vec<Area> {
        let area = |(block, address): (&RamBlock, &u64)| {
            let (address, bytes, first_page) = (*address, block.bytes, block.first_page);
            Area { address, bytes, first_page }
        };
        self.blocks.iter().zip(&self.addresses).map(area).collect()
    }

    /// Whether only QEMU's process maps the page.
    pub(super) fn is_private(&self, page: u64) -> bool {
        page >= self.shared.bytes() / PAGE
    }

    /// Adds every page that may hold something else than zeros.
    pub(super) fn populated(&self, pages: &mut PageSet) -> io::Result<()> {
        self.shared.populated(pages)?;
        let mut held = vec![0; PAGE_BYTES];
        for page in self.shared.bytes() / PAGE..self.pages {
            self.memory.read_exact_at(&mut held, self.address(page))?;
            if held.iter().any(|byte| *byte != 0) {
                pages.insert(page);
            }
        }
        Ok(())
    }

    /// Copies pages, in the order given, into `into`.
    pub(super) fn read(&self, pages: &[u64], mut into: &mut [u8]) -> io::Result<()> {
        self.check(pages, into.len())?;
        for run in self.runs(pages) {
            let (part, rest) = into.split_at_mut(run.len() * PAGE_BYTES);
            if self.is_private(run[0]) {
                self.memory.read_exact_at(part, self.address(run[0]))?;
            } else {
                self.shared.read(run[0] * PAGE, part);
            }
            into = rest;
        }
        Ok(())
    }

    /// Copies pages, in the order given, from `from`. Writes to private pages count as QEMU's own.
    pub(super) fn write(&self, pages: &[u64], mut from: &[u8]) -> io::Result<()> {
        self.check(pages, from.len())?;
        for run in self.runs(pages) {
            let (part, rest) = from.split_at(run.len() * PAGE_BYTES);
            if self.is_private(run[0]) {
                self.memory.write_all_at(part, self.address(run[0]))?;
            } else {
                self.shared.write(run[0] * PAGE, part);
            }
            from = rest;
        }
        Ok(())
    }

    /// The list in pieces that are consecutive in one block.
    pub(super) fn runs<'p>(&self, pages: &'p [u64]) -> impl Iterator<Item = &'p [u64]> {
        let starts_block =
            |page: u64| self.blocks.binary_search_by_key(&page, |block| block.first_page).is_ok();
        pages.chunk_by(move |page, next| *next == page + 1 && !starts_block(*next))
    }

    /// Where a page is in QEMU's process.
    fn address(&self, page: u64) -> u64 {
        let index = self.blocks.partition_point(|block| block.first_page <= page) - 1;
        self.addresses[index] + (page - self.blocks[index].first_page) * PAGE
    }

    fn check(&self, pages: &[u64], bytes: usize) -> io::Result<()> {
        if let Some(page) = pages.iter().find(|page| **page >= self.pages) {
            let what = format!("page {page} of a VM that has {}", self.pages);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        if bytes != pages.len() * PAGE_BYTES {
            let what = format!("{bytes} bytes for {} pages", pages.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(())
    }
}

/// A line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    name: String,
    /// In QEMU's own space of RAM addresses, which ascends in the order in which the blocks were made.
    offset: u64,
    /// The most that the block can grow to; that much is mapped.
    bytes: u64,
    /// Where it is in QEMU's process; told by QEMU 8.2 and later.
    address: Option<u64>,
}

/// A line of /proc/PID/maps.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    from: u64,
    to: u64,
    writable: bool,
    shared: bool,
    offset: u64,
    inode: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Located {
    name: String,
    bytes: u64,
    address: u64,
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Name, page size in two words, offset, used, total, and in later versions address and "ro" or "rw". Blocks without a name
/// are not part of a VM's state for QEMU either (registers of a passed-through device, for example).
fn parse_list(listed: &str) -> Result<Vec<Listed>, String> {
    let mut blocks = Vec::new();
    for line in listed.lines() {
        let words = line.split_ascii_whitespace().collect::<Vec<_>>();
        let Some(first) = words.iter().position(|word| word.starts_with("0x")) else { continue };
        let numbers = words[first..].iter().map_while(|word| hexadecimal(word)).collect::<Vec<_>>();
        if first < 2 || numbers.len() < 3 {
            return Err(format!("QEMU's list of memory blocks has a line that is not understood: {line}"));
        }
        let name = words[..first - 2].join(" ");
        if !name.is_empty() {
            let (offset, bytes, address) = (numbers[0], numbers[2], numbers.get(3).copied());
            blocks.push(Listed { name, offset, bytes, address });
        }
    }
    Ok(blocks)
}

/// Length and address of each allocation that QEMU logged.
fn parse_log(log: &str) -> Vec<(u64, u64)> {
    let allocation = |line: &str| {
        let (_, values) = line.split_once("qemu_anon_ram_alloc size ")?;
        let (bytes, address) = values.split_once(" ptr ")?;
        Some((bytes.parse().ok()?, hexadecimal(address.trim())?))
    };
    log.lines().filter_map(allocation).collect()
}

fn parse_maps(maps: &str) -> Vec<Mapping> {
    let mapping = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let protection = words.next()?;
        let offset = words.next()?;
        let inode = words.nth(1)?;
        Some(Mapping {
            from: u64::from_str_radix(from, 16).ok()?,
            to: u64::from_str_radix(to, 16).ok()?,
            writable: protection.starts_with("rw"),
            shared: protection.ends_with('s'),
            offset: u64::from_str_radix(offset, 16).ok()?,
            inode: inode.parse().ok()?,
        })
    };
    maps.lines().filter_map(mapping).collect()
}

/// Brings together what QEMU and the kernel say: shared guest RAM first, then the other blocks by name.
fn locate(
    listed: &[Listed],
    log: &[(u64, u64)],
    maps: &[Mapping],
    inode: u64,
    ram_bytes: u64,
) -> Result<Vec<Located>, String> {
    let mut located = Vec::new();
    let mut others = listed.iter().filter(|block| block.name != SHARED_NAME).collect::<Vec<_>>();
    if others.len() + 1 != listed.len() {
        return Err("QEMU does not list guest RAM as one block: memory-backend must be \"ram\"".into());
    }
    let whole = |map: &&Mapping| map.inode == inode && map.shared && map.offset == 0;
    match maps.iter().find(whole) {
        Some(map) if map.to - map.from == ram_bytes => {
            located.push(Located { name: SHARED_NAME.into(), bytes: ram_bytes, address: map.from });
        }
        _ => return Err("QEMU does not map guest RAM in one piece".into()),
    }

    // Blocks of one length were allocated in the order of their offsets.
    others.sort_by_key(|block| block.offset);
    for block in &others {
        let Listed { name, bytes, .. } = *block;
        if !bytes.is_multiple_of(PAGE) {
            return Err(format!(
                "QEMU's memory block {name} has {bytes} bytes, which is no whole number of pages"
            ));
        }
        let same_length = others.iter().filter(|other| other.bytes == *bytes).collect::<Vec<_>>();
        let allocated = log.iter().filter(|(length, _)| length == bytes).collect::<Vec<_>>();
        let place = same_length.iter().position(|other| other.offset == block.offset);
        let logged = match place {
            Some(place) if allocated.len() == same_length.len() => Some(allocated[place].1),
            _ => None,
        };
        let address = block.address.or(logged).ok_or_else(|| {
            format!(
                "QEMU does not tell where its memory block {name} ({bytes} bytes) is: use QEMU 8.2 or later, or one that was \
                 built with the trace backend \"log\", and no memory backends besides guest RAM"
            )
        })?;
        let end = address.checked_add(*bytes);
        let held = |map: &&Mapping| map.from <= address && end.is_some_and(|end| end <= map.to);
        match maps.iter().find(held) {
            Some(map) if map.shared => {
                return Err(format!(
                    "QEMU's memory block {name} is shared with other processes, but only writes to guest RAM are known from \
                     all of them: remove the device or memory backend"
                ));
            }
            Some(map) if map.writable && address.is_multiple_of(PAGE) => {}
            _ => return Err(format!("QEMU's memory block {name} is not where QEMU says")),
        }
        located.push(Located { name: name.clone(), bytes: *bytes, address });
    }
    located[1..].sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(twice) = located.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(format!("QEMU has two memory blocks of the name {}", twice[0].name));
    }
    Ok(located)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of QEMU 7.2, as it is.
    const LIST_7_2: &str =
        "              Block Name    PSize              Offset               Used              Total
                     ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
   0000:00:02.0/vga.rom    4 KiB  0x0000000010040000 0x0000000000010000 0x0000000000040000
";
    const LOG: &str = "qemu_anon_ram_alloc size 262144 ptr 0x7f0000400000
qemu_anon_ram_alloc size 262144 ptr 0x7f0000800000
123@456.789:qemu_anon_ram_alloc size 2097152 ptr 0x7f0000200000
";
    const MAPS: &str = "7f0000200000-7f0000440000 rw-p 00000000 00:00 0
7f0000800000-7f0000840000 rw-p 00000000 00:00 0 
7f0010000000-7f0020000000 rw-s 00000000 00:01 77 /memfd:guest-ram (deleted)
";

    fn locate_in(list: &str, log: &str, maps: &str) -> Result<Vec<Located>, String> {
        locate(&parse_list(list).unwrap(), &parse_log(log), &parse_maps(maps), 77, 256 << 20)
    }

    #[test]
    fn blocks_of_one_length_are_told_apart_by_their_order() {
        let block = |name: &str, bytes, address| Located { name: name.into(), bytes, address };
        let expected = [
            block("ram", 256 << 20, 0x7f00_1000_0000),
            block("/rom@etc/acpi/tables", 2 << 20, 0x7f00_0020_0000),
            block("0000:00:02.0/vga.rom", 256 << 10, 0x7f00_0080_0000),
            block("pc.bios", 256 << 10, 0x7f00_0040_0000),
        ];
        assert_eq!(locate_in(LIST_7_2, LOG, MAPS).unwrap(), expected);
    }

    #[test]
    fn later_versions_tell_the_address_themselves() {
        let list = "  Block Name  PSize  Offset  Used  Total  HVA  RO
 ram  4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f0010000000  rw
 pc.bios  4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000 0x00007f0000800000  ro
   4 KiB  0x0000000020000000 0x0000000000001000 0x0000000000001000 0x00007f1230000000  rw
";
        assert_eq!(locate_in(list, "", MAPS).unwrap()[1].address, 0x7f00_0080_0000);
    }

    #[test]
    fn what_cannot_be_found_is_refused() {
        let missing = locate_in(LIST_7_2, &LOG[..LOG.find('\n').unwrap()], MAPS).unwrap_err();
        assert!(missing.contains("does not tell where its memory block pc.bios"), "{missing}");
        let shared = locate_in(LIST_7_2, LOG, &MAPS.replace("rw-p", "rw-s")).unwrap_err();
        assert!(shared.contains("is shared with other processes"), "{shared}");
        let none = locate_in(LIST_7_2, LOG, "").unwrap_err();
        assert!(none.contains("does not map guest RAM"), "{none}");
        assert!(parse_list("ram 0x0").is_err());
    }
}
