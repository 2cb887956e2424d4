//! A back end that protects nothing, and one that waits for its orders.

use colo::memory::{DirtyLog, PageSet};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
};

use super::*;
use crate::lan::Null;

#[test]
fn frames_pass_both_ways_in_order() {
    let mut bench = Bench::start(false);
    bench.start_rings([0, 0]);
    for round in 0..40 {
        bench.offer_buffer();
        let ping = frame(&format!("ping {round}"));
        bench.lan_sends(&ping);
        assert_eq!(bench.guest_receives(LIMIT), Some(ping));
        let pong = frame(&format!("pong {round}"));
        bench.guest_sends(&pong);
        assert_eq!(bench.lan_receives(LIMIT), Some(pong));
        assert!(bench.queues[TX].used(LIMIT).is_some());
    }
    assert_eq!(bench.status("/frames/guest_frames"), 40);
    assert_eq!(bench.status("/frames/lan_bytes"), 40 * 60);
    assert_eq!(bench.stop_rings(), [40, 40]);
}

#[test]
fn a_driver_from_before_virtio_1_has_a_shorter_header() {
    let mut bench = Bench::start(false);
    bench.features(0);
    (bench.header_bytes, bench.lan_header_bytes) = (LEGACY_HEADER_BYTES, LEGACY_HEADER_BYTES);
    bench.start_rings([0, 0]);
    bench.offer_buffer();
    bench.lan_sends(&frame("in"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
    bench.guest_sends(&frame("out"));
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("out")));
}

#[test]
fn frames_wait_in_the_tap_for_buffers_and_for_the_ring() {
    let mut bench = Bench::start(false);
    for text in ["one", "two", "three"] {
        bench.lan_sends(&frame(text));
    }
    bench.start_rings([0, 0]);
    assert_eq!(bench.guest_receives(MOMENT), None);
    assert_eq!(bench.status("/frames/lan_frames"), 0);
    bench.offer_buffer();
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("one")));
    let next = bench.stop_rings();
    bench.offer_buffer();
    bench.offer_buffer();
    assert_eq!(bench.guest_receives(MOMENT), None);
    bench.start_rings(next);
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("two")));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("three")));
}

