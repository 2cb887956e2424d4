//! An interface of the host, the test at the other end of its cable. Each test has a network namespace of its own; needs
//! root and `ip`, and is skipped otherwise.

use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4};

use super::*;
use crate::lan::LanError;
use crate::test_frames::{CLIENT, GUEST, Tcp, read};

const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for what must not happen to happen.
const MOMENT: Duration = Duration::from_millis(20);

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status();
    assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
}

/// Runs `test` with a network of its own, in which there is a cable from `port` to `peer`. One at a time: a program that is
/// being started holds copies of all sockets for a moment, and one that was closed would stay in its group.
fn with_cable(test: impl FnOnce() + Send + 'static) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let inside = thread::spawn(move || {
        // SAFETY: only this thread moves to a new network namespace, which shares nothing with others.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return;
        }
        for which in ["all", "default"] {
            drop(std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1"));
        }
        ip("link set lo up");
        ip("link add port type veth peer name peer");
        ip("link set peer up");
        test();
    });
    inside.join().unwrap();
}

fn open(pairs: usize, headers: bool) -> Vec<Packet> {
    let mut ports = Packet::open("port", pairs, headers).unwrap();
    ports[0].set_receiving(true).unwrap();
    ports
}

fn one(name: &str) -> Packet {
    let mut port = Packet::open(name, 1, false).unwrap().remove(0);
    port.set_receiving(true).unwrap();
    port
}

/// The next frame, with the header that the guest would have.
fn next(port: &mut Packet) -> Vec<u8> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match now(port) {
            Some(frame) => return frame,
            None => assert!(Instant::now() < deadline, "No frame"),
        }
    }
}

fn now(port: &mut Packet) -> Option<Vec<u8>> {
    let mut frame = vec![0xee; 70_000];
    let bytes = port.read(&mut frame).unwrap()?;
    frame.truncate(bytes);
    Some(frame)
}

/// Frames of the other side get lost without a word for a moment after a cable is plugged in: until one arrives.
fn await_cable(from: &Packet, to: &mut Packet) {
    let deadline = Instant::now() + LIMIT;
    loop {
        assert!(from.write(&datagram(9, 9)));
        if arrives(to, MOMENT) {
            break;
        }
        assert!(Instant::now() < deadline, "The cable does not work");
    }
    while arrives(to, MOMENT) {}
}

/// Whether a frame comes so soon, which is taken.
fn arrives(port: &mut Packet, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    loop {
        if now(port).is_some() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn sends(port: &Packet, header: [u8; 10], frame: &[u8]) {
    assert!(write_behind(port.outgoing(), &header, frame));
}

/// From one port to another, with a number in it.
fn datagram(port: u16, number: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9])
        .ipv4(CLIENT, GUEST, 64)
        .udp(port, 53)
        .write(&mut frame, &[number; 40])
        .unwrap();
    frame
}

fn tagged(frame: &[u8], protocol: [u8; 2], id: u8) -> Vec<u8> {
    [&frame[..12], &protocol, &[0x60, id], &frame[12..]].concat()
}

fn negotiated(bits: &[u32]) -> Offloads {
    Offloads::negotiated(bits.iter().fold(1 << VIRTIO_F_VERSION_1, |bits, bit| bits | 1 << bit))
}

#[test]
fn what_is_no_interface_is_refused() {
    with_cable(|| {
        for (name, said) in
            [("a/b", "no name"), ("nothing", "those of this network namespace"), ("lo", "no Ethernet")]
        {
            let error = Packet::open(name, 1, true).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
            assert!(matches!(error, LanError::Name(_) | LanError::Interface { .. }));
        }
    });
}

#[test]
fn an_interface_that_the_host_uses_is_found_out() {
    with_cable(|| {
        assert_eq!(interface::other_user("port"), None);
        ip("address add 10.0.0.1/24 dev port");
        assert_eq!(interface::other_user("port"), Some("has an address of this host"));
        ip("address flush dev port");
        assert_eq!(interface::other_user("port"), None);
        drop(std::fs::write("/proc/sys/net/ipv6/conf/port/disable_ipv6", "0"));
        ip("address add fd77::1/64 dev port nodad");
        assert_eq!(interface::other_user("port"), Some("has an address of this host"));
    });
}

