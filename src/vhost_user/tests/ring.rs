//! The ring against a driver in the same process.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::*;
use crate::memory::{DirtyLog, PageSet};

fn pair(size: u16, event_idx: bool) -> (Driver, Ring, Arc<OwnedFd>) {
    let ram = memfd(RAM_BYTES);
    let driver = Driver::new(&ram, size);
    let setup = driver.setup(map(&ram, &DirtyLogs::new()), event_idx);
    let call = setup.call.clone().unwrap();
    (driver, Ring::new(setup).unwrap(), call)
}

/// The head of the next request.
fn pop(ring: &mut Ring) -> Option<u16> {
    let mut chain = Chain::new();
    ring.pop(&mut chain).then(|| chain.head())
}

#[test]
fn requests_come_in_order_and_go_back_in_any() {
    let (mut driver, mut ring, _) = pair(4, false);
    for index in 0..4 {
        driver.descriptor(index, 0x8000 + u64::from(index) * 16, 16, VRING_DESC_F_WRITE, 0);
    }
    for round in 0..10 {
        for head in [3, 1, 0] {
            driver.offer(head);
        }
        let heads: Vec<u16> = std::iter::from_fn(|| pop(&mut ring)).collect();
        assert_eq!(heads, [3, 1, 0], "round {round}");
        for head in [0, 3, 1] {
            ring.add_used(head, u32::from(head) + 7);
        }
        assert_eq!(driver.take_used(), None, "not published yet");
        ring.publish_used();
        let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).collect();
        assert_eq!(used, [(0, 7), (3, 10), (1, 8)]);
    }
    driver.offer(2);
    assert!(ring.has_available());
    let before = ring.next_avail();
    let mut chain = Chain::new();
    assert!(ring.pop(&mut chain) && pop(&mut ring).is_none());
    ring.undo_pop(&chain);
    assert_eq!(ring.next_avail(), before);
    assert_eq!(pop(&mut ring), Some(2));
}

#[test]
fn without_event_idx_flags_say_who_wants_signals() {
    let (mut driver, mut ring, call) = pair(8, false);
    driver.descriptor(0, 0x8000, 16, 0, 0);
    ring.disable_notification();
    assert!(driver.no_notify());
    assert!(!ring.enable_notification());
    assert!(!driver.no_notify());
    driver.offer(0);
    assert!(ring.enable_notification(), "a request that came meanwhile is not slept over");
    pop(&mut ring).unwrap();

    ring.add_used(0, 0);
    ring.signal_used();
    assert_eq!(signals(&call), 1);
    ring.signal_used();
    assert_eq!(signals(&call), 0, "nothing new");
    driver.set_no_interrupt(true);
    ring.add_used(0, 0);
    ring.signal_used();
    assert_eq!(signals(&call), 0);
}

#[test]
fn with_event_idx_indices_say_it() {
    let (mut driver, mut ring, call) = pair(8, true);
    driver.descriptor(0, 0x8000, 16, 0, 0);
    assert!(!ring.enable_notification());
    assert_eq!(driver.avail_event(), 0);
    for _ in 0..5 {
        driver.offer(0);
        pop(&mut ring).unwrap();
    }
    assert!(!ring.enable_notification());
    assert_eq!(driver.avail_event(), 5);

    // the driver wants to know of the third
    driver.set_used_event(2);
    for _ in 0..2 {
        ring.add_used(0, 0);
        ring.signal_used();
    }
    assert_eq!(signals(&call), 0);
    ring.add_used(0, 0);
    ring.add_used(0, 0);
    ring.signal_used();
    assert_eq!(signals(&call), 1);
    ring.add_used(0, 0);
    ring.signal_used();
    assert_eq!(signals(&call), 0, "it was told already");
    // what is not signalled yet is signalled when the ring is given back
    driver.set_used_event(5);
    ring.add_used(0, 0);
    drop(ring);
    assert_eq!(signals(&call), 1);
}

#[test]
fn a_new_ring_goes_on_where_the_old_one_stopped() {
    let ram = memfd(RAM_BYTES);
    let mut driver = Driver::new(&ram, 8);
    let memory = map(&ram, &DirtyLogs::new());
    driver.descriptor(0, 0x8000, 16, 0, 0);
    let mut next_available = 0;
    for _ in 0..20 {
        let mut ring = Ring::new(RingSetup { next_available, ..driver.setup(memory.clone(), true) }).unwrap();
        for _ in 0..5 {
            driver.offer(0);
        }
        for _ in 0..3 {
            let head = pop(&mut ring).unwrap();
            ring.add_used(head, 0);
            ring.publish_used();
            assert!(driver.take_used().is_some());
        }
        driver.available = driver.available.wrapping_sub(2);
        driver.write(AVAILABLE + 2, driver.available);
        next_available = ring.next_avail();
    }
    assert_eq!(next_available, 60);
}

