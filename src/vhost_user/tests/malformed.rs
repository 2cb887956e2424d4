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

    #[test]
    fn any_ring_contents_are_survived(
        table in prop::collection::vec((prop_oneof![0u64..0x10000, any::<u64>()], any::<u32>(), 0u16..8, 0u16..9), 32),
        heads in prop::collection::vec(0u16..9, 8),
        available in prop_oneof![0u16..9, any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let ram = memfd(RAM_BYTES);
        let driver = Driver::new(&ram, 8);
        for (index, (address, len, flags, next)) in table.into_iter().enumerate() {
            let len = if len & 1 == 0 { len % 64 * 16 } else { len >> (len % 32) };
            driver.write(DESCRIPTORS + 16 * index as u64, Descriptor::new(address, len, flags, next));
        }
        for (index, head) in heads.into_iter().enumerate() {
            driver.write(AVAILABLE + 4 + 2 * index as u64, head);
        }
        driver.write(AVAILABLE + 2, available);
        let mut ring = Ring::new(driver.setup(map(&ram, &DirtyLogs::new()), event_idx)).unwrap();
        let mut chain = Chain::new();
        for _ in 0..9 {
            if !ring.pop(&mut chain) {
                break;
            }
            for (pieces, bytes) in
                [(chain.readable(), chain.readable_bytes()), (chain.writable(), chain.writable_bytes())]
            {
                let inside = |piece: &crate::memory::Piece| {
                    piece.bytes() > 0 && piece.guest_address() + u64::from(piece.bytes()) <= RAM_BYTES
                };
                prop_assert!(pieces.iter().all(inside));
                prop_assert_eq!(pieces.iter().map(crate::memory::Piece::bytes).sum::<u32>(), bytes);
            }
            let (readable, writable) = (chain.readable_bytes() as usize, chain.writable_bytes() as usize);
            let mut front = [0; 5];
            let taken = if chain.take_front(&mut front) { 5 } else { 0 };
            prop_assert_eq!(chain.copy_to(&mut vec![0; 4096]), (readable - taken).min(4096));
            prop_assert_eq!(chain.take_status(), writable > 0);
            chain.put_status(0xee);
            prop_assert_eq!(chain.fill(&[&[0xff; 64]]), writable.saturating_sub(1).min(64));
            chain.mark_written();
            ring.add_used(chain.head(), 64);
            ring.signal_used();
        }
        ring.enable_notification();
    }
}