#[test]
fn what_the_lan_has_no_room_for_waits_in_the_ring() {
    let mut bench = Bench::start(false);
    bench.start_rings([0, 0]);
    let mut sent = 0;
    loop {
        assert!(sent < 10_000, "no end of room");
        bench.guest_sends(&frame(&format!("frame {sent}")));
        sent += 1;
        if bench.queues[TX].used(MOMENT).is_none() {
            break;
        }
    }
    // nothing else is kept up by it
    bench.offer_buffer();
    bench.lan_sends(&frame("in"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
    for number in 0..sent {
        assert_eq!(bench.lan_receives(LIMIT), Some(frame(&format!("frame {number}"))));
    }
    assert!(bench.queues[TX].used(LIMIT).is_some());
    assert_eq!(bench.lan_receives(MOMENT), None);
    assert_eq!(bench.status("/frames/guest_frames"), sent);
    assert_eq!(bench.status("/frames/lan_refused"), 0);
}

#[test]
fn what_is_no_frame_or_does_not_fit_is_counted_and_does_no_harm() {
    let mut bench = Bench::start(false);
    bench.start_rings([0, 0]);
    bench.guest_sends(&[1, 2, 3]);
    assert!(bench.queues[TX].used(LIMIT).is_some());
    bench.queues[TX].offer(VRING_DESC_F_WRITE, 100);
    assert!(bench.queues[TX].used(LIMIT).is_some());
    assert_eq!(bench.status("/frames/guest_malformed"), 2);
    bench.offer_buffer();
    bench.lan_sends(&[7; 1600]);
    bench.lan_sends(&frame("fits"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("fits")));
    assert_eq!(bench.status("/frames/guest_too_long"), 1);
    // a malformed chain breaks that queue only
    bench.queues[TX].descriptor(bench.queues[TX].available % SIZE, Descriptor::new(u64::MAX - 10, 100, 0, 0));
    let queue = &mut bench.queues[TX];
    let slot = queue.base + 0x1000 + 4 + 2 * u64::from(queue.available % (2 * SIZE));
    queue.memory.write_obj(queue.available % SIZE, GuestAddress(slot)).unwrap();
    queue.memory.write_obj(queue.available + 1, GuestAddress(queue.base + 0x1002)).unwrap();
    rustix::io::write(&queue.kick, &1u64.to_ne_bytes()).unwrap();
    bench.offer_buffer();
    bench.lan_sends(&frame("still here"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("still here")));
    assert_eq!(bench.status("/rings_broken"), 1);
}

#[test]
fn a_protected_one_lets_nothing_pass_without_orders() {
    let mut bench = Bench::start(true);
    bench.start_rings([0, 0]);
    bench.offer_buffer();
    bench.lan_sends(&frame("in"));
    bench.guest_sends(&frame("out"));
    assert_eq!(bench.guest_receives(MOMENT), None);
    assert_eq!(bench.lan_receives(MOMENT), None);
    for command in
        [Command::TakeOver, Command::Marker { epoch: 1 }, Command::Commit { epoch: 1 }, Command::Detach]
    {
        let refused = bench.call(&command).unwrap_err().to_string();
        assert!(refused.contains("No peer was attached"), "{refused}");
    }
    assert_eq!(bench.status("/pair/phase"), "closed");
    assert_eq!(bench.stop_rings(), [0, 0], "nothing was taken from the guest");
}

/// A dirty log of 64 pages, given to the back end.
fn dirty_log(bench: &mut Bench) -> DirtyLog {
    let log = DirtyLog::create(64).unwrap();
    let client = bench.client.as_mut().unwrap();
    client.call(&Command::DirtyLog { pages: 64 }, &[log.as_fd()], LIMIT).unwrap();
    log
}

#[test]
fn a_dirty_log_learns_of_every_page_that_is_written() {
    let mut bench = Bench::start(false);
    let log = dirty_log(&mut bench);
    let client = bench.client.as_mut().unwrap();
    assert!(client.call(&Command::DirtyLog { pages: 1 << 20 }, &[log.as_fd()], LIMIT).is_err(), "too short");
    assert!(client.call(&Command::DirtyLog { pages: 64 }, &[], LIMIT).is_err(), "no descriptor");
    bench.start_rings([0, 0]);
    bench.offer_buffer();
    bench.lan_sends(&frame("in"));
    bench.guest_receives(LIMIT).unwrap();
    bench.stop_rings();
    let mut pages = PageSet::new(64);
    log.drain(&mut pages);
    // the used rings of both queues, for their flags, and the buffer
    let buffer = bench.queues[RX].buffer(0) / 4096;
    let mut expected = vec![(base(RX) + 0x1800) / 4096, buffer, (base(TX) + 0x1800) / 4096];
    expected.sort_unstable();
    assert_eq!(pages.iter().collect::<Vec<_>>(), expected);
    assert_eq!(bench.status("/dirty_log_missed"), 0);
}

/// The kernel takes so many pieces in one call, and cuts off what does not fit into them.
#[test]
fn a_frame_is_whole_whatever_pieces_its_buffer_is_in() {
    use colo::vhost_user::CHAIN_DESCRIPTORS_MAX;
    let mut bench = Bench::start(false);
    bench.start_rings([0, 0]);
    let queue = &mut bench.queues[RX];
    let (table, pieces) = (0x30000, CHAIN_DESCRIPTORS_MAX as u16);
    for piece in 0..pieces {
        let next = if piece + 1 < pieces { VRING_DESC_F_NEXT } else { 0 };
        let at = queue.buffer(0) + 2 * u64::from(piece);
        let descriptor = Descriptor::new(at, 2, (VRING_DESC_F_WRITE | next) as u16, piece + 1);
        queue.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(piece))).unwrap();
    }
    let bytes = 16 * u32::from(pieces);
    queue.descriptor(0, Descriptor::new(table, bytes, VRING_DESC_F_INDIRECT as u16, 0));
    queue.available = 1;
    queue.memory.write_obj(1u16, GuestAddress(queue.base + 0x1002)).unwrap();
    rustix::io::write(&queue.kick, &1u64.to_ne_bytes()).unwrap();
    bench.lan_sends(&[7; 2100]);
    bench.lan_sends(&frame("fits"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("fits")));
    assert_eq!(bench.status("/frames/guest_too_long"), 1);
}

