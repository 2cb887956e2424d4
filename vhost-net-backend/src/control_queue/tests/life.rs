//! What holds over a pause, a reset, a new back end and a migration.

use colo::memory::{DirtyLog, PageSet};

use super::*;

fn strict(world: &mut World) {
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[7, 0]), OK);
    assert_eq!(world.set_tables(&[OTHER], &[]), OK);
}

fn frames() -> [Vec<u8>; 4] {
    [to(OTHER), to(GROUP), tagged(MAC, 7), tagged(MAC, 8)]
}

fn wanted() -> [Vec<u8>; 2] {
    [to(OTHER), tagged(MAC, 7)]
}

#[test]
fn a_pause_changes_nothing() {
    let mut world = World::start(2, FEATURES | MQ);
    strict(&mut world);
    for _ in 0..3 {
        let next = world.stop();
        assert_eq!(next[4], 3);
        world.resume(&next);
        assert_eq!(world.admitted(&frames()), wanted());
    }
    // memory that comes anew, and the log of a migration
    world.set_memory();
    assert_eq!(world.admitted(&frames()), wanted());
    world.set_features(FEATURES | MQ | 1 << 26);
    assert_eq!(world.admitted(&frames()), wanted());
}

#[test]
fn the_address_is_the_drivers_after_a_pause_and_the_cards_after_a_reset() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &OTHER), OK);
    let next = world.stop();
    world.resume(&next);
    world.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, false);
    assert_eq!(world.config()[..6], OTHER);
    world.lan_sends(0, &to(MAC));
    world.lan_sends(0, &to(OTHER));
    world.queues[0].offer(&[(1526, true)]);
    assert_eq!(world.received(0, LIMIT), Some(to(OTHER)));
    // the next driver reads it before it starts a queue
    world.stop();
    assert_eq!(world.config()[..6], MAC);
    world.begin_anew();
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&[to(MAC), to(OTHER)]), [to(MAC)]);
}

#[test]
fn a_reset_forgets_all() {
    let mut world = World::start(2, FEATURES | MQ);
    strict(&mut world);
    assert_eq!(world.command(VIRTIO_NET_CTRL_MQ, 0, &[2, 0]), OK);
    world.reset();
    assert_eq!(world.admitted(&frames()), frames());
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&frames()), [] as [Vec<u8>; 0], "neither addresses nor VLANs are left");
    world.queues[2].offer(&[(1526, true)]);
    world.lan_sends(1, &to(MAC));
    assert_eq!(world.received(1, MOMENT), None, "one pair");
    // also while only a receive queue runs
    world.stop();
    world.forget();
    world.start_queue(0, 0).unwrap();
    assert_eq!(world.admitted(&frames()), frames());
    // other features, without a control queue
    world.stop();
    world.set_features(1 << VIRTIO_F_VERSION_1);
    world.start_queue(0, world.queues[0].seen).unwrap();
    assert_eq!(world.admitted(&frames()), frames());
}

/// A back end that was started under a running guest has not heard what the driver said. It gives more rather than less.
#[test]
fn a_driver_that_was_not_heard_gets_more_rather_than_less() {
    let mut world = World::connected(2, FEATURES | MQ);
    let queue = &mut world.queues[4];
    (queue.available, queue.seen) = (9, 9);
    queue.memory.write_obj(9u16, GuestAddress(queue.base + 0x1002)).unwrap();
    queue.memory.write_obj(9u16, GuestAddress(queue.base + 0x2002)).unwrap();
    world.resume(&[0, 0, 0, 0, 9]);
    world.mode(VIRTIO_NET_CTRL_RX_NOMULTI, false);
    assert_eq!(world.admitted(&frames()), frames());
    world.queues[2].offer(&[(1526, true)]);
    world.lan_sends(1, &to(OTHER));
    assert_eq!(world.received(1, LIMIT), Some(to(OTHER)), "all pairs");
    // what it says is heard from then on, and only that
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&frames()), frames());
    assert_eq!(world.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, &[8, 0]), OK);
    assert_eq!(world.admitted(&frames()), frames()[..3]);
    world.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, false);
    assert_eq!(world.admitted(&frames()), frames()[..3], "the table is not known");
    assert_eq!(world.set_tables(&[], &[OTHER_GROUP]), OK);
    world.mode(VIRTIO_NET_CTRL_RX_ALLUNI, false);
    assert_eq!(world.admitted(&frames()), wanted(), "its own address is not known");
    assert_eq!(world.config()[..6], MAC);
    assert_eq!(world.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &MAC), OK);
    assert_eq!(world.admitted(&frames()), [tagged(MAC, 7)]);
    // and is kept over a pause
    let next = world.stop();
    world.resume(&next);
    assert_eq!(world.admitted(&frames()), [tagged(MAC, 7)]);
}

/// The back end lives on, and its frontend comes again.
#[test]
fn a_frontend_that_connects_anew_gets_more_rather_than_less() {
    let mut world = World::start(1, FEATURES);
    strict(&mut world);
    let next = world.stop();
    let World { frontend, socket, serving, device, lan, ram, queues, .. } = world;
    drop((frontend, socket));
    serving.join().unwrap().unwrap();
    let mut world = World::connect(device, lan, ram, FEATURES);
    world.queues = queues;
    world.resume(&next);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&frames()), frames());
}

#[test]
fn a_dirty_log_learns_of_answers_and_of_frames_that_were_declined() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    let pages = RAM_BYTES / 4096;
    let log = DirtyLog::create(pages).unwrap();
    let shared = std::os::fd::AsFd::as_fd(&log).try_clone_to_owned().unwrap();
    world.logs.set_control(Some(DirtyLog::from_fd(shared, pages).unwrap()));
    let drained = || {
        let mut set = PageSet::new(pages);
        log.drain(&mut set);
        set.iter().collect::<Vec<_>>()
    };
    // the answer in a page of its own
    let queue = &mut world.queues[2];
    queue.memory.write_slice(&[0, 1, 1], GuestAddress(queue.buffer())).unwrap();
    let buffer = queue.buffer();
    queue.offer(&[(3, false), (0x4000, false), (1, true)]);
    queue.used(LIMIT).unwrap();
    let answer = buffer + 3 + 0x4000;
    assert_eq!(queue.memory.read_obj::<u8>(GuestAddress(answer)).unwrap(), ERR, "it is too long");
    let control = queue.base;
    let next = world.stop();
    let expected = [(control + 0x2000) / 4096, answer / 4096];
    let marked = drained();
    assert!(expected.iter().all(|page| marked.contains(page)), "{marked:?}");
    // a frame that is declined was in the guest's buffer
    world.resume(&next);
    let buffer = world.queues[0].buffer();
    world.queues[0].offer(&[(0x1000, true), (0x600, true)]);
    world.lan_sends(0, &to(OTHER));
    while world.figure("/frames/lan_filtered") == 0 {}
    let mut frame = vec![0; 60];
    world.queues[0].memory.read_slice(&mut frame, GuestAddress(buffer + HEADER_BYTES as u64)).unwrap();
    assert_eq!(frame, to(OTHER));
    assert!(drained().contains(&(buffer / 4096)));
}
