//! A driver that sends and receives by any chains, and a LAN that sends anything, beside a model of what comes of it.

mod driver;
mod model;
mod seeds;

use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use colo::control::{Command, EventSender};
use colo::runtime::{Sender, mailbox};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vhost_net_backend::device::NetDevice;
use vhost_net_backend::lan::{Port, Tap};
use vhost_net_backend::proxy;
use vhost_net_backend::worker::{Order, Settings, Worker};

use self::driver::Driver;
use self::model::{Figures, Request};
use super::input::Input;
pub(super) use seeds::seeds;

/// The device, and its surroundings.
struct Stand {
    device: NetDevice,
    orders: Sender<Order>,
    lan: OwnedFd,
    /// The device's own end.
    tap: OwnedFd,
}

impl Stand {
    fn new() -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (lan, tap) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let (orders, mailbox) = mailbox().unwrap();
        let settings =
            Settings { pair: 0, protected: false, window: Duration::ZERO, proxy: proxy::Config::default() };
        let port = Port::Tap(Tap::from_packets(tap.try_clone().unwrap(), true));
        let worker = Worker::new(port, mailbox, EventSender::default(), settings);
        std::thread::spawn(|| worker.run());
        Self { device: NetDevice::new(vec![orders.clone()], 0, None), orders, lan, tap }
    }

    /// The figures, the rings that run, and how many of these are broken.
    fn status(&self) -> (Figures, [u64; 2]) {
        let (reply, answer) = crossbeam_channel::bounded(1);
        assert!(self.orders.send(Order::Command { command: Command::Status, link: None, reply }).is_ok());
        let status = answer.recv().expect("the worker has ended").unwrap();
        let frames = |name: &str| status["frames"][name].as_u64().unwrap();
        for name in ["lan_filtered", "lan_missed", "lan_unusable"] {
            assert_eq!(frames(name), 0);
        }
        let figures = Figures {
            guest_frames: frames("guest_frames"),
            guest_bytes: frames("guest_bytes"),
            guest_malformed: frames("guest_malformed"),
            guest_too_long: frames("guest_too_long"),
            lan_frames: frames("lan_frames"),
            lan_bytes: frames("lan_bytes"),
            lan_refused: frames("lan_refused"),
            lan_ignored: frames("lan_ignored"),
        };
        (figures, ["rings_running", "rings_broken"].map(|name| status[name].as_u64().unwrap()))
    }
}

/// A length around those that make a difference.
fn frame_bytes(input: &mut Input<'_>, header_bytes: usize) -> usize {
    match input.byte() % 16 {
        0 => 0,
        1 => 13,
        2 => 14,
        3 => 15,
        4 => 1514,
        5 => 1522,
        6 => 1523,
        7 => 2048 - header_bytes,
        8 => 2049 - header_bytes,
        9 => 65_557,
        10 => 65_558,
        11 => usize::from(input.word()),
        12 | 13 => usize::from(input.word() % 3000),
        _ => 14 + usize::from(input.byte()),
    }
}

/// A header as it is in the input, or nearly sound.
fn header(input: &mut Input<'_>, frame_bytes: usize) -> [u8; 12] {
    let mut header = [0; 12];
    let kind = input.byte();
    match kind % 4 {
        0 => {}
        1 => {
            let bytes = input.bytes(12);
            header[..bytes.len()].copy_from_slice(bytes);
        }
        _ => {
            let places = input.byte();
            header[0] = u8::from(kind & 4 == 0) | (kind & 8) >> 2;
            header[1] = [0, 1, 4, 5, 0x81, 0x84, 3, 0x80][usize::from(kind >> 4 & 7)];
            let start = [34, 14, 13, frame_bytes.wrapping_sub(2)][usize::from(places & 3)];
            let offset = match places >> 2 & 3 {
                0 => 16,
                1 => 0,
                2 => frame_bytes.wrapping_sub(start).wrapping_sub(2),
                _ => frame_bytes.wrapping_sub(start).wrapping_sub(1),
            };
            let size = [1448, 0, 1, 0xffff][usize::from(places >> 4 & 3)];
            let length = [54, 0, frame_bytes, 0xffff][usize::from(places >> 6)];
            for (at, word) in [length, size, start, offset].into_iter().enumerate() {
                header[2 + 2 * at..4 + 2 * at].copy_from_slice(&(word as u16).to_le_bytes());
            }
            header[10] = kind;
        }
    }
    header
}

/// Cuts so many bytes into pieces of any lengths.
fn cuts(input: &mut Input<'_>, bytes: usize) -> Vec<u32> {
    let count = input.byte();
    let mut left = bytes as u32;
    let mut pieces = Vec::new();
    if count >= 250 {
        // as many as a chain has, or nearly
        let count = 1018 + u32::from(input.byte() % 8);
        pieces.extend((0..count - 1).map(|at| 1 + at % 3).take_while(|piece| {
            let fits = *piece < left;
            left -= if fits { *piece } else { 0 };
            fits
        }));
    } else {
        for _ in 0..count % 12 {
            let cut = u32::from(input.byte());
            let piece = if cut < 128 { cut } else { (cut - 127) * 64 };
            pieces.push(piece.min(left));
            left -= piece.min(left);
        }
    }
    pieces.push(left);
    pieces
}

/// Anything that a driver and a LAN do.
pub fn frames(data: &[u8]) {
    // one device for all, and one driver at a time
    static STAND: OnceLock<Mutex<Stand>> = OnceLock::new();
    let stand = STAND.get_or_init(|| Mutex::new(Stand::new())).lock().unwrap();
    let mut input = Input(data);
    let mut driver = Driver::new(&stand, &mut input);
    while !input.is_empty() {
        match input.byte() % 16 {
            0..=3 => driver.offer_frame(&mut input),
            4..=6 => driver.offer_buffers(&mut input),
            7 | 8 => driver.lan_sends(&mut input),
            9 => driver.offer_malformed(&mut input),
            10 => driver.restart(&mut input),
            11 => driver.set_link(input.byte() % 2 == 0),
            12 => driver.fill_lan(input.byte() % 2 == 0),
            _ => driver.settle(input.byte()),
        }
    }
    driver.finish();
}