/// The kernel writes a frame before it is known whether the guest is to have it.
#[test]
fn a_dirty_log_learns_of_frames_that_are_dropped() {
    let mut bench = Bench::start(false);
    let log = dirty_log(&mut bench);
    bench.start_rings([0, 0]);
    bench.offer_buffer();
    let buffer = bench.queues[RX].buffer(0) / 4096;
    let is_marked = || {
        let mut pages = PageSet::new(64);
        log.drain(&mut pages);
        pages.contains(buffer)
    };
    let wait = |what: &str| {
        let deadline = Instant::now() + LIMIT;
        while !is_marked() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    bench.lan_sends(&[7; 1600]);
    wait("too long for the buffer");
    bench.lan_sends(&[7; 13]);
    wait("no frame");
    bench.orders.send(Order::Link(false)).unwrap();
    bench.lan_sends(&[7; 60]);
    wait("the link is down");
    assert_eq!(bench.stop_rings(), [0, 0]);
}

const OFFLOADS: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn a_long_frame_lies_in_as_many_buffers_as_it_takes() {
    let mut bench = Bench::start(false);
    bench.features(OFFLOADS);
    bench.start_rings([0, 0]);
    // a quarter of the ring, so that the frame is not cut off
    for _ in 0..7 {
        bench.offer_buffer();
    }
    let frame: Vec<u8> = (0..4000).map(|at| (at >> 3) as u8).collect();
    let mut header = [0; HEADER_BYTES];
    header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    rustix::io::write(&bench.lan, &[&header[..], &frame].concat()).unwrap();
    assert_eq!(bench.guest_buffer(MOMENT), None);
    bench.offer_buffer();
    let parts: Vec<_> = (0..3).map(|_| bench.guest_buffer(LIMIT).unwrap()).collect();
    header[10] = 3;
    assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [1526, 1526, 960]);
    assert!(parts.concat() == [&header[..], &frame].concat());
    assert_eq!(bench.guest_buffer(MOMENT), None, "one frame");
    // those that were taken ahead are not lost
    assert_eq!(bench.stop_rings(), [3, 0]);
    bench.start_rings([3, 0]);
    for _ in 0..3 {
        bench.offer_buffer();
    }
    bench.lan_sends(&frame[..60]);
    assert_eq!(bench.guest_receives(LIMIT), Some(frame[..60].to_vec()));
    assert_eq!(bench.status("/frames/guest_too_long"), 0);
}

#[test]
fn what_is_left_to_the_lan_was_negotiated() {
    let mut bench = Bench::start(false);
    bench.features(OFFLOADS);
    bench.start_rings([0, 0]);
    let frame = [7; 600];
    let large = [1, 1, 54, 0, 0xa8, 1, 34, 0, 16, 0, 0, 0];
    bench.guest_sends_with(&large, &frame);
    assert_eq!(bench.lan_receives_with(LIMIT), Some([&large[..], &frame].concat()));
    // TCP over IPv6 was not, and a checksum outside of the frame is none
    for lie in [[1, 4, 74, 0, 0xa8, 1, 54, 0, 16, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0x56, 2, 1, 0, 0, 0]] {
        bench.guest_sends_with(&lie, &frame);
    }
    bench.guest_sends(&frame);
    assert_eq!(bench.lan_receives(LIMIT), Some(frame.to_vec()));
    assert_eq!(bench.status("/frames/guest_malformed"), 2);
    // and without offloads nothing is
    let next = bench.stop_rings();
    bench.features(1 << VIRTIO_F_VERSION_1);
    bench.start_rings(next);
    bench.guest_sends_with(&large, &frame);
    bench.guest_sends(&frame);
    assert_eq!(bench.lan_receives(LIMIT), Some(frame.to_vec()));
    assert_eq!(bench.status("/frames/guest_malformed"), 3);
}

