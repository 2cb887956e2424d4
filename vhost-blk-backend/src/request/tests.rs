use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestMemoryMmap;

use super::*;

const LIMITS: Limits = Limits { disk_bytes: 1 << 30, read_only: false };

type Memory = GuestMemoryMmap<()>;

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Descriptors as (address, bytes, writable), linked.
fn chain(parts: &[(u64, u32, bool)]) -> Vec<Descriptor> {
    let last = parts.len().saturating_sub(1);
    let flags = |at: usize, writable: bool| {
        let next = if at < last { VRING_DESC_F_NEXT } else { 0 };
        (next | if writable { VRING_DESC_F_WRITE } else { 0 }) as u16
    };
    let descriptor =
        |(at, part): (usize, &(u64, u32, bool))| Descriptor::new(part.0, part.1, flags(at, part.2), 0);
    parts.iter().enumerate().map(descriptor).collect()
}

/// Places the header at 0 and parses.
fn parsed(kind: u32, sector: u64, parts: &[(u64, u32, bool)], limits: Limits) -> (Parsed, Vec<Segment>) {
    let memory = memory();
    memory.write_slice(&header(kind, sector), GuestAddress(0)).unwrap();
    let mut segments = vec![Segment { address: GuestAddress(99), bytes: 99 }];
    let parsed = parse(chain(parts).into_iter(), &memory, limits, &mut segments);
    (parsed, segments)
}

fn segment(address: u64, bytes: u32) -> Segment {
    Segment { address: GuestAddress(address), bytes }
}

fn answer(status_at: u64, writable_bytes: u32) -> Answer {
    Answer { status_at: GuestAddress(status_at), writable_bytes }
}

