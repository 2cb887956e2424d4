//! Which frames arrive.

use super::*;

/// One of each kind.
fn all() -> Vec<Vec<u8>> {
    vec![
        to(BROADCAST),
        to(MAC),
        to(OTHER),
        to(GROUP),
        to(OTHER_GROUP),
        tagged(MAC, 7),
        tagged(MAC, 0xe000 | 7),
        tagged(BROADCAST, 4095),
        // of IEEE 802.1ad, which nobody filters by
        frame(MAC, &[0x88, 0xa8, 0, 9]),
    ]
}

/// Those at these places.
fn of(places: &[usize]) -> Vec<Vec<u8>> {
    let all = all();
    places.iter().map(|place| all[*place].clone()).collect()
}

#[test]
fn everything_is_received_until_the_driver_says_otherwise() {
    let mut world = World::start(1, FEATURES);
    assert_eq!(world.admitted(&all()), all());
    assert_eq!(world.set_tables(&[OTHER], &[]), OK);
    assert_eq!(world.admitted(&all()), all(), "promiscuous still");
    assert_eq!(world.figure("/frames/lan_filtered"), 0);
}

#[test]
fn each_mode_drops_what_it_must_and_no_more() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 8]));
    assert_eq!(world.figure("/frames/lan_filtered"), 6);
    assert_eq!(world.figure("/frames/lan_frames"), 3 + 1, "with the last");
    world.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, true);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 3, 4, 8]));
    world.mode(VIRTIO_NET_CTRL_RX_NOMULTI, true);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 8]), "NOMULTI is above ALLMULTI, and not about broadcast");
    world.mode(VIRTIO_NET_CTRL_RX_NOBCAST, true);
    assert_eq!(world.admitted(&all()), of(&[1, 8]));
    world.mode(VIRTIO_NET_CTRL_RX_NOMULTI, false);
    assert_eq!(world.admitted(&all()), of(&[1, 3, 4, 8]), "NOBCAST is not about multicast");
    world.mode(VIRTIO_NET_CTRL_RX_ALLMULTI, false);
    world.mode(VIRTIO_NET_CTRL_RX_ALLUNI, true);
    assert_eq!(world.admitted(&all()), of(&[1, 2, 8]));
    world.mode(VIRTIO_NET_CTRL_RX_NOBCAST, false);
    // the last frame of `admitted` is a unicast too
    world.mode(VIRTIO_NET_CTRL_RX_NOUNI, true);
    for frame in all() {
        world.lan_sends(0, &frame);
    }
    world.queues[0].offer(&[(1526, true)]);
    assert_eq!(world.received(0, LIMIT), Some(to(BROADCAST)));
    world.queues[0].offer(&[(1526, true)]);
    assert_eq!(world.received(0, MOMENT), None);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
    world.lan_sends(0, &to(OTHER));
    assert_eq!(world.received(0, LIMIT), Some(to(OTHER)), "promiscuous is above all");
}

#[test]
fn addresses_of_the_tables_and_the_cards_own_are_received() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.set_tables(&[OTHER], &[OTHER_GROUP]), OK);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 2, 4, 8]));
    assert_eq!(world.set_tables(&[], &[GROUP]), OK);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 3, 8]));
    // as many as are kept
    let many = |multicast: u8, count: u8| -> Vec<[u8; 6]> {
        (0..count).rev().map(|number| [2 | multicast, 0, 0, 0, 0, number]).collect()
    };
    let frames = [to([2, 0, 0, 0, 0, 63]), to([2, 0, 0, 0, 0, 64]), to([3, 0, 0, 0, 0, 0]), to([3; 6])];
    assert_eq!(world.set_tables(&many(0, 64), &many(1, 64)), OK);
    assert_eq!(world.admitted(&frames), [&frames[0], &frames[2]].map(Clone::clone));
    // one more, of one kind only
    assert_eq!(world.set_tables(&many(0, 65), &many(1, 64)), OK);
    assert_eq!(world.admitted(&frames), [&frames[0], &frames[1], &frames[2]].map(Clone::clone));
    assert_eq!(world.set_tables(&many(0, 64), &many(1, 65)), OK);
    assert_eq!(world.admitted(&frames), [&frames[0], &frames[2], &frames[3]].map(Clone::clone));
}