#[test]
fn without_a_cable_nothing_passes() {
    let mut bench = Bench::start(false);
    bench.start_rings([0, 0]);
    bench.offer_buffer();
    bench.call(&Command::Link { up: false }).unwrap();
    bench.lan_sends(&frame("lost"));
    bench.guest_sends(&frame("lost"));
    assert!(bench.queues[TX].used(LIMIT).is_some(), "what is sent is taken all the same");
    while bench.status("/frames/lan_ignored") != 1 {}
    bench.call(&Command::Link { up: true }).unwrap();
    bench.lan_sends(&frame("in"));
    bench.guest_sends(&frame("out"));
    assert_eq!(bench.guest_receives(LIMIT), Some(frame("in")));
    assert_eq!(bench.lan_receives(LIMIT), Some(frame("out")));
}

#[test]
fn a_lan_that_is_not_there_takes_gives_or_reflects() {
    let start = |null| {
        let mut bench = Bench::start_with(false, |_| Port::Null(null));
        bench.start_rings([0, 0]);
        bench.guest_sends(&frame("one"));
        bench.offer_buffer();
        bench
    };
    let mut drop = start(Null::Drop);
    assert!(drop.queues[TX].used(LIMIT).is_some());
    assert_eq!(drop.guest_receives(MOMENT), None);
    let mut generate = start(Null::Generate(64));
    assert_eq!(generate.guest_receives(LIMIT), Some(vec![0; 64]));
    generate.offer_buffer();
    assert_eq!(generate.guest_receives(LIMIT), Some(vec![0; 64]));
    assert!(generate.queues[TX].used(LIMIT).is_some());
    let mut reflect = start(Null::Reflect);
    assert_eq!(reflect.guest_receives(LIMIT), Some(frame("one")));
    reflect.guest_sends(&frame("two"));
    assert_eq!(reflect.guest_receives(MOMENT), None);
    reflect.offer_buffer();
    assert_eq!(reflect.guest_receives(LIMIT), Some(frame("two")));
}

#[test]
fn what_leaves_work_to_the_guest_is_no_half_of_a_pair() {
    let mut bench = Bench::start(false);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let attach = Command::Attach { role: Role::Primary, epoch: 1 };
    let refused = bench.client.as_mut().unwrap().call(&attach, &[theirs.as_fd()], LIMIT).unwrap_err();
    assert!(refused.to_string().contains("--protected"), "{refused}");
    drop(ours);
    let mut protected = Bench::start(true);
    assert!(protected.call(&Command::Link { up: false }).is_err());
}

#[test]
fn a_guest_that_has_arrived_is_announced() {
    let bench = Bench::start(false);
    bench.start_rings([0, 0]);
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    bench.orders.send(Order::Announce(mac)).unwrap();
    let frame = bench.lan_receives(LIMIT).unwrap();
    // RFC 903: a broadcast of type 0x8035, request reverse, the address three times
    assert_eq!(
        (frame.len(), &frame[..6], &frame[12..14], &frame[20..22]),
        (60, &[0xff; 6][..], &[0x80, 0x35][..], &[0, 3][..])
    );
    for at in [6, 22, 32] {
        assert_eq!(frame[at..at + 6], mac);
    }
}