#[test]
fn frames_pass_and_none_comes_back() {
    with_cable(|| {
        let mut port = Packet::open("port", 1, false).unwrap().remove(0);
        let mut peer = one("peer");
        await_cable(&port, &mut peer);
        assert!(peer.write(&datagram(1, 1)));
        assert!(!arrives(&mut port, MOMENT), "what came before the guest is not its");
        port.set_receiving(true).unwrap();
        await_cable(&peer, &mut port);
        for number in 0..100 {
            assert!(port.write(&datagram(1, number)));
            assert!(peer.write(&datagram(2, number)));
        }
        for number in 0..100 {
            assert_eq!(next(&mut peer), datagram(1, number));
            assert_eq!(next(&mut port), datagram(2, number));
        }
        assert!(!arrives(&mut port, MOMENT) && !arrives(&mut peer, MOMENT));
        assert!(port.segments_udp(), "on Linux 6.2 and later");
        assert_eq!(port.losses(), Losses::default());
    });
}

#[test]
fn tags_stay_on_their_frames() {
    with_cable(|| {
        let (mut port, mut peer) = (open(1, false).remove(0), one("peer"));
        await_cable(&peer, &mut port);
        await_cable(&port, &mut peer);
        let frame = datagram(1, 1);
        for tags in [
            tagged(&frame, [0x81, 0], 7),
            tagged(&frame, [0x88, 0xa8], 7),
            tagged(&tagged(&frame, [0x81, 0], 7), [0x88, 0xa8], 8),
            frame.clone(),
        ] {
            assert!(peer.write(&tags));
            assert_eq!(next(&mut port), tags);
            assert!(port.write(&tags));
            assert_eq!(next(&mut peer), tags);
        }
    });
}

#[test]
fn what_is_left_and_was_negotiated_passes_and_else_is_done() {
    with_cable(|| {
        let (mut port, peer) = (open(1, true).remove(0), one("peer"));
        await_cable(&peer, &mut port);
        let data: Vec<u8> = (0..5000).map(|at| at as u8).collect();
        let mut frame = Tcp { from_client: true, ack: Some(1), data: &data, ..Tcp::default() }.frame();
        // only the pseudo header is summed up
        let bytes = (frame.len() - 34) as u32;
        let pseudo = !crate::packet::checksum::of(&[&frame[26..34], &bytes.to_be_bytes(), &[0, 6]]);
        frame[50..52].copy_from_slice(&pseudo.to_be_bytes());
        let header = |tag: u8| [1, 1, 54 + tag, 0, 0xe8, 3, 34 + tag, 0, 16, 0];
        for tags in [false, true] {
            let (frame, tag) = if tags { (tagged(&frame, [0x81, 0], 7), 4) } else { (frame.clone(), 0) };
            let sent = header(tag);
            port.set_offloads(negotiated(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4]));
            sends(&peer, sent, &frame);
            let received = next(&mut port);
            // the kernel says how long the headers are in its own way
            assert_eq!(received[..2], sent[..2]);
            assert_eq!(received[4..10], sent[4..10]);
            assert!(received[12..] == frame);
            for negotiated in [negotiated(&[]), negotiated(&[VIRTIO_NET_F_GUEST_CSUM])] {
                port.set_offloads(negotiated);
                sends(&peer, sent, &frame);
                let mut payload = Vec::new();
                for number in 0..5 {
                    let segment = next(&mut port);
                    // all of the frame was in the buffers of the first segment
                    let whole = 12 + frame.len() - usize::from(tag);
                    assert_eq!(port.take_touched(), (number == 0).then_some(whole));
                    assert_eq!(segment[..12], [0; 12]);
                    let untagged = match &segment[12..] {
                        segment if tags => {
                            assert_eq!(segment[12..16], frame[12..16]);
                            [&segment[..12], &segment[16..]].concat()
                        }
                        segment => segment.to_vec(),
                    };
                    // its checksums must be right
                    let seen = read(&untagged);
                    assert_eq!(seen.data.len(), 1000);
                    payload.extend(seen.data);
                }
                assert!(payload == data);
                assert!(!arrives(&mut port, MOMENT));
            }
        }
        // a checksum alone
        port.set_offloads(negotiated(&[]));
        let small = &datagram(1, 1)[..];
        let mut partial = small.to_vec();
        let pseudo = !crate::packet::checksum::of(&[&small[26..34], &48u32.to_be_bytes(), &[0, 17]]);
        partial[40..42].copy_from_slice(&pseudo.to_be_bytes());
        sends(&peer, [1, 0, 0, 0, 0, 0, 34, 0, 6, 0], &partial);
        assert_eq!(next(&mut port), [&[0; 12], small].concat());
        assert_eq!(port.losses(), Losses::default());
    });
}

