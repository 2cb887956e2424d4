use std::sync::Arc;
use std::sync::atomic::Ordering;

use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Piece, Region};
use colo::vhost_user::{Ring, RingSetup};
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const LIMITS: Limits = Limits { disk_bytes: 1 << 30, block_bytes: 512, read_only: false };
const RAM_BYTES: u64 = 1 << 20;
const TABLE: u64 = 0xf0000;
const AVAILABLE: u64 = 0xf1000;
const USED: u64 = 0xf2000;

fn memory() -> Arc<GuestMemory> {
    let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, RAM_BYTES).unwrap();
    let mut table = MemoryTable::new(DirtyLogs::new());
    let region = Region { guest_address: 0, bytes: RAM_BYTES, user_address: 0, mmap_offset: 0, file };
    table.replace(vec![region]).unwrap();
    table.memory().clone()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// The chain of descriptors (address, bytes, writable), if the ring lets it through.
fn popped(memory: &Arc<GuestMemory>, parts: &[(u64, u32, bool)]) -> Option<Chain> {
    for (at, (address, bytes, writable)) in parts.iter().enumerate() {
        let next = if at + 1 < parts.len() { VRING_DESC_F_NEXT } else { 0 };
        let flags = (next | if *writable { VRING_DESC_F_WRITE } else { 0 }) as u16;
        let descriptor = Descriptor::new(*address, *bytes, flags, at as u16 + 1);
        memory.write_obj(descriptor, GuestAddress(TABLE + 16 * at as u64)).unwrap();
    }
    memory.store(1u16, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    let setup = RingSetup {
        index: 0,
        size: 64,
        descriptors: GuestAddress(TABLE),
        available: GuestAddress(AVAILABLE),
        used: GuestAddress(USED),
        next_available: 0,
        event_idx: false,
        memory: memory.clone(),
        kick: None,
        call: None,
        error: None,
        broken_rings: Arc::default(),
        inflight: None,
    };
    let mut chain = Chain::new();
    Ring::new(setup).unwrap().pop(&mut chain).then_some(chain)
}

/// Places the header at 0 and parses.
fn parsed(kind: u32, sector: u64, parts: &[(u64, u32, bool)], limits: Limits) -> (Parsed, Chain) {
    let memory = memory();
    memory.write_slice(&header(kind, sector), GuestAddress(0)).unwrap();
    let mut chain = popped(&memory, parts).expect("a well formed chain");
    let parsed = parse(&mut chain, limits, &mut Vec::new());
    (parsed, chain)
}

/// Parses a discard or a write of zeros of extents (sector, sectors, flags).
fn cleared(kind: u32, extents: &[(u64, u32, u32)], limits: Limits) -> (Parsed, Vec<Extent>) {
    let memory = memory();
    memory.write_slice(&header(kind, 0), GuestAddress(0)).unwrap();
    let data: Vec<u8> = extents
        .iter()
        .flat_map(|(sector, sectors, flags)| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        })
        .collect();
    memory.write_slice(&data, GuestAddress(0x1000)).unwrap();
    let parts = [(0, 16, false), (0x1000, data.len() as u32, false), (0x2000, 1, true)];
    let mut found = vec![Extent { offset: 99, bytes: 99, unmap: true }];
    let parsed = parse(&mut popped(&memory, &parts).unwrap(), limits, &mut found);
    (parsed, found)
}

fn ranges(pieces: &[Piece]) -> Vec<(u64, u32)> {
    pieces.iter().map(|piece| (piece.guest_address(), piece.bytes())).collect()
}