#[test]
fn the_driver_may_give_the_card_another_address() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.config()[..6], MAC);
    let set = VIRTIO_NET_CTRL_MAC_ADDR_SET;
    assert_eq!(world.command(VIRTIO_NET_CTRL_MAC, set, &OTHER), OK);
    assert_eq!(world.config()[..6], OTHER, "before the command was answered (§5.1.6.5.2)");
    world.lan_sends(0, &to(MAC));
    world.lan_sends(0, &to(OTHER));
    world.queues[0].offer(&[(1526, true)]);
    assert_eq!(world.received(0, LIMIT), Some(to(OTHER)));
    for wrong in [&GROUP[..], &[0; 6], &MAC[..5], &[2; 7], &[]] {
        assert_eq!(world.command(VIRTIO_NET_CTRL_MAC, set, wrong), ERR, "{wrong:?}");
    }
    assert_eq!(world.config()[..6], OTHER);
    world.reset();
    assert_eq!(world.admitted(&all()), all());
    assert_eq!(world.config()[..6], MAC, "a reset gives it its own again");
}

#[test]
fn vlans_are_received_when_they_were_named() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    let (add, remove) = (VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL);
    let vlan = |world: &mut World, command, vlan: u16| {
        world.command(VIRTIO_NET_CTRL_VLAN, command, &vlan.to_le_bytes())
    };
    assert_eq!(vlan(&mut world, add, 7), OK);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 5, 6, 8]));
    assert_eq!(vlan(&mut world, add, 4095), OK);
    assert_eq!(vlan(&mut world, remove, 7), OK);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 7, 8]));
    assert_eq!(vlan(&mut world, add, 4096), ERR);
    assert_eq!(vlan(&mut world, remove, 65535), ERR);
    // a VLAN makes no address ours
    assert_eq!(vlan(&mut world, add, 9), OK);
    assert_eq!(world.admitted(&[tagged(OTHER, 9), tagged(MAC, 9)]), [tagged(MAC, 9)]);
    // a driver that does not name VLANs gets them all
    let mut world = World::start(1, FEATURES & !(1 << VIRTIO_NET_F_CTRL_VLAN));
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.admitted(&all()), of(&[0, 1, 5, 6, 7, 8]));
    assert_eq!(vlan(&mut world, remove, 7), ERR);
}

#[test]
fn commands_may_be_split_over_any_descriptors() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    let table = [&[1, 0, 1, 0, 0, 0][..], &OTHER, &[1, 0, 0, 0], &GROUP].concat();
    assert_eq!(table.len(), 22);
    for pieces in
        [vec![22], vec![1; 22].into_iter().take(14).chain([8]).collect(), vec![1, 1, 3, 5, 12], vec![3, 19]]
    {
        assert_eq!(world.set_tables(&[], &[]), OK);
        assert_eq!(world.admitted(&all()), of(&[0, 1, 8]));
        assert_eq!(world.command_in(&table, &pieces, 1), (vec![OK], 1), "{pieces:?}");
        assert_eq!(world.admitted(&all()), of(&[0, 1, 2, 3, 8]));
    }
    // the answer is the first byte of what may be written
    assert_eq!(world.command_in(&table, &[22], 5), (vec![OK, 0xee, 0xee, 0xee, 0xee], 1));
}

