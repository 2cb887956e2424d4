//! A tap of the kernel's with two queues, in a network of its own. Needs root and `ip`; skipped otherwise.
#![expect(unsafe_code, reason = "unshare of a network namespace has no safe wrapper")]

use std::net::UdpSocket;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::lan::TapOptions;

/// So many flows that the kernel gives some to either queue.
const FLOWS: usize = 64;

/// A thread in a network of its own whose only way out are the taps. It sends one datagram of each flow to an address, for
/// each that it gets.
fn network() -> Option<(Vec<Tap>, Sender<&'static str>)> {
    let (made, taps): (_, Receiver<Vec<Tap>>) = channel();
    let (sender, wanted): (_, Receiver<&str>) = channel();
    std::thread::spawn(move || {
        // SAFETY: only this thread moves to a new network namespace, which shares nothing with others.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return;
        }
        let options = TapOptions { queues: 2, headers: true };
        let Ok(taps) = Tap::open("eth0", options) else {
            return;
        };
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        for arguments in [
            "addr add 10.0.0.1/24 dev eth0",
            "neigh add 10.0.0.9 lladdr 52:54:00:00:00:01 dev eth0",
            "neigh add 10.0.0.8 lladdr 52:54:00:00:00:02 dev eth0",
        ] {
            let done = Command::new("ip").args(arguments.split(' ')).status();
            assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
        }
        made.send(taps).unwrap();
        let sockets: Vec<_> = (0..FLOWS).map(|_| UdpSocket::bind("10.0.0.1:0").unwrap()).collect();
        for address in wanted {
            for socket in &sockets {
                socket.send_to(&[7; 20], (address, 9)).unwrap();
            }
        }
    });
    Some((taps.recv().ok()?, sender))
}

/// Datagrams that come to either pair until there are `count`, and for a moment longer.
fn received(world: &mut World, count: usize) -> [usize; 2] {
    let mut received = [0; 2];
    let mut end = Instant::now() + LIMIT;
    while Instant::now() < end {
        for (pair, received) in received.iter_mut().enumerate() {
            while world.queues[2 * pair].available.wrapping_sub(world.queues[2 * pair].seen) < 4 {
                world.queues[2 * pair].offer(&[(1526, true)]);
            }
            while let Some(frame) = world.received(pair, Duration::ZERO) {
                // of IPv4, and UDP in it
                *received += usize::from(frame[12..14] == [8, 0] && frame[23] == 17);
            }
        }
        if received[0] + received[1] >= count && end > Instant::now() + MOMENT {
            end = Instant::now() + MOMENT;
        }
    }
    received
}

#[test]
fn what_the_kernel_has_for_a_pair_that_is_not_used_comes_to_the_first() {
    let Some((taps, send)) = network() else {
        println!("skipped: no network namespace");
        return;
    };
    let mut world = World::connect(device_on(taps), Vec::new(), ram(), FEATURES | MQ).begun();
    let to = |send: &Sender<&'static str>, address| send.send(address).unwrap();
    world.mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
    for _ in 0..3 {
        to(&send, "10.0.0.9");
        assert_eq!(received(&mut world, FLOWS), [FLOWS, 0]);
        let pairs = |world: &mut World, pairs: u8| {
            world.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &[pairs, 0])
        };
        assert_eq!(pairs(&mut world, 2), OK);
        to(&send, "10.0.0.9");
        let [first, second] = received(&mut world, FLOWS);
        assert!(first > 0 && second > 0 && first + second == FLOWS, "{first}, {second}");
        // both pairs decline what is another's
        let before = world.figure("/frames/lan_filtered");
        to(&send, "10.0.0.8");
        let deadline = Instant::now() + LIMIT;
        while world.figure("/frames/lan_filtered") < before + FLOWS as u64 {
            assert!(Instant::now() < deadline, "too few were declined");
        }
        assert_eq!(received(&mut world, 0), [0, 0]);
        assert_eq!(pairs(&mut world, 1), OK);
    }
}