#[test]
fn the_usual_layouts() {
    let (read, chain) =
        parsed(VIRTIO_BLK_T_IN, 3, &[(0, 16, false), (0x1000, 1024, true), (0x2000, 1, true)], LIMITS);
    assert_eq!(read, Parsed::Request(Operation::Read(1536)));
    assert_eq!((ranges(chain.readable()), ranges(chain.writable())), (vec![], vec![(0x1000, 1024)]));
    let (write, chain) =
        parsed(VIRTIO_BLK_T_OUT, 3, &[(0, 16, false), (0x1000, 512, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(write, Parsed::Request(Operation::Write(1536)));
    assert_eq!((ranges(chain.readable()), ranges(chain.writable())), (vec![(0x1000, 512)], vec![]));
    let (flush, _) = parsed(VIRTIO_BLK_T_FLUSH, 0, &[(0, 16, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(flush, Parsed::Request(Operation::Flush));
    let (id, chain) =
        parsed(VIRTIO_BLK_T_GET_ID, 0, &[(0, 16, false), (0x1000, 20, true), (0x2000, 1, true)], LIMITS);
    assert_eq!(id, Parsed::Request(Operation::GetId));
    assert_eq!(ranges(chain.writable()), [(0x1000, 20)]);
}

#[test]
fn what_is_wrong_is_refused_with_the_status_of_the_specification() {
    let end = LIMITS.disk_bytes / 512;
    let io_error = |kind, sector, data: u32, writable, limits| {
        let parts = [(0, 16, false), (0x1000, data, writable), (0x1000, 1, true)];
        parsed(kind, sector, &parts, limits).0 == Parsed::Refused(Status::IoError)
    };
    for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
        assert!(!io_error(kind, end - 1, 512, writable, LIMITS));
        assert!(io_error(kind, end - 1, 1024, writable, LIMITS), "past the end");
        assert!(io_error(kind, u64::MAX, 512, writable, LIMITS), "far past the end");
        assert!(io_error(kind, 0, 511, writable, LIMITS), "no whole sectors");
        assert!(io_error(kind, 0, 0, writable, LIMITS), "no data");
        let large = Limits { block_bytes: 4096, ..LIMITS };
        assert!(!io_error(kind, 8, 4096, writable, large));
        assert!(io_error(kind, 8, 512, writable, large), "no whole blocks");
        assert!(io_error(kind, 1, 4096, writable, large), "not at a block");
    }
    // as long as a chain can make it over the same memory
    let mut parts = vec![(0, 16, false)];
    parts.extend([(0x1000, 512 << 10, true); 33]);
    assert_eq!(parsed(VIRTIO_BLK_T_IN, 0, &parts, LIMITS).0, Parsed::Refused(Status::IoError), "too long");
    assert!(io_error(VIRTIO_BLK_T_GET_ID, 0, 19, true, LIMITS), "too short for an ID");
    let read_only = Limits { read_only: true, ..LIMITS };
    assert!(io_error(VIRTIO_BLK_T_OUT, 0, 512, false, read_only), "read-only");
    assert!(!io_error(VIRTIO_BLK_T_IN, 0, 512, true, read_only));
    let (unknown, _) = parsed(77, 0, &[(0, 16, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(unknown, Parsed::Refused(Status::Unsupported));
    let (short, _) = parsed(VIRTIO_BLK_T_FLUSH, 0, &[(0, 15, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(short, Parsed::Refused(Status::IoError));
}

#[test]
fn extents_are_checked_one_by_one() {
    use Status::{IoError, Unsupported};
    let end = LIMITS.disk_bytes / 512;
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let extent = |offset, bytes, unmap| Extent { offset, bytes, unmap };

    let (parsed, extents) = cleared(discard, &[(8, 16, 0), (end - 1, 1, 0), (5, 0, 0)], LIMITS);
    assert_eq!(parsed, Parsed::Request(Operation::Discard));
    assert_eq!(extents, [extent(4096, 8192, false), extent(LIMITS.disk_bytes - 512, 512, false)]);
    for (flags, unmap) in [(0, false), (1, true)] {
        let (parsed, extents) = cleared(zeroes, &[(1, 2, flags)], LIMITS);
        assert_eq!(parsed, Parsed::Request(Operation::WriteZeroes));
        assert_eq!(extents, [extent(512, 1024, unmap)]);
    }
    let read_only = Limits { read_only: true, ..LIMITS };
    let large = Limits { block_bytes: 4096, ..LIMITS };
    let too_many = vec![(0, 8, 0); DISCARD_EXTENTS_MAX as usize + 1];
    for (kind, extents, limits, status) in [
        (discard, &[(0, 8, 1)][..], LIMITS, Unsupported),
        (discard, &[(0, 8, 2)], LIMITS, Unsupported),
        (zeroes, &[(0, 8, 2)], LIMITS, Unsupported),
        (zeroes, &[(0, 8, 3)], LIMITS, Unsupported),
        (discard, &[], LIMITS, IoError),
        (discard, &too_many, LIMITS, IoError),
        (zeroes, &[(0, 8, 0), (8, 8, 0)], LIMITS, IoError),
        (discard, &[(0, DISCARD_SECTORS_MAX + 1, 0)], Limits { disk_bytes: 1 << 40, ..LIMITS }, IoError),
        (zeroes, &[(0, ZEROES_SECTORS_MAX + 1, 0)], LIMITS, IoError),
        (discard, &[(0, 8, 0), (end, 1, 0)], LIMITS, IoError),
        (discard, &[(u64::MAX, 1, 0)], LIMITS, IoError),
        (discard, &[(0, 8, 0)], read_only, IoError),
        (zeroes, &[(0, 8, 0)], read_only, IoError),
        (zeroes, &[(0, 4, 0)], large, IoError),
    ] {
        assert_eq!(cleared(kind, extents, limits).0, Parsed::Refused(status), "{kind}: {extents:?}");
    }
    // half an extent
    let parts = [(0, 16, false), (0x1000, 8, false), (0x2000, 1, true)];
    assert_eq!(self::parsed(discard, 0, &parts, LIMITS).0, Parsed::Refused(IoError));
}

#[test]
fn a_chain_without_a_place_for_the_status_is_unanswerable() {
    for parts in [&[(0, 16, false)][..], &[(0, 16, false), (0x2000, 0, true)], &[(0, 0, false)]] {
        assert_eq!(parsed(VIRTIO_BLK_T_FLUSH, 0, parts, LIMITS).0, Parsed::Unanswerable, "{parts:?}");
    }
}

/// Cuts `bytes` of guest memory from `address` on into descriptors.
fn cut(address: u64, bytes: u32, cuts: &[u32], writable: bool) -> Vec<(u64, u32, bool)> {
    let mut ends: Vec<u32> = cuts.iter().map(|cut| cut % (bytes + 1)).collect();
    ends.sort_unstable();
    ends.push(bytes);
    let mut start = 0;
    let part = |end| {
        let part = (address + u64::from(start), end - start, writable);
        start = end;
        part
    };
    ends.into_iter().map(part).collect()
}

fn flat(pieces: &[Piece]) -> Vec<u64> {
    let bytes = |piece: &Piece| piece.guest_address()..piece.guest_address() + u64::from(piece.bytes());
    pieces.iter().flat_map(bytes).collect()
}

proptest! {
    #[test]
    fn the_layout_over_descriptors_does_not_matter(
        write in any::<bool>(), sector in 0u64..1000, sectors in 1u32..9,
        out_cuts in prop::collection::vec(any::<u32>(), 0..6), in_cuts in prop::collection::vec(any::<u32>(), 0..6),
    ) {
        let data = sectors * 512;
        let (readable, writable) = if write { (16 + data, 1) } else { (16, data + 1) };
        let mut parts = cut(0, readable, &out_cuts, false);
        parts.extend(cut(0x10000, writable, &in_cuts, true));
        let kind = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        let (parsed, chain) = parsed(kind, sector, &parts, LIMITS);
        let operation = if write { Operation::Write(sector * 512) } else { Operation::Read(sector * 512) };
        prop_assert_eq!(parsed, Parsed::Request(operation));
        let (from, pieces) = if write { (16, chain.readable()) } else { (0x10000, chain.writable()) };
        prop_assert_eq!(flat(pieces), (from..from + u64::from(data)).collect::<Vec<_>>());
    }

    #[test]
    fn no_chain_makes_it_panic(
        parts in prop::collection::vec((0u64..RAM_BYTES, 0u32..0x20000, any::<bool>()), 1..6),
        kind in 0u32..15, sector in prop_oneof![0u64..100, any::<u64>()], extent in any::<[u8; 32]>(),
    ) {
        let memory = memory();
        memory.write_slice(&header(kind, sector), GuestAddress(0)).unwrap();
        memory.write_slice(&extent, GuestAddress(16)).unwrap();
        let mut parts = parts;
        parts[0].0 = 0;
        if let Some(mut chain) = popped(&memory, &parts) {
            let mut extents = Vec::new();
            match parse(&mut chain, LIMITS, &mut extents) {
                Parsed::Request(Operation::Read(offset)) => {
                    prop_assert!(offset + u64::from(chain.writable_bytes()) <= LIMITS.disk_bytes);
                }
                Parsed::Request(Operation::Write(offset)) => {
                    prop_assert!(offset + u64::from(chain.readable_bytes()) <= LIMITS.disk_bytes);
                }
                Parsed::Request(Operation::Discard | Operation::WriteZeroes) => {
                    prop_assert!(extents.iter().all(|extent| extent.bytes > 0));
                    prop_assert!(extents.iter().all(|extent| extent.offset + extent.bytes <= LIMITS.disk_bytes));
                }
                _ => {}
            }
        }
    }
}