#[test]
fn what_is_no_command_changes_nothing() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.set_tables(&[OTHER], &[]), OK);
    let expected = of(&[0, 1, 2, 8]);
    let one = [&[1, 0, 0, 0][..], &GROUP].concat();
    let wrong: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        vec![0, 0],
        vec![0, 0, 2],
        vec![0, 0, 1, 0],
        vec![0, 6, 1],
        vec![0, 0xff, 1],
        vec![1, 0],
        vec![1, 0, 0, 0, 0, 0],
        vec![1, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        [&[1, 0][..], &one, &[1, 0, 0, 0, 1, 2, 3, 4, 5]].concat(),
        [&[1, 0][..], &one, &one, &[0]].concat(),
        [&[1, 2][..], &one, &one].concat(),
        vec![2, 0, 7],
        vec![2, 0, 7, 0, 0],
        vec![2, 2, 7, 0],
        vec![3, 0, 0],
        vec![3, 1],
        // MQ, announced segmentation, coalescing: not negotiated
        vec![4, 0, 1, 0],
        vec![5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![6, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        vec![0xff, 0xff, 0xff],
    ];
    for command in wrong {
        assert_eq!(world.command_in(&command, &[command.len()], 1), (vec![ERR], 1), "{command:?}");
        assert_eq!(world.admitted(&all()), expected, "{command:?}");
    }
    // without room for an answer nothing is done, and the queue goes on
    assert_eq!(world.command_in(&[0, 0, 1], &[3], 0), (vec![], 0));
    assert_eq!(world.admitted(&all()), expected);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
    assert_eq!(world.admitted(&all()), all());
    assert_eq!(world.figure("/rings_broken"), 0);
}

#[test]
fn a_command_that_was_not_negotiated_is_none() {
    let commands: [(u32, &[u8]); 6] = [
        (VIRTIO_NET_F_CTRL_RX, &[0, 0, 1]),
        (VIRTIO_NET_F_CTRL_RX, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (VIRTIO_NET_F_CTRL_RX_EXTRA, &[0, 2, 1]),
        (VIRTIO_NET_F_CTRL_VLAN, &[2, 0, 1, 0]),
        (VIRTIO_NET_F_CTRL_MAC_ADDR, &[1, 1, 2, 0, 0, 0, 0, 9]),
        (VIRTIO_NET_F_GUEST_ANNOUNCE, &[3, 0]),
    ];
    for (bit, command) in commands {
        for (features, answer) in [(FEATURES, OK), (FEATURES & !(1 << bit), ERR)] {
            let mut world = World::start(1, features);
            assert_eq!(world.command_in(command, &[command.len()], 1), (vec![answer], 1), "{command:?}");
        }
    }
}

/// The frame's first bytes are looked at where they lie, and that is anywhere.
#[test]
fn buffers_may_be_cut_anywhere() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[7, 0]), OK);
    for cut in 1..=HEADER_BYTES + 20 {
        assert_eq!(world.admitted_in(&all(), &[cut, 1526 - cut]), of(&[0, 1, 5, 6, 8]), "{cut}");
    }
    let single: Vec<usize> = [HEADER_BYTES + 1].into_iter().chain([1; 14]).chain([1500]).collect();
    assert_eq!(world.admitted_in(&all(), &single), of(&[0, 1, 5, 6, 8]));
    let single: Vec<usize> = [1; 15].into_iter().chain([1500]).collect();
    assert_eq!(world.admitted_in(&all(), &single), of(&[0, 1, 5, 6, 8]));
}

#[test]
fn a_frame_may_be_cut_over_several_buffers() {
    let mut world = World::start(1, FEATURES | MERGEABLE);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(world.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[7, 0]), OK);
    let header: Vec<u8> = [0; 10].into_iter().chain([3, 0]).collect();
    for first in HEADER_BYTES..HEADER_BYTES + 18 {
        for declined in [to(OTHER), tagged(MAC, 8), tagged(OTHER, 7)] {
            world.lan_sends(0, &declined);
        }
        world.lan_sends(0, &tagged(MAC, 7));
        for bytes in [first, 2, 1600] {
            world.queues[0].offer(&[(bytes, true)]);
        }
        let mut received = Vec::new();
        for _ in 0..3 {
            let (at, bytes) = world.queues[0].used(LIMIT).expect("a part of the frame");
            let mut part = vec![0; bytes as usize];
            world.queues[0].memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            received.extend(part);
        }
        assert_eq!(received, [&header[..], &tagged(MAC, 7)].concat(), "{first}");
    }
    assert_eq!(world.figure("/frames/lan_filtered"), 3 * 18);
}