#[test]
fn every_write_is_logged_and_no_other_page() {
    let ram = memfd(RAM_BYTES);
    let mut driver = Driver::new(&ram, 8);
    let logs = DirtyLogs::new();
    let log = DirtyLog::create(64).unwrap();
    logs.set_control(Some(DirtyLog::from_fd(duplicate(&log), 64).unwrap()));
    let mut ring = Ring::new(driver.setup(map(&ram, &logs), true)).unwrap();
    let drained = || {
        let mut set = PageSet::new(64);
        log.drain(&mut set);
        set.iter().collect::<Vec<_>>()
    };
    driver.descriptor(0, 0x8000, 16, VRING_DESC_F_NEXT, 1);
    driver.descriptor(1, 0xafff, 2, VRING_DESC_F_WRITE, 0);
    driver.offer(0);
    let mut chain = Chain::new();
    assert!(ring.pop(&mut chain));
    assert_eq!(drained(), Vec::<u64>::new(), "looking changes nothing");
    assert_eq!(chain.fill(&[b"a", b"bc"]), 2);
    assert_eq!(drained(), [0xa, 0xb]);
    chain.mark_written();
    assert_eq!(drained(), [0xa, 0xb]);
    assert!(chain.take_status());
    chain.put_status(0);
    assert_eq!(drained(), [0xb]);
    ring.add_used(chain.head(), 2);
    ring.publish_used();
    assert_eq!(drained(), [USED / 4096]);
    ring.enable_notification();
    assert_eq!(drained(), [USED / 4096], "the event index is the guest's memory too");
}

#[test]
fn malformed_chains_break_the_ring_and_nothing_else() {
    type Case = (&'static str, fn(&Driver), u16);
    let cases: [Case; 10] = [
        ("head", |_| {}, 8),
        ("next", |d| d.descriptor(0, 0x8000, 1, VRING_DESC_F_NEXT, 8), 0),
        ("loop", |d| d.descriptor(0, 0x8000, 1, VRING_DESC_F_NEXT, 0), 0),
        ("outside", |d| d.descriptor(0, RAM_BYTES - 1, 2, 0, 0), 0),
        ("wrap", |d| d.descriptor(0, u64::MAX, 2, 0, 0), 0),
        (
            "order",
            |d| {
                d.descriptor(0, 0x8000, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
                d.descriptor(1, 0x8000, 1, 0, 0);
            },
            0,
        ),
        ("indirect length", |d| d.descriptor(0, 0x8000, 17, VRING_DESC_F_INDIRECT, 0), 0),
        (
            "indirect with next",
            |d| d.descriptor(0, 0x8000, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_NEXT, 1),
            0,
        ),
        (
            "more descriptors than a request may have",
            |d| {
                d.descriptor(0, 0x8000, 16 * 1025, VRING_DESC_F_INDIRECT, 0);
                for index in 0..1024 {
                    let more = Descriptor::new(0, 0, VRING_DESC_F_NEXT as u16, index + 1);
                    d.write(0x8000 + 16 * u64::from(index), more);
                }
                d.write(0x8000 + 16 * 1024, Descriptor::new(0x8000, 16, 0, 0));
            },
            0,
        ),
        (
            "indirect in indirect",
            |d| {
                d.descriptor(0, 0x8000, 16, VRING_DESC_F_INDIRECT, 0);
                d.write(0x8000, Descriptor::new(0x9000, 16, VRING_DESC_F_INDIRECT as u16, 0));
            },
            0,
        ),
    ];
    for (name, make, head) in cases {
        let ram = memfd(RAM_BYTES);
        let mut driver = Driver::new(&ram, 8);
        let setup = driver.setup(map(&ram, &DirtyLogs::new()), false);
        let (error, broken) = (setup.error.clone().unwrap(), setup.broken_rings.clone());
        let mut ring = Ring::new(setup).unwrap();
        driver.descriptor(7, 0x8000, 16, 0, 0);
        driver.offer(7);
        make(&driver);
        driver.offer(head);
        driver.offer(7);
        assert_eq!(pop(&mut ring), Some(7));
        assert!(pop(&mut ring).is_none(), "{name}");
        assert!(ring.is_broken() && pop(&mut ring).is_none() && !ring.enable_notification(), "{name}");
        ring.add_used(7, 0);
        ring.signal_used();
        assert_eq!(driver.take_used(), None, "{name}");
        assert_eq!((signals(&error), broken.load(Ordering::SeqCst)), (1, 1), "{name}");
    }
    // and an available index that claims more than there is
    let (driver, mut ring, _) = pair(8, true);
    driver.write(AVAILABLE + 2, 9u16);
    assert!(pop(&mut ring).is_none() && ring.is_broken());
}

#[test]
fn a_ring_outside_of_memory_is_refused() {
    let ram = memfd(RAM_BYTES);
    let driver = Driver::new(&ram, 8);
    let setup = || driver.setup(map(&ram, &DirtyLogs::new()), false);
    let refused = |setup| Ring::new(setup).unwrap_err().to_string();
    assert!(refused(RingSetup { used: GuestAddress(RAM_BYTES - 64), ..setup() }).contains("used ring"));
    assert!(refused(RingSetup { available: GuestAddress(u64::MAX - 1), ..setup() }).contains("available"));
    assert!(refused(RingSetup { descriptors: GuestAddress(8), ..setup() }).contains("not aligned to 16"));
    assert!(refused(RingSetup { size: 7, ..setup() }).contains("with 7 entries"));
    assert!(refused(RingSetup { size: 0, ..setup() }).contains("with 0 entries"));
}

#[test]
fn a_ring_without_a_kick_ticks() {
    use rustix::event::{PollFd, PollFlags, poll};
    let ram = memfd(RAM_BYTES);
    let driver = Driver::new(&ram, 8);
    let setup = driver.setup(map(&ram, &DirtyLogs::new()), false);
    let ring = Ring::new(RingSetup { kick: None, ..setup }).unwrap();
    poll(&mut [PollFd::new(&ring.kick_fd(), PollFlags::IN)], None).unwrap();
    ring.drain_kick();
}
