//! A driver that says anything on the control queue.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use colo::control::EventSender;
use colo::memory::PAGE_BYTES;
use colo::runtime::mailbox;
use colo::vhost_user::{Device, Ring, RingSetup};
use rustix::event::{EventfdFlags, eventfd};
use vhost_net_backend::control_queue::{Card, FILTERED_BYTES, State};
use vhost_net_backend::device::{Config, MacAddress, NetDevice};
use vhost_net_backend::lan::{Null, Port};
use vhost_net_backend::proxy;
use vhost_net_backend::worker::{Settings, Worker};
use vm_memory::GuestAddress;

use super::input::Input;
use super::model::{self, Mac, Model};
use super::ram::Ram;

pub const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];
const CTRL_VQ: u64 = 1 << 17;
/// Every feature that a command needs.
const FEATURES: [u32; 6] = [
    model::CTRL_RX,
    model::CTRL_VLAN,
    model::CTRL_RX_EXTRA,
    model::GUEST_ANNOUNCE,
    model::MQ,
    model::CTRL_MAC_ADDR,
];

/// The features of which a byte has the bit, and the control queue.
fn features(byte: u8) -> u64 {
    let chosen = FEATURES.iter().enumerate().filter(|(at, _)| byte >> at & 1 == 1);
    chosen.fold(CTRL_VQ, |bits, (_, bit)| bits | 1 << bit)
}

/// The library part and the model, side by side.
pub struct Both {
    card: Card,
    state: State,
    model: Model,
}

impl Both {
    pub fn new(features: u64, pairs_max: u16, is_heard: bool) -> Self {
        let card = Card { features, mac: MAC, pairs_max };
        let state = if is_heard { State::reset(&card) } else { State::unknown(&card) };
        Self { card, state, model: Model::new(features, MAC, pairs_max, is_heard) }
    }

    /// Gives both a command. Returns whether it was one.
    pub fn command(&mut self, command: &[u8]) -> bool {
        let before = self.state.clone();
        let done = self.state.carry_out(&self.card, command);
        assert_eq!(done.is_ok(), self.model.command(command), "{command:x?}: {done:?}");
        if done.is_err() {
            assert!(self.state == before, "{command:x?} was refused and has changed something");
        }
        assert_eq!(self.state.pairs(), self.model.pairs);
        assert_eq!(self.state.mac(), self.model.mac_is_known.then_some(self.model.mac));
        self.compare(command);
        done.is_ok()
    }

    /// Frames that the two may differ about.
    fn compare(&self, command: &[u8]) {
        let model = &self.model;
        let fixed = [MAC, model.mac, [0xff; 6], [2; 6], [3; 6]];
        let mut vlans = vec![0, 1, 4095];
        if let Some([low, high]) = command.get(2..4) {
            vlans.push(u16::from_le_bytes([*low, *high]));
        }
        let tables = model.unicast.iter().chain(&model.multicast).take(4);
        for to in fixed.iter().chain(tables) {
            self.frame(&[&to[..], &[7; 6], &[0x08, 0x00, 0, 1]].concat());
            for vlan in &vlans {
                self.frame(&[&to[..], &[7; 6], &[0x81, 0x00], &vlan.to_be_bytes()].concat());
            }
        }
    }

    /// Shows both a frame, of which the first bytes are enough.
    pub fn frame(&self, frame: &[u8]) {
        let filter = self.state.filter();
        let admits = filter.admits(frame);
        assert!(admits || !filter.admits_all());
        if frame.len() >= FILTERED_BYTES {
            assert_eq!(admits, self.model.admits(frame), "{frame:x?}: {:?}", self.model);
            assert_eq!(admits, filter.admits(&frame[..FILTERED_BYTES]));
        }
    }
}

const RAM_BYTES: u64 = 64 << 10;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const COMMAND: u64 = 0x3000;
const SIZE: u16 = 16;
/// Queue pairs of the device.
const PAIRS: usize = 3;

/// A driver with nothing but a control queue.
struct Driver {
    ram: Ram,
    kick: Arc<OwnedFd>,
    index: usize,
    next: u16,
}