#[test]
fn the_usual_layouts() {
    let (read, segments) =
        parsed(VIRTIO_BLK_T_IN, 3, &[(0, 16, false), (0x1000, 1024, true), (0x2000, 1, true)], LIMITS);
    assert_eq!(read, Parsed::Request(Operation::Read(1536), answer(0x2000, 1024)));
    assert_eq!(segments, [segment(0x1000, 1024)]);
    let (write, segments) =
        parsed(VIRTIO_BLK_T_OUT, 3, &[(0, 16, false), (0x1000, 512, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(write, Parsed::Request(Operation::Write(1536), answer(0x2000, 0)));
    assert_eq!(segments, [segment(0x1000, 512)]);
    let (flush, _) = parsed(VIRTIO_BLK_T_FLUSH, 0, &[(0, 16, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(flush, Parsed::Request(Operation::Flush, answer(0x2000, 0)));
    let (id, segments) =
        parsed(VIRTIO_BLK_T_GET_ID, 0, &[(0, 16, false), (0x1000, 20, true), (0x2000, 1, true)], LIMITS);
    assert_eq!(id, Parsed::Request(Operation::GetId, answer(0x2000, 20)));
    assert_eq!(segments, [segment(0x1000, 20)]);
}

#[test]
fn what_is_wrong_is_refused_with_the_status_of_the_specification() {
    let end = LIMITS.disk_bytes / 512;
    let io_error = |kind, sector, data: u32, writable, limits| {
        let parts = [(0, 16, false), (0x1000, data, writable), (0x9000, 1, true)];
        matches!(parsed(kind, sector, &parts, limits).0, Parsed::Refused(Status::IoError, _))
    };
    for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
        assert!(!io_error(kind, end - 1, 512, writable, LIMITS));
        assert!(io_error(kind, end - 1, 1024, writable, LIMITS), "past the end");
        assert!(io_error(kind, u64::MAX, 512, writable, LIMITS), "far past the end");
        assert!(io_error(kind, 0, 511, writable, LIMITS), "no whole sectors");
        assert!(io_error(kind, 0, 0, writable, LIMITS), "no data");
        assert!(io_error(kind, 0, DATA_BYTES_MAX as u32 + 512, writable, LIMITS), "too long");
    }
    assert!(io_error(VIRTIO_BLK_T_GET_ID, 0, 19, true, LIMITS), "too short for an ID");
    let read_only = Limits { read_only: true, ..LIMITS };
    assert!(io_error(VIRTIO_BLK_T_OUT, 0, 512, false, read_only), "read-only");
    assert!(!io_error(VIRTIO_BLK_T_IN, 0, 512, true, read_only));
    let (unknown, _) = parsed(77, 0, &[(0, 16, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(unknown, Parsed::Refused(Status::Unsupported, answer(0x2000, 0)));
    let (short, _) = parsed(VIRTIO_BLK_T_FLUSH, 0, &[(0, 15, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(short, Parsed::Refused(Status::IoError, answer(0x2000, 0)));
    let (out_of_memory, _) =
        parsed(VIRTIO_BLK_T_FLUSH, 0, &[(1 << 40, 16, false), (0x2000, 1, true)], LIMITS);
    assert_eq!(out_of_memory, Parsed::Refused(Status::IoError, answer(0x2000, 0)));
    let (out_of_order, _) = parsed(
        VIRTIO_BLK_T_IN,
        0,
        &[(0, 16, false), (0x1000, 512, true), (0, 1, false), (0x2000, 1, true)],
        LIMITS,
    );
    assert_eq!(out_of_order, Parsed::Refused(Status::IoError, answer(0x2000, 512)));
}

#[test]
fn a_chain_without_a_place_for_the_status_is_unanswerable() {
    let whole = [(0, 16, false), (0x2000, 1, true)];
    for parts in [&[][..], &whole[..1], &[(0, 16, false), (0x2000, 0, true)], &[whole[1], whole[0]]] {
        assert_eq!(parsed(VIRTIO_BLK_T_FLUSH, 0, parts, LIMITS).0, Parsed::Unanswerable, "{parts:?}");
    }
    // cut short by the iterator, as it does with a chain that loops or leaves the table
    let mut segments = Vec::new();
    let cut = chain(&[whole[0], whole[1], whole[1]]).into_iter().take(2);
    assert_eq!(parse(cut, &memory(), LIMITS, &mut segments), Parsed::Unanswerable);
}

#[test]
fn the_used_length_never_overstates() {
    let memory = memory();
    assert_eq!(answer(8, 0).give(&memory, Status::IoError, false), 1);
    assert_eq!(answer(8, 512).give(&memory, Status::IoError, false), 0);
    assert_eq!(answer(8, 512).give(&memory, Status::Ok, true), 513);
    assert_eq!(answer(1 << 40, 512).give(&memory, Status::Ok, true), 0);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(8)).unwrap(), Status::Ok as u8);
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

fn flat(segments: &[Segment]) -> Vec<u64> {
    segments
        .iter()
        .flat_map(|segment| segment.address.0..segment.address.0 + u64::from(segment.bytes))
        .collect()
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
        let (parsed, segments) = parsed(kind, sector, &parts, LIMITS);
        let operation = if write { Operation::Write(sector * 512) } else { Operation::Read(sector * 512) };
        prop_assert_eq!(parsed, Parsed::Request(operation, answer(0x10000 + u64::from(writable) - 1, writable - 1)));
        let from = if write { 16 } else { 0x10000 };
        prop_assert_eq!(flat(&segments), (from..from + u64::from(data)).collect::<Vec<_>>());
    }

    #[test]
    fn no_chain_makes_it_panic(parts in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>()), 0..6),
                               kind in 0u32..13, sector in any::<u64>()) {
        let memory = memory();
        memory.write_slice(&header(kind, sector), GuestAddress(0)).unwrap();
        // as the real iterator: no more than 2^32 - 1 bytes
        let mut sum = 0u32;
        let chain = parts.into_iter().map_while(|(address, bytes, flags)| {
            sum = sum.checked_add(bytes)?;
            Some(Descriptor::new(if flags & 8 == 0 { 0 } else { address }, bytes, flags & 3, 0))
        });
        let mut segments = Vec::new();
        if let Parsed::Request(Operation::Read(offset) | Operation::Write(offset), _) =
            parse(chain, &memory, LIMITS, &mut segments)
        {
            let bytes: u64 = segments.iter().map(|segment| u64::from(segment.bytes)).sum();
            prop_assert!(offset + bytes <= LIMITS.disk_bytes && segments.iter().all(|segment| segment.bytes > 0));
        }
    }
}
