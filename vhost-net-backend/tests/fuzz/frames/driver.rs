//! The driver and the LAN, and what they see of the device.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use colo::memory::{PAGE_BYTES, PageSet};
use colo::vhost_user::{CHAIN_DESCRIPTORS_MAX, Device, Ring, RingSetup};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::GuestAddress;

use super::super::ram::Ram;
use super::model::{self, Model, Piece, Queue};
use super::{Input, Request, Stand, cuts, frame_bytes, header};

const RX: usize = 0;
const TX: usize = 1;

// of each queue, one after the other
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const QUEUE_BYTES: u64 = 0x3000;
/// Indirect tables, short ones and some that take every chain.
const TABLES: u64 = 0x6000;
const TABLE_BYTES: u64 = 0x200;
const TABLES_COUNT: usize = 64;
const TABLE_ENTRIES: usize = 30;
const LONG_TABLES: u64 = 0xe000;
const LONG_TABLE_BYTES: u64 = 0x4400;
const LONG_TABLES_COUNT: usize = 2;
/// Buffers for what is received, and what is sent.
const RECEIVE: u64 = 0x17000;
const TRANSMIT: u64 = 0x3b000;
const RAM_BYTES: u64 = 0x50000;

const CUTS: [&[u64]; 3] = [&[], &[0x28000, 0x40000], &[0x20000, 0x21000, 0x3c000]];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What the LAN's queue is filled with.
const FILLER: [u8; 1] = [0xdd];

/// What a chain keeps until it is used.
struct Kept {
    descriptors: Vec<u16>,
    table: Option<usize>,
    buffers: Vec<Piece>,
}

/// One queue, as the driver sees it.
struct Side {
    base: u64,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    free: Vec<u16>,
    kept: HashMap<u16, Kept>,
    /// Not made available yet.
    made: Vec<Request>,
    available: u16,
    used: u16,
}

impl Side {
    fn new(queue: usize) -> Self {
        let event = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        Self {
            base: QUEUE_BYTES * queue as u64,
            kick: event(),
            call: event(),
            free: Vec::new(),
            kept: HashMap::new(),
            made: Vec::new(),
            available: 0,
            used: 0,
        }
    }
}

