//! How many queue pairs receive, and which queue is which.

use super::*;

fn set(world: &mut World, pairs: u16) -> u8 {
    world.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &pairs.to_le_bytes())
}

/// Which pairs receive what comes to their taps.
fn receiving(world: &mut World) -> Vec<usize> {
    let pairs = world.lan.len();
    let mut receiving = Vec::new();
    for pair in 0..pairs {
        world.queues[2 * pair].offer(&[(1526, true)]);
        world.lan_sends(pair, &to(MAC));
    }
    // a worker that has something else to do looks at its tap all the same
    world.figure("/frames/lan_frames");
    for pair in 0..pairs {
        if world.received(pair, MOMENT).is_some() {
            receiving.push(pair);
        }
    }
    receiving
}

#[test]
fn the_first_pair_receives_until_the_driver_says_how_many() {
    let mut world = World::start(3, FEATURES | MQ);
    // an answer says that the control queue has begun
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
    assert_eq!(receiving(&mut world), [0]);
    // it takes what has waited, and that was in the tap
    assert_eq!(set(&mut world, 3), OK);
    for pair in 1..3 {
        assert_eq!(world.received(pair, LIMIT), Some(to(MAC)));
    }
    assert_eq!(receiving(&mut world), [0, 1, 2]);
    for wrong in [0, 4, 0x8000, 0xffff] {
        assert_eq!(set(&mut world, wrong), ERR, "{wrong}");
    }
    assert_eq!(world.command(VIRTIO_NET_CTRL_MQ, 0, &[1]), ERR);
    assert_eq!(world.command(VIRTIO_NET_CTRL_MQ, 0, &[1, 0, 0, 0]), ERR);
    assert_eq!(world.command(VIRTIO_NET_CTRL_MQ, 1, &[1, 0]), ERR, "RSS is not offered");
    assert_eq!(receiving(&mut world), [0, 1, 2]);
    assert_eq!(set(&mut world, 2), OK);
    assert_eq!(receiving(&mut world), [0, 1]);
}

/// What the driver has switched off it may free as soon as it has the answer.
#[test]
fn a_pair_that_was_switched_off_is_not_written_to() {
    let mut world = World::start(2, FEATURES | MQ);
    for round in 0..200 {
        assert_eq!(set(&mut world, 2), OK);
        for _ in 0..4 {
            if world.queues[2].available.wrapping_sub(world.queues[2].seen) < 4 {
                world.queues[2].offer(&[(1526, true)]);
            }
            world.lan_sends(1, &to(MAC));
        }
        assert_eq!(set(&mut world, 1), OK);
        let used = |world: &World| -> u16 {
            let queue = &world.queues[2];
            queue.memory.load(GuestAddress(queue.base + 0x2002), Ordering::SeqCst).unwrap()
        };
        let before = used(&world);
        std::thread::yield_now();
        assert_eq!(used(&world), before, "round {round}");
        while world.queues[2].seen != before {
            world.queues[2].used(LIMIT).unwrap();
        }
        // empty the tap
        assert_eq!(set(&mut world, 2), OK);
        while world.figure("/queue_pairs/1/lan_frames") < 4 * (round + 1) {
            if world.queues[2].available.wrapping_sub(world.queues[2].seen) < 4 {
                world.queues[2].offer(&[(1526, true)]);
            }
            while world.queues[2].used(Duration::ZERO).is_some() {}
        }
    }
}

#[test]
fn the_control_queue_is_where_the_features_put_it() {
    // the last with MQ, and the third without
    let mut world = World::start(2, FEATURES | MQ);
    assert_eq!(world.control, 4);
    assert_eq!(set(&mut world, 1), OK);
    let mut world = World::start(2, FEATURES);
    assert_eq!(world.control, 2);
    assert_eq!(set(&mut world, 1), ERR, "MQ was not negotiated");
    world.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, true);
    // a queue that these features do not give
    assert!(world.start_queue(3, 0).is_err());
    let why = world.serving.join().unwrap().unwrap_err().to_string();
    assert!(why.contains("Queue 3") && why.contains("without MQ"), "{why}");
    let mut world = World::connected(2, FEATURES & !(1 << VIRTIO_NET_F_CTRL_VQ) | MQ);
    assert!(world.start_queue(4, 0).is_err());
    let why = world.serving.join().unwrap().unwrap_err().to_string();
    assert!(why.contains("Queue 4") && why.contains("CTRL_VQ was not negotiated"), "{why}");
}

#[test]
fn a_frontend_without_a_control_queue_sees_no_difference() {
    for features in [1 << VIRTIO_F_VERSION_1, 1 << VIRTIO_F_VERSION_1 | MQ] {
        let mut world = World::connected(2, features);
        for index in 0..4 {
            world.start_queue(index, 0).unwrap();
        }
        assert_eq!(receiving(&mut world), [0, 1]);
        assert_eq!(world.admitted(&[to(OTHER), tagged(GROUP, 5)]), [to(OTHER), tagged(GROUP, 5)]);
    }
    // whatever a driver before it has said
    let mut world = World::start(2, FEATURES | MQ);
    assert_eq!(set(&mut world, 1), OK);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    world.stop();
    world.forget();
    world.set_features(1 << VIRTIO_F_VERSION_1 | MQ);
    for index in 0..4 {
        world.start_queue(index, 0).unwrap();
    }
    assert_eq!(receiving(&mut world), [0, 1]);
    // nor does one that keeps the queue, although its driver has negotiated it
    let mut world = World::connected(2, FEATURES | MQ);
    for index in 0..4 {
        world.start_queue(index, 0).unwrap();
    }
    assert_eq!(receiving(&mut world), [0, 1]);
}

#[test]
fn the_queues_are_counted_with_the_control_queue() {
    let mut world = World::connected(2, FEATURES | MQ);
    assert_eq!(world.frontend.get_queue_num().unwrap(), 5);
    assert_eq!(world.config()[8..10], [2, 0], "max_virtqueue_pairs");
    let plain = NetDevice::new(world.device.workers().to_vec(), 0, None);
    assert_eq!(plain.queues(), 4);
    assert_eq!(plain.features() & 1 << VIRTIO_NET_F_CTRL_VQ, 0);
    assert!(
        { plain }.add_control_queue().unwrap().is_none(),
        "whoever makes the configuration up has the queue"
    );
}