impl Driver {
    fn new(index: usize, next: u16) -> Self {
        let kick = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let mut driver = Self { ram: Ram::new(RAM_BYTES, &[], &[0]), kick, index, next };
        for at in [AVAILABLE, USED] {
            driver.ram.write(at + 2, &next.to_le_bytes());
        }
        driver
    }

    fn start(&self, device: &NetDevice) {
        let setup = RingSetup {
            index: self.index,
            size: SIZE,
            descriptors: GuestAddress(0),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(USED),
            next_available: self.next,
            event_idx: self.next % 2 == 1,
            memory: self.ram.table.memory().clone(),
            kick: Some(self.kick.clone()),
            call: None,
            error: None,
            broken_rings: Arc::default(),
            inflight: None,
        };
        device.start_queue(self.index, Ring::new(setup).unwrap()).unwrap();
    }

    /// Gives a command, cut into pieces of these lengths, as far as they go, with room for an answer. Returns the answer, if
    /// there was room; nothing else in memory has changed, and what has is marked.
    fn command(&mut self, command: &[u8], cuts: &[u8], room: u32) -> Option<u8> {
        self.ram.write(COMMAND, command);
        let answer = COMMAND + command.len() as u64;
        self.ram.write(answer, &[0xee]);
        let mut pieces = Vec::new();
        let mut left = command.len() as u32;
        for cut in cuts.iter().take(usize::from(SIZE) - 2) {
            let bytes = u32::from(*cut).min(left);
            pieces.push((bytes, 0));
            left -= bytes;
        }
        pieces.push((left, 0));
        pieces.push((room, 2));
        let mut at = COMMAND;
        for (number, (bytes, flags)) in pieces.iter().enumerate() {
            let last = number + 1 == pieces.len();
            let flags = *flags | u16::from(!last);
            let next = if last { 0 } else { number as u16 + 1 };
            let words =
                [&at.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
            self.ram.write(16 * number as u64, &words.concat());
            at += u64::from(*bytes);
        }
        self.next = self.next.wrapping_add(1);
        self.ram.write(AVAILABLE + 2, &self.next.to_le_bytes());
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.ram.word(USED + 2) != self.next {
            assert!(Instant::now() < deadline, "the command is not answered");
            std::thread::yield_now();
        }
        let memory = self.ram.read();
        let used = USED as usize..USED as usize + PAGE_BYTES;
        self.ram.shadow[used.clone()].copy_from_slice(&memory[used]);
        let ack = memory[answer as usize];
        self.ram.shadow[answer as usize] = ack;
        assert!(memory == self.ram.shadow, "something else was written");
        let marked = self.ram.marked();
        assert!(marked.contains(USED / PAGE_BYTES as u64));
        assert_eq!(marked.contains(answer / PAGE_BYTES as u64), room > 0);
        assert!(room > 0 || ack == 0xee);
        (room > 0).then_some(ack)
    }
}

fn device() -> Arc<NetDevice> {
    let mut workers = Vec::new();
    for pair in 0..PAIRS {
        let (orders, mailbox) = mailbox().unwrap();
        let settings =
            Settings { pair, protected: false, window: Duration::ZERO, proxy: proxy::Config::default() };
        let worker = Worker::new(Port::Null(Null::Drop), mailbox, EventSender::default(), settings);
        std::thread::spawn(|| worker.run());
        workers.push(orders);
    }
    let mut device = NetDevice::new(workers, 0, Some(Config { mac: MacAddress(MAC), mtu: 1500 }));
    let control_queue = device.add_control_queue().unwrap().unwrap();
    std::thread::spawn(|| control_queue.run());
    Arc::new(device)
}

/// Any commands: the library part does what the model does, and so does the device, whose queue is stopped and started
/// meanwhile.
pub fn control_queue(data: &[u8]) {
    // one device for all, and one driver at a time
    static DEVICE: OnceLock<Mutex<Arc<NetDevice>>> = OnceLock::new();
    let mut input = Input(data);
    let (setup, chosen) = (input.byte(), features(input.byte()));
    let is_heard = setup & 1 == 0;
    let whole = setup & 2 == 0;
    let pairs_max = if whole { PAIRS as u16 } else { u16::from(setup >> 4) + 1 };
    let mut both = Both::new(chosen, pairs_max, is_heard);
    let device = whole.then(|| DEVICE.get_or_init(|| Mutex::new(device())).lock().unwrap());
    let mut driver = device.as_ref().map(|device| {
        device.set_features(chosen);
        let index = if chosen >> model::MQ & 1 == 1 { 2 * PAIRS } else { 2 };
        let next = if is_heard { 0 } else { u16::from(setup >> 4) + 1 };
        let driver = Driver::new(index, next);
        driver.start(device);
        driver
    });
    while !input.is_empty() {
        match input.byte() {
            op @ 0..=199 => {
                // mostly short; the long ones are tables
                let bytes = if op < 150 { usize::from(op % 12) } else { usize::from(input.word() % 900) };
                let command = input.bytes(bytes);
                let done = both.command(command);
                let (Some(driver), Some(device)) = (&mut driver, &device) else { continue };
                let cuts = input.byte();
                let cuts = input.bytes(usize::from(cuts % 15));
                if let Some(ack) = driver.command(command, cuts, 1 + u32::from(op % 3)) {
                    assert_eq!(ack, u8::from(!done), "{command:x?}");
                }
                assert_eq!(device.config_bytes()[..6], both.model.mac);
            }
            200..=239 => {
                let bytes = usize::from(input.byte() % 24);
                both.frame(input.bytes(bytes));
            }
            // a command without room for its answer
            240..=247 => {
                if let Some(driver) = &mut driver {
                    driver.command(&[0, 0, 0], &[], 0);
                }
            }
            // a pause; before the first command it is none
            _ => {
                if let (Some(driver), Some(device)) = (&driver, &device) {
                    assert_eq!(device.stop_queue(driver.index), driver.next);
                    if driver.next == 0 {
                        both = Both::new(chosen, pairs_max, true);
                    }
                    driver.start(device);
                }
            }
        }
    }
    if let (Some(driver), Some(device)) = (driver, device) {
        assert_eq!(device.stop_queue(driver.index), driver.next);
    }
}

/// Seeds from which a fuzzer finds its way: what a sound driver says.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let table = |unicast: u8, multicast: u8| {
        let mut bytes = vec![1, 0, unicast, 0, 0, 0];
        bytes.extend((0..unicast).flat_map(|number| [2, 0, 0, 0, 0, number]));
        bytes.extend([multicast, 0, 0, 0]);
        bytes.extend((0..multicast).flat_map(|number| [3, 0, 0, 0, 0, number]));
        bytes
    };
    let commands = [
        vec![0, 0, 0],
        vec![0, 1, 1],
        vec![0, 2, 1],
        vec![0, 3, 1],
        vec![0, 4, 0],
        vec![0, 5, 1],
        vec![1, 1, 2, 0, 0, 0, 0, 9],
        vec![2, 0, 7, 0],
        vec![2, 1, 7, 0],
        vec![3, 0],
        vec![4, 0, 1, 0],
        table(0, 0),
        table(1, 2),
        table(3, 70),
    ];
    let mut seeds = Vec::new();
    for (setup, chosen) in [(0, 0x3f), (0x51, 0x3f), (2, 0x3f), (0xf3, 0x3f), (0, 0x1f), (2, 0x0b)] {
        let mut seed = vec![setup, chosen];
        for command in &commands {
            if command.len() < 12 {
                seed.push(command.len() as u8 + 12 * (command[0] % 3));
            } else {
                seed.push(160);
                seed.extend((command.len() as u16).to_le_bytes());
            }
            seed.extend(command);
            if setup & 2 == 0 {
                seed.extend([3, 1, 2, 4]);
            }
            seed.extend([210, 16, 2, 0, 0, 0, 0, 9, 7, 7, 7, 7, 7, 7, 0x81, 0, 0, 7]);
            seed.push(250);
        }
        seed.push(240);
        seeds.push(("control_queue", seed));
    }
    seeds
}