pub(super) struct Driver<'a> {
    stand: &'a Stand,
    ram: Ram,
    size: u16,
    event_idx: bool,
    cuts: usize,
    sides: [Side; 2],
    model: Model,
    tables: Vec<usize>,
    long_tables: Vec<usize>,
    /// What of the buffers for receiving is the device's.
    owned: Vec<bool>,
    cursor: usize,
    broken_rings: Arc<AtomicU64>,
    breaks: u64,
    fillers: usize,
    /// What the LAN will send at the next look, and what it got since the last one.
    packets: Vec<Vec<u8>>,
    got: Vec<Vec<u8>>,
    /// Room for one.
    packet: Vec<u8>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(stand: &'a Stand, input: &mut Input<'_>) -> Self {
        let (setup, chosen) = (input.byte(), input.word());
        let bits = [
            model::VERSION_1,
            model::MRG_RXBUF,
            model::CSUM,
            model::HOST_TSO4,
            model::HOST_TSO6,
            model::HOST_ECN,
            model::HOST_USO,
            model::GUEST_TSO4,
            model::GUEST_TSO6,
            model::GUEST_ECN,
            model::GUEST_USO4,
            model::GUEST_USO6,
        ];
        let bits = bits.iter().enumerate().filter(|(at, _)| chosen >> at & 1 == 1);
        let features = bits.fold(0, |features, (_, bit)| features | 1 << bit);
        let size = [8, 16, 64, 256][usize::from(setup % 4)];
        let cuts = usize::from(setup >> 3) % CUTS.len();
        let mut ram = Ram::new(RAM_BYTES, CUTS[cuts], noise());
        ram.write(0, &[0; TABLES as usize]);
        let mut driver = Self {
            stand,
            ram,
            size,
            event_idx: setup & 4 != 0,
            cuts,
            sides: [Side::new(RX), Side::new(TX)],
            model: Model::new(features, size, stand.status().0),
            tables: (0..TABLES_COUNT).collect(),
            long_tables: (TABLES_COUNT..TABLES_COUNT + LONG_TABLES_COUNT).collect(),
            owned: vec![false; (TRANSMIT - RECEIVE) as usize],
            cursor: 0,
            broken_rings: Arc::default(),
            breaks: 0,
            fillers: 0,
            packets: Vec::new(),
            got: Vec::new(),
            packet: vec![0; 70_000],
        };
        stand.device.set_features(features);
        for queue in [RX, TX] {
            driver.sides[queue].free = (0..size).collect();
            driver.start(queue);
        }
        driver
    }

    fn queue(&mut self, queue: usize) -> &mut Queue {
        if queue == RX { &mut self.model.receive } else { &mut self.model.transmit }
    }

    fn start(&mut self, queue: usize) {
        let side = &self.sides[queue];
        let setup = RingSetup {
            index: queue,
            size: self.size,
            descriptors: GuestAddress(side.base),
            available: GuestAddress(side.base + AVAILABLE),
            used: GuestAddress(side.base + USED),
            next_available: if queue == RX { self.model.receive.next } else { self.model.transmit.next },
            event_idx: self.event_idx,
            memory: self.ram.table.memory().clone(),
            kick: Some(side.kick.clone()),
            call: Some(side.call.clone()),
            error: None,
            broken_rings: self.broken_rings.clone(),
            inflight: None,
        };
        self.stand.device.start_queue(queue, Ring::new(setup).unwrap()).unwrap();
        let cuts = CUTS[self.cuts].to_vec();
        let queue = self.queue(queue);
        (queue.runs, queue.cuts) = (true, cuts);
    }

    fn stop(&mut self, queue: usize) {
        let next = self.stand.device.stop_queue(queue);
        let expected = self.queue(queue).stop();
        if queue == RX {
            self.model.small_frames = 0;
        }
        let seen = self.queue(queue);
        if !seen.broken && !seen.claims {
            assert_eq!(next, expected);
            return;
        }
        // the driver must reset the device
        *seen = Queue::default();
        for head in self.sides[queue].kept.keys().copied().collect::<Vec<_>>() {
            self.release(queue, head);
        }
        let side = &mut self.sides[queue];
        (side.available, side.used) = (0, 0);
        side.made.clear();
        let base = side.base;
        self.ram.write(base + AVAILABLE, &[0; 4]);
        self.ram.write(base + USED, &[0; 4]);
    }

    pub(super) fn restart(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let queue = usize::from(how % 2);
        self.settle(how);
        if self.queue(queue).runs {
            self.stop(queue);
            if how & 2 != 0 {
                self.settle(how);
            }
            if how & 4 != 0 {
                return;
            }
        }
        if how & 8 != 0 {
            self.cuts = usize::from(how >> 4) % CUTS.len();
            self.ram.cut(CUTS[self.cuts]);
        }
        self.wish(queue, how);
        self.start(queue);
        self.settle(how);
    }

    pub(super) fn set_link(&mut self, up: bool) {
        self.settle(0);
        for queue in [RX, TX] {
            self.wish(queue, 0);
        }
        self.stand.device.set_link(up);
        self.model.link_up = up;
        self.settle(0);
    }

    /// Fills the LAN's queue, or lets the LAN take all that is there.
    pub(super) fn fill_lan(&mut self, full: bool) {
        self.settle(0);
        if full {
            while rustix::io::write(&self.stand.tap, &FILLER).is_ok() {
                self.fillers += 1;
            }
        }
        self.model.full = full;
        self.settle(0);
    }

    fn release(&mut self, queue: usize, head: u16) {
        let kept = self.sides[queue].kept.remove(&head).expect("a chain that was given");
        self.sides[queue].free.extend(kept.descriptors);
        match kept.table {
            Some(table) if table < TABLES_COUNT => self.tables.push(table),
            table => self.long_tables.extend(table),
        }
        for (at, bytes) in kept.buffers {
            self.owned[(at - RECEIVE) as usize..][..bytes as usize].fill(false);
        }
    }

    fn write_descriptor(&mut self, at: u64, (address, bytes): Piece, flags: u16, next: u16) {
        let fields =
            [&address.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.ram.write(at, &fields.concat());
    }

    /// Where a table of so many entries may be.
    fn table(&mut self, entries: usize) -> Option<(usize, u64)> {
        if entries <= TABLE_ENTRIES {
            let table = self.tables.pop()?;
            return Some((table, TABLES + table as u64 * TABLE_BYTES));
        }
        let table = self.long_tables.pop()?;
        Some((table, LONG_TABLES + (table - TABLES_COUNT) as u64 * LONG_TABLE_BYTES))
    }

    /// Makes a chain: in the ring's own table, in a table of its own, or first there and then here. Without room for it
    /// nothing happens.
    fn offer(&mut self, queue: usize, input: &mut Input<'_>, readable: Vec<Piece>, writable: Vec<Piece>) {
        let shape = input.byte();
        let flags =
            |pieces: &[Piece], flags| pieces.iter().map(move |piece| (*piece, flags)).collect::<Vec<_>>();
        let entries = [flags(&readable, 0), flags(&writable, WRITE)].concat();
        let direct = match shape % 4 {
            0 => 0,
            1 => entries.len() / 2,
            _ => entries.len(),
        };
        let free = self.sides[queue].free.len();
        let direct = if direct < free || direct == free && direct == entries.len() { direct } else { 0 };
        if free == 0 || self.queue(queue).claims {
            return;
        }
        let (own, other) = entries.split_at(direct);
        let malformed = other.len() > CHAIN_DESCRIPTORS_MAX;
        let mut table = None;
        let mut own: Vec<_> = own.to_vec();
        if !other.is_empty() {
            let Some((number, at)) = self.table(other.len()) else { return };
            table = Some(number);
            // §2.7.5.3 asks for no alignment
            let at = at + u64::from(shape >> 4);
            let count = other.len() as u16;
            // the first entry is the first, the others may be anywhere
            let place = |entry: u16| if shape & 8 == 0 || entry == 0 { entry } else { count - entry };
            for (entry, (piece, flags)) in (0..).zip(other) {
                let is_last = entry + 1 == count;
                let flags = flags | if is_last { 0 } else { NEXT };
                let next = if is_last { 0xffff } else { place(entry + 1) };
                self.write_descriptor(at + 16 * u64::from(place(entry)), *piece, flags, next);
            }
            // what is said of its being writable means nothing (§2.7.5.3.2)
            let is_writable = if shape & 4 == 0 { 0 } else { WRITE };
            own.push(((at, 16 * u32::from(count)), INDIRECT | is_writable));
        }
        let free = &mut self.sides[queue].free;
        let descriptors = free.split_off(free.len() - own.len());
        let base = self.sides[queue].base;
        for (number, (piece, flags)) in own.iter().enumerate() {
            let next = descriptors.get(number + 1);
            let at = base + 16 * u64::from(descriptors[number]);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(at, *piece, flags, next.copied().unwrap_or(0xffff));
        }
        let head = descriptors[0];
        let is_received = |piece: &&Piece| queue == RX && piece.1 > 0;
        let buffers: Vec<_> = writable.iter().filter(is_received).copied().collect();
        for &(at, bytes) in &buffers {
            self.owned[(at - RECEIVE) as usize..][..bytes as usize].fill(true);
        }
        self.sides[queue].kept.insert(head, Kept { descriptors, table, buffers });
        self.sides[queue].made.push(Request { head, readable, writable, malformed });
    }

    pub(super) fn offer_frame(&mut self, input: &mut Input<'_>) {
        if self.sides[TX].made.len() >= 32 {
            return;
        }
        let header_bytes = self.model.header_bytes();
        let frame_bytes = frame_bytes(input, header_bytes);
        let header = header(input, frame_bytes);
        let short = input.byte();
        let mut bytes = header_bytes + frame_bytes;
        if short > 250 {
            bytes = usize::from(short % 16);
        }
        let room = TRANSMIT..RAM_BYTES;
        let mut readable = Vec::new();
        let pieces = cuts(input, bytes);
        let many = pieces.len() > 16;
        let mut near = TRANSMIT + u64::from(input.word()) % 0x10000;
        for bytes in pieces {
            let at = if many { near } else { TRANSMIT + u64::from(input.word()) * 2 };
            near += 5;
            // an empty buffer may claim to be anywhere
            let at = if bytes == 0 { at << 20 } else { at.min(room.end - u64::from(bytes)) };
            readable.push((at, bytes));
        }
        let mut left = &header[..header_bytes.min(bytes)];
        for &(at, bytes) in readable.iter().filter(|piece| piece.1 > 0) {
            let (now, rest) = left.split_at(left.len().min(bytes as usize));
            self.ram.write(at, now);
            left = rest;
        }
        let behind = input.byte();
        let writable =
            if behind > 224 { vec![(TRANSMIT, u32::from(behind)), (u64::MAX, 0)] } else { Vec::new() };
        self.offer(TX, input, readable, writable);
    }

    /// A buffer that is nobody's, at most so long.
    fn buffer(&mut self, gap: usize, bytes: u32) -> Piece {
        let start = (self.cursor + gap) % self.owned.len();
        let rest = &self.owned[start..];
        let free = rest.iter().take(bytes as usize).take_while(|owned| !**owned).count();
        self.cursor = start + free;
        // so that no other of the same chain gets it
        self.owned[start..start + free].fill(true);
        (RECEIVE + start as u64, free as u32)
    }

    pub(super) fn offer_buffers(&mut self, input: &mut Input<'_>) {
        if self.sides[RX].made.len() >= 128 {
            return;
        }
        let header_bytes = self.model.header_bytes();
        let bytes = match input.byte() % 8 {
            0 => header_bytes + 1522,
            1 => header_bytes + 65_557,
            2 => usize::from(input.byte()),
            3 | 4 => usize::from(input.word() % 5000),
            5 => 4096,
            _ => header_bytes + frame_bytes(input, header_bytes),
        };
        let gap = usize::from(input.byte());
        let gap = if gap >= 240 { gap * 997 } else { gap % 16 };
        let pieces = cuts(input, bytes);
        let writable: Vec<_> = pieces.iter().map(|bytes| self.buffer(gap, *bytes)).collect();
        for &(at, bytes) in &writable {
            self.owned[(at - RECEIVE) as usize..][..bytes as usize].fill(false);
        }
        let front = input.byte();
        let readable = if front > 224 { vec![(TRANSMIT, u32::from(front))] } else { Vec::new() };
        self.offer(RX, input, readable, writable);
    }

    /// A chain that breaks its ring, whatever else is in it.
    pub(super) fn offer_malformed(&mut self, input: &mut Input<'_>) {
        let (kind, more) = (input.byte(), input.byte());
        let queue = usize::from(kind % 2);
        if self.queue(queue).claims || self.sides[queue].free.len() < 3 {
            return;
        }
        let write = if queue == RX { WRITE } else { 0 };
        let sound = (TRANSMIT, 64);
        let mut table = None;
        let mut indirect = |driver: &mut Self, entries: usize| {
            let (number, at) = driver.table(entries)?;
            table = Some(number);
            Some(at)
        };
        if kind / 2 % 12 == 11 {
            self.claim(queue, more);
            return;
        }
        let free = &mut self.sides[queue].free;
        let descriptors = free.split_off(free.len() - 3);
        let [first, second, third] = descriptors[..] else { return };
        let mut head = first;
        let size = self.size;
        // of the descriptor behind a sound one
        let (piece, flags, next) = match kind / 2 % 12 {
            0 => {
                head = size + u16::from(more) * 200;
                (sound, write, 0)
            }
            1 => (sound, write | NEXT, size + u16::from(more)),
            2 => (sound, write | NEXT, first),
            3 => ((RAM_BYTES + u64::from(more), 1), write, 0),
            4 => ((RAM_BYTES - 1, 2 + u32::from(more)), write, 0),
            5 => ((u64::MAX - u64::from(more), 1 + u32::from(more) * 2), write, 0),
            6 => {
                self.write_descriptor(self.sides[queue].base + 16 * u64::from(third), sound, 0, 0);
                (sound, WRITE | NEXT, third)
            }
            7 => {
                let Some(at) = indirect(self, 2) else { return self.sides[queue].free.extend(descriptors) };
                self.write_descriptor(at, sound, write | NEXT, 1);
                self.write_descriptor(at + 16, (at, 32), INDIRECT, 0);
                ((at, 32), INDIRECT, 0)
            }
            8 => {
                let Some(at) = indirect(self, 2) else { return self.sides[queue].free.extend(descriptors) };
                self.write_descriptor(at, sound, write, 0);
                // of no whole entries, or of none
                ((at, if more < 16 { 0 } else { 16 + u32::from(more % 15) + 1 }), INDIRECT, 0)
            }
            9 => {
                let Some(at) = indirect(self, 2) else { return self.sides[queue].free.extend(descriptors) };
                self.write_descriptor(at, sound, write | NEXT, u16::from(more % 2) * 2);
                ((at, 32), INDIRECT | if more & 2 == 0 { 0 } else { NEXT }, third)
            }
            _ => ((RAM_BYTES - u64::from(more % 2) * 15, 16), INDIRECT, 0),
        };
        // 9: a loop within the table, or out of it; 10: a table outside of memory
        let base = self.sides[queue].base;
        let to_second = if kind & 0x80 == 0 { second } else { first };
        if to_second == second {
            self.write_descriptor(base + 16 * u64::from(first), sound, write | NEXT, second);
        }
        self.write_descriptor(base + 16 * u64::from(to_second), piece, flags, next);
        let kept = Kept { descriptors, table, buffers: Vec::new() };
        self.sides[queue].kept.insert(first, kept);
        self.sides[queue].made.push(Request { head, malformed: true, ..Request::default() });
    }

    /// Claims more requests than there are entries, where the device knows of no others.
    fn claim(&mut self, queue: usize, more: u8) {
        self.settle(0);
        if !self.queue(queue).offered.is_empty() || !self.queue(queue).held.is_empty() {
            return;
        }
        self.queue(queue).claims = true;
        let side = &mut self.sides[queue];
        side.available = side.available.wrapping_add(self.size + 1 + u16::from(more));
        self.settle(more);
    }

    pub(super) fn lan_sends(&mut self, input: &mut Input<'_>) {
        let header_bytes = self.model.header_bytes();
        let frame_bytes = frame_bytes(input, header_bytes);
        let header = header(input, frame_bytes);
        let short = input.byte();
        let mut packet = header[..header_bytes].to_vec();
        packet.extend_from_slice(&noise()[usize::from(short)..][..frame_bytes]);
        if short > 250 {
            // a socket's end would be an empty one
            packet.truncate(usize::from(short % 16).max(1));
        }
        let waiting: usize = self.model.coming.iter().map(Vec::len).sum();
        let made: usize = self.packets.iter().map(Vec::len).sum();
        if waiting + made < 100_000 && self.model.coming.len() + self.packets.len() < 32 {
            self.packets.push(packet);
        }
    }

    /// Makes available what was made, and sees what comes of it.
    pub(super) fn settle(&mut self, how: u8) {
        let before = self.sides.each_ref().map(|side| side.available);
        for queue in [RX, TX] {
            self.publish(queue, how);
        }
        for packet in self.packets.drain(..) {
            if rustix::io::write(&self.stand.lan, &packet).is_ok() {
                self.model.coming.push_back(packet);
            }
        }
        let were_broken = [self.model.receive.broken, self.model.transmit.broken];
        self.model.run(&mut self.ram.shadow);
        let are_broken = [self.model.receive.broken, self.model.transmit.broken];
        self.breaks +=
            were_broken.iter().zip(are_broken).filter(|(before, now)| !**before && *now).count() as u64;
        // what the device writes is seen after what we have written
        fence(Ordering::SeqCst);
        for queue in [RX, TX] {
            if self.queue(queue).runs && self.wants_kick(queue, before[queue]) {
                rustix::io::write(&self.sides[queue].kick, &1u64.to_ne_bytes()).unwrap();
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        // a device that waits for the LAN need not see that the driver has changed a frame meanwhile
        while !self.model.full && !self.is_done() {
            assert!(Instant::now() < deadline, "it is not done: {}", self.missing());
            std::thread::yield_now();
        }
        self.quiesce();
        self.check(how);
    }

    /// Says when the driver wants to be signalled.
    fn wish(&mut self, queue: usize, how: u8) {
        let Side { base, used, .. } = self.sides[queue];
        let used_event = used.wrapping_add(u16::from(how >> 4)).to_le_bytes();
        self.ram.write(base + AVAILABLE + 4 + 2 * u64::from(self.size), &used_event);
        self.ram.write(base + AVAILABLE, &u16::from(how & 4 != 0).to_le_bytes());
    }

    fn publish(&mut self, queue: usize, how: u8) {
        let side = &mut self.sides[queue];
        let at = side.base + AVAILABLE;
        let mut available = side.available;
        let made = std::mem::take(&mut side.made);
        for request in &made {
            let slot = u64::from(available % self.size);
            self.ram.write(at + 4 + 2 * slot, &request.head.to_le_bytes());
            available = available.wrapping_add(1);
        }
        self.wish(queue, how);
        self.ram.write(at + 2, &available.to_le_bytes());
        self.sides[queue].available = available;
        self.queue(queue).offered.extend(made);
    }

    /// Whether the device wants to be told of what was made available (§2.7.10).
    fn wants_kick(&self, queue: usize, before: u16) -> bool {
        let Side { base, available, .. } = self.sides[queue];
        if available == before {
            return false;
        }
        if self.event_idx {
            let event = self.ram.word(base + USED + 4 + 8 * u64::from(self.size));
            return available.wrapping_sub(event).wrapping_sub(1) < available.wrapping_sub(before);
        }
        self.ram.word(base + USED) & 1 == 0
    }

    /// Whether all is there that is to come.
    fn is_done(&mut self) -> bool {
        self.take_from_lan();
        let queues = [&self.model.receive, &self.model.transmit];
        self.got.len() >= self.model.sent.len()
            && self.sides.iter().zip(queues).all(|(side, queue)| {
                self.ram.word(side.base + USED + 2) == side.used.wrapping_add(queue.used.len() as u16)
            })
    }

    fn missing(&self) -> String {
        let queues =
            [&self.model.receive, &self.model.transmit].map(|queue| (&queue.used, queue.offered.len()));
        let indices = self.sides.each_ref().map(|side| (side.used, self.ram.word(side.base + USED + 2)));
        let [got, sent] =
            [&self.got, &self.model.sent].map(|packets| packets.iter().map(Vec::len).collect::<Vec<_>>());
        format!("used {queues:?}, indices {indices:?}, the LAN got {got:?} of {sent:?}")
    }

    fn take_from_lan(&mut self) {
        if self.model.full {
            return;
        }
        while let Ok(bytes) = rustix::io::read(&self.stand.lan, &mut self.packet[..]) {
            if self.fillers > 0 {
                self.fillers -= 1;
                assert_eq!(self.packet[..bytes], FILLER);
                continue;
            }
            self.got.push(self.packet[..bytes].to_vec());
        }
    }

    /// Waits until the worker has been asleep, twice: it is woken, forgets the kick, and does what there is to do before it
    /// sleeps again.
    fn quiesce(&self) {
        let queues = [&self.model.receive, &self.model.transmit];
        let running = self.sides.iter().zip(queues).filter(|(_, queue)| queue.runs);
        let kicks: Vec<_> = running.map(|(side, _)| &side.kick).collect();
        for _ in 0..2 {
            for kick in &kicks {
                rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
            }
            let mut fds: Vec<_> = kicks.iter().map(|kick| PollFd::new(*kick, PollFlags::IN)).collect();
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            while !fds.is_empty() && poll(&mut fds, Some(&now)).unwrap() > 0 {
                self.stand.status();
            }
        }
    }

    fn check(&mut self, how: u8) {
        self.take_from_lan();
        assert!(self.got == self.model.sent, "the LAN got {:x?} and not {:x?}", self.got, self.model.sent);
        self.got.clear();
        self.model.sent.clear();
        let mut memory = self.ram.read();
        let marked = self.ram.marked();
        let limit = marked.limit();
        let written = pages(limit, self.model.written.drain(..));
        let mut allowed = pages(limit, self.model.perhaps_written.drain(..));
        allowed.union(&written);
        for queue in [RX, TX] {
            self.check_used(queue, how, &mut memory, &marked);
        }
        if memory != self.ram.shadow {
            let at = (0..memory.len()).find(|at| memory[*at] != self.ram.shadow[*at]).unwrap();
            panic!("at {at:#x} there is {:#x} and not {:#x}", memory[at], self.ram.shadow[at]);
        }
        // the rings' own pages are marked for other reasons too
        for queue in [RX, TX] {
            allowed.insert((self.sides[queue].base + USED) / PAGE_BYTES as u64);
        }
        let all = |pages: &PageSet, of: &PageSet| pages.iter().all(|page| of.contains(page));
        let list = |pages: &PageSet| pages.iter().collect::<Vec<_>>();
        assert!(
            all(&written, &marked) && all(&marked, &allowed),
            "{:?} are marked, {:?} were written",
            list(&marked),
            list(&written)
        );
        let (figures, rings) = self.stand.status();
        assert_eq!(figures, self.model.figures);
        let queues = [&self.model.receive, &self.model.transmit];
        let count = |is: fn(&&&Queue) -> bool| queues.iter().filter(is).count() as u64;
        assert_eq!(rings, [count(|queue| queue.runs), count(|queue| queue.runs && queue.broken)]);
        assert_eq!(self.broken_rings.load(Ordering::SeqCst), self.breaks);
    }

    /// The used ring is as the model says, and the driver was told if it wanted to be (§2.7.7, §2.7.10).
    fn check_used(&mut self, queue: usize, how: u8, memory: &mut [u8], marked: &PageSet) {
        let used = std::mem::take(&mut self.queue(queue).used);
        let at = self.sides[queue].base + USED;
        let before = self.sides[queue].used;
        let slot = |number: usize| {
            let entry = before.wrapping_add(number as u16) % self.size;
            at as usize + 4 + 8 * usize::from(entry)
        };
        let word = |at: usize| u32::from_le_bytes(memory[at..at + 4].try_into().unwrap());
        let seen: Vec<_> =
            (0..used.len()).map(|number| (word(slot(number)) as u16, word(slot(number) + 4))).collect();
        assert_eq!(seen, used, "queue {queue}");
        for (number, (head, bytes)) in used.iter().enumerate() {
            self.ram.shadow[slot(number)..][..4].copy_from_slice(&u32::from(*head).to_le_bytes());
            self.ram.shadow[slot(number) + 4..][..4].copy_from_slice(&bytes.to_le_bytes());
        }
        let count = used.len() as u16;
        let now = before.wrapping_add(count);
        self.ram.shadow[at as usize + 2..][..2].copy_from_slice(&now.to_le_bytes());
        // the device's wishes are its own
        for wish in [at as usize, at as usize + 4 + 8 * usize::from(self.size)] {
            let (ours, theirs) = (&mut self.ram.shadow[wish..wish + 2], &mut memory[wish..wish + 2]);
            ours.copy_from_slice(theirs);
        }
        assert!(count == 0 || marked.contains(at / PAGE_BYTES as u64));
        let wanted = if self.event_idx { u16::from(how >> 4) < count } else { how & 4 == 0 && count > 0 };
        let signalled = rustix::io::read(&self.sides[queue].call, &mut [0u8; 8]).is_ok();
        assert_eq!(signalled, wanted, "queue {queue}");
        self.sides[queue].used = now;
        for (head, _) in used {
            self.release(queue, head);
        }
    }

    /// Leaves the device as it was.
    pub(super) fn finish(mut self) {
        self.settle(0);
        self.set_link(true);
        self.fill_lan(false);
        for queue in [RX, TX] {
            if self.queue(queue).runs {
                self.stop(queue);
            }
        }
        while rustix::io::read(&self.stand.tap, &mut [0u8; 1]).is_ok() {}
    }
}

/// Without a short period, so that a byte from the wrong place is seen.
fn noise() -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    NOISE.get_or_init(|| {
        (0..RAM_BYTES as u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (at >> 8) as u8)
            .collect()
    })
}

/// The pages that the pieces are in.
fn pages(limit: u64, pieces: impl Iterator<Item = Piece>) -> PageSet {
    let mut pages = PageSet::new(limit);
    for (at, bytes) in pieces.filter(|piece| piece.1 > 0) {
        pages.insert_range(at / PAGE_BYTES as u64, (at + u64::from(bytes) - 1) / PAGE_BYTES as u64 + 1);
    }
    pages
}
