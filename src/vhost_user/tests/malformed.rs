//! Nothing that a frontend or a guest says makes the server panic or reach outside of guest memory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

fn message() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![0u64..10, Just(256), Just(1 << 26), Just(1 << 30), any::<u64>()];
    let payload = prop_oneof![
        3 => prop::collection::vec(small, 0..8).prop_map(|words| words.into_iter().flat_map(u64::to_ne_bytes).collect()),
        1 => prop::collection::vec(any::<u8>(), 0..80),
    ];
    let flags = prop_oneof![8 => Just(1u32), 4 => Just(9u32), 1 => any::<u32>()];
    (0u32..46, flags, payload, prop::option::weighted(0.05, any::<u32>())).prop_map(
        |(request, flags, payload, length): (u32, u32, Vec<u8>, Option<u32>)| {
            let length = length.unwrap_or(payload.len() as u32);
            let header: Vec<u8> = [request, flags, length].into_iter().flat_map(u32::to_ne_bytes).collect();
            [header, payload].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_messages_are_survived(messages in prop::collection::vec(message(), 1..12)) {
        let device = Arc::new(Shelf { config: Mutex::new(vec![0; 60]), ..Shelf::default() });
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let served = device.clone();
        let server = std::thread::spawn(move || drop(serve_connection(&*served, &DirtyLogs::new(), theirs)));
        for message in messages {
            if ours.write_all(&message).is_err() {
                break; // closed, as it should be
            }
        }
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        // a connection that is closed with replies unread is reset
        let _ = ours.read_to_end(&mut Vec::new());
        prop_assert!(server.join().is_ok());
        prop_assert!(!device.runs(0) && !device.runs(1));
    }

    /// What is taken is what the specification says is in the table, nothing else is written to, and each page that is
    /// written to is marked.
    #[test]
    fn any_ring_contents_are_survived(
        table in prop::collection::vec((address(), any::<u32>(), flags(), 0u16..9), 32),
        heads in prop::collection::vec(0u16..9, 8),
        available in prop_oneof![3 => 1u16..9, 1 => any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let ram = memfd(RAM_BYTES);
        let driver = Driver::new(&ram, 8);
        for (index, (address, len, flags, next)) in table.into_iter().enumerate() {
            let len = if len & 1 == 0 { len % 64 * 16 } else { len >> (len % 32) };
            driver.write(DESCRIPTORS + 16 * index as u64, Descriptor::new(address, len, flags, next));
        }
        for (index, head) in heads.iter().enumerate() {
            driver.write(AVAILABLE + 4 + 2 * index as u64, *head);
        }
        driver.write(AVAILABLE + 2, available);
        let logs = DirtyLogs::new();
        let log = Arc::new(crate::memory::DirtyLog::create(RAM_BYTES / 4096).unwrap());
        logs.set_frontend(Some(log.clone()));
        let mut ring = Ring::new(driver.setup(map(&ram, &logs), event_idx)).unwrap();
        let mut chain = Chain::new();
        for round in 0..9u16 {
            let before = contents(&driver);
            let head = u16::from_le_bytes(before[AVAILABLE as usize + 4 + 2 * usize::from(round % 8)..][..2].try_into().unwrap());
            let expected = walk(&before, head, 8);
            let index = u16::from_le_bytes(before[AVAILABLE as usize + 2..][..2].try_into().unwrap());
            let offered = (1..=8).contains(&index.wrapping_sub(round));
            let popped = ring.pop(&mut chain);
            prop_assert_eq!(popped, offered && expected.is_some());
            if !popped {
                prop_assert!(ring.is_broken() || index == round);
                break;
            }
            prop_assert_eq!(chain.head(), head);
            let pieces = |pieces: &[crate::memory::Piece], writable| -> Vec<_> {
                pieces.iter().map(|piece| (piece.guest_address(), piece.bytes(), writable)).collect()
            };
            let taken = [pieces(chain.readable(), false), pieces(chain.writable(), true)].concat();
            let expected = expected.unwrap();
            prop_assert_eq!(&taken, &expected);

            let (readable, writable) = (chain.readable_bytes() as usize, chain.writable_bytes() as usize);
            let mut front = [0; 5];
            let taken = if chain.take_front(&mut front) { 5 } else { 0 };
            prop_assert_eq!(chain.copy_to(&mut vec![0; 4096]), (readable - taken).min(4096));
            prop_assert_eq!(chain.take_status(), writable > 0);
            chain.put_status(0xee);
            prop_assert_eq!(chain.fill(&[&[0xff; 64]]), writable.saturating_sub(1).min(64));
            ring.add_used(chain.head(), 64);
            ring.signal_used();

            let used = (USED, 6 + 8 * 8, true);
            let allowed = |at| expected.iter().chain([&used]).any(|(start, bytes, writable)| *writable && (*start..*start + u64::from(*bytes)).contains(&at));
            for (at, (old, new)) in before.iter().zip(contents(&driver)).enumerate() {
                prop_assert!(*old == new || allowed(at as u64), "{at:#x} was written to");
                prop_assert!(*old == new || log.is_marked(at as u64 / 4096), "{at:#x} is not marked");
            }
            log.drain(&mut crate::memory::PageSet::new(log.pages()));
            chain.mark_written();
            let (last, data) = expected.split_last().filter(|(last, _)| last.2).map_or((None, &[][..]), |(last, data)| (Some(last), data));
            let cut = last.map(|(start, bytes, _)| (*start, *bytes - 1, true));
            for (start, bytes, _) in data.iter().copied().chain(cut).filter(|(_, bytes, writable)| *writable && *bytes > 0) {
                prop_assert!((start / 4096..=(start + u64::from(bytes) - 1) / 4096).all(|page| log.is_marked(page)));
            }
        }
        ring.enable_notification();
    }
}

/// Mostly where memory is.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..0x10000, 2 => Just(DESCRIPTORS + 16 * 8), 1 => RAM_BYTES - 64..RAM_BYTES + 64, 1 => any::<u64>()]
}

/// Chains that end and chains that go on, in the right order more often than not.
fn flags() -> impl Strategy<Value = u16> {
    prop_oneof![3 => Just(0u16), 3 => Just(1), 3 => Just(2), 2 => Just(3), 1 => Just(4), 1 => 0u16..8]
}

fn contents(driver: &Driver) -> Vec<u8> {
    let mut bytes = vec![0; RAM_BYTES as usize];
    driver.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// The buffers of a chain (address, length, for the device to write) as virtio 1.2 §2.7.5 has them, empty ones left
/// out; `None` when it is malformed.
fn walk(ram: &[u8], head: u16, size: u16) -> Option<Vec<(u64, u32, bool)>> {
    let (mut table, mut entries) = (DESCRIPTORS as usize, usize::from(size));
    let (mut index, mut indirect, mut seen) = (usize::from(head), false, 0);
    let mut buffers: Vec<(u64, u32, bool)> = Vec::new();
    loop {
        if index >= entries || seen >= entries {
            return None;
        }
        seen += 1;
        let descriptor = ram.get(table + 16 * index..table + 16 * index + 16)?;
        let address = u64::from_le_bytes(descriptor[..8].try_into().unwrap());
        let bytes = u32::from_le_bytes(descriptor[8..12].try_into().unwrap());
        let (flags, next) = (descriptor[12], u16::from_le_bytes([descriptor[14], descriptor[15]]));
        let (has_next, writable) = (flags & 1 != 0, flags & 2 != 0);
        if flags & 4 != 0 {
            if indirect || has_next || bytes == 0 || bytes % 16 != 0 || bytes / 16 > 65535 {
                return None;
            }
            (table, entries, index, indirect, seen) =
                (usize::try_from(address).ok()?, bytes as usize / 16, 0, true, 0);
            table.checked_add(16 * entries)?;
            continue;
        }
        let sum: u64 = buffers.iter().map(|(_, bytes, _)| u64::from(*bytes)).sum();
        if !writable && buffers.iter().any(|(_, _, writable)| *writable)
            || u32::try_from(sum + u64::from(bytes)).is_err()
        {
            return None;
        }
        if bytes > 0 {
            if address.checked_add(u64::from(bytes))? > RAM_BYTES {
                return None;
            }
            buffers.push((address, bytes, writable));
        }
        if !has_next {
            return Some(buffers);
        }
        index = usize::from(next);
    }
}