#[test]
fn a_frame_arrives_once_whichever_pairs_receive() {
    const FLOWS: u16 = 64;
    with_cable(|| {
        let (mut ports, peer) = (open(4, false), one("peer"));
        await_cable(&peer, &mut ports[0]);
        for (receiving, round) in [(1, 0), (4, 1), (2, 2), (3, 3), (1, 4)] {
            for port in &mut ports[1..] {
                port.set_receiving(false).unwrap();
            }
            for port in &mut ports[1..receiving] {
                port.set_receiving(true).unwrap();
            }
            (1..=FLOWS).for_each(|flow| assert!(peer.write(&datagram(flow, round))));
            let mut seen: Vec<Vec<u8>> = Vec::new();
            let mut used = [false; 4];
            let mut deadline = Instant::now() + LIMIT;
            let mut all = false;
            while Instant::now() < deadline {
                for (port, used) in ports.iter_mut().zip(&mut used) {
                    let before = seen.len();
                    seen.extend(std::iter::from_fn(|| now(port)));
                    *used |= seen.len() > before;
                }
                // and a moment for what there is too much
                if seen.len() >= usize::from(FLOWS) && !std::mem::replace(&mut all, true) {
                    deadline = Instant::now() + MOMENT;
                }
            }
            seen.sort();
            let sent: Vec<_> = (1..=FLOWS).map(|flow| datagram(flow, round)).collect();
            assert!(seen == sent, "{receiving} pairs: {} frames", seen.len());
            assert_eq!(used, std::array::from_fn(|pair| pair < receiving));
            // and nothing of what any of them sends
            assert!(ports[3].write(&datagram(1, 1)));
            assert!(ports.iter_mut().all(|port| !arrives(port, MOMENT)));
        }
    });
}

#[test]
fn what_there_is_no_room_for_is_counted() {
    with_cable(|| {
        let (mut port, peer) = (open(1, false).remove(0), one("peer"));
        await_cable(&peer, &mut port);
        let mut sent = 0;
        while port.losses().missed == 0 {
            assert!(peer.write(&[&datagram(1, 1)[..], &[0; 1400]].concat()));
            sent += 1;
            assert!(sent < 100_000, "no end of room");
        }
        let mut got = 0;
        while arrives(&mut port, MOMENT) {
            got += 1;
        }
        assert!(got > 1000, "room for {got} frames");
        // a machine that is busy may lose some on the way
        assert!(got + port.losses().missed <= sent);
    });
}

#[test]
fn an_interface_may_be_down_for_a_while_but_not_be_removed() {
    with_cable(|| {
        let (mut port, peer) = (open(1, false).remove(0), one("peer"));
        for round in 0..3 {
            ip("link set port down");
            assert_eq!(now(&mut port), None);
            assert!(port.sleep_max().is_some(), "to be looked after");
            assert!(!port.write(&datagram(1, 1)));
            ip("link set port up");
            await_cable(&peer, &mut port);
            assert!(peer.write(&datagram(1, round)));
            assert_eq!(next(&mut port), datagram(1, round));
            assert_eq!(port.sleep_max(), None);
        }
        ip("link delete port");
        let deadline = Instant::now() + LIMIT;
        let error = loop {
            match port.read(&mut [0; 100]) {
                Ok(None) => assert!(Instant::now() < deadline, "It is gone and nobody notices"),
                Ok(Some(bytes)) => panic!("{bytes} bytes"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), "Interface port was removed");
    });
}
