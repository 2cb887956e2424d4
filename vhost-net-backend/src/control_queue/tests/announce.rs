//! A guest that has arrived by migration says so itself, if it can be asked to.

use super::*;

const UP: u32 = VIRTIO_NET_S_LINK_UP;
const UP_AND_ANNOUNCE: u32 = VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE;

fn acknowledge(world: &mut World) -> u8 {
    world.command(VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, &[])
}

fn hears_of_a_change(world: &mut World) {
    let mut message = [0; 12];
    world.requests.read_exact(&mut message).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload
    assert_eq!(message, *[2u32, 1, 0].map(u32::to_ne_bytes).concat());
}

#[test]
fn the_driver_is_asked_to_announce_itself() {
    let mut world = World::start(1, FEATURES);
    assert_eq!(world.status(), UP);
    for _ in 0..3 {
        world.send_rarp(MAC);
        hears_of_a_change(&mut world);
        assert_eq!(world.status(), UP_AND_ANNOUNCE);
        assert_eq!(world.command(VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, &[0]), ERR);
        assert_eq!(world.command(VIRTIO_NET_CTRL_ANNOUNCE, 1, &[]), ERR);
        assert_eq!(world.status(), UP_AND_ANNOUNCE, "no answer yet");
        assert_eq!(acknowledge(&mut world), OK);
        assert_eq!(world.status(), UP);
    }
    assert_eq!(acknowledge(&mut world), OK, "of what a back end before this one asked for");
    assert_eq!(world.lan_receives(MOMENT), None, "nobody spoke for it");
}

#[test]
fn a_request_holds_over_a_pause_and_not_over_a_reset() {
    let mut world = World::start(1, FEATURES);
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
    world.send_rarp(MAC);
    let next = world.stop();
    world.resume(&next);
    assert_eq!(world.status(), UP_AND_ANNOUNCE);
    world.reset();
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
    assert_eq!(world.status(), UP);
}

#[test]
fn a_driver_that_cannot_be_asked_is_spoken_for() {
    let spoken_for = |mut world: World| {
        world.send_rarp(OTHER);
        let frame = world.lan_receives(LIMIT).expect("a RARP request");
        assert_eq!(
            (&frame[..6], &frame[6..12], &frame[12..14]),
            (&BROADCAST[..], &OTHER[..], &[0x80, 0x35][..])
        );
        assert_eq!(world.status(), UP);
    };
    for bit in [VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS] {
        spoken_for(World::start(1, FEATURES & !(1 << bit)));
    }
    // the control queue is not here
    let mut world = World::connected(1, FEATURES);
    for index in 0..2 {
        world.start_queue(index, 0).unwrap();
    }
    spoken_for(world);
    let mut world = World::connected(1, FEATURES & !(1 << VIRTIO_NET_F_CTRL_VQ));
    for index in 0..2 {
        world.start_queue(index, 0).unwrap();
    }
    spoken_for(world);
    // the frontend cannot be told
    let mut world = World::start(1, FEATURES);
    let (gone, _) = UnixStream::pair().unwrap();
    world.frontend.set_backend_request_fd(&gone).unwrap();
    spoken_for(world);
}
