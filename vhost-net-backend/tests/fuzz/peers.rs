//! A peer that sends anything over the network channel of the link, to either half of a pair, between what the guest, the
//! LAN and the controller do: a secondary stays silent, and nothing leaves a primary that the peer has not said as the
//! protocol demands.

use colo::link::{Decoder, encode};
use vhost_net_backend::digest::{Key, PRIME};
use vhost_net_backend::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use vhost_net_backend::offload::FrameHeader;
use vhost_net_backend::packet::Packet;
use vhost_net_backend::proxy::{Action, Actions, Mode, Primary, Secondary};
use vhost_net_backend::wire::{
    ANSWER, ASK, DIGEST, EPOCH, HEADED_MIRROR, ISN, ISN_BYTES, Isn, KEY, MARKER, MIRROR, OUTPUT,
};

use super::grammar::{buffer, frames, header};
use super::input::Input;
use super::output::Output;
use super::packets::{check_limits, config};

/// No frame of an input is longer.
const FRAME_BYTES: usize = 4096;
/// How often a message is sent that is repeated.
const REPEATED: usize = 40;
/// The name of a flow in a message.
const FLOW_BYTES: usize = 44;

fn key() -> Box<Key> {
    Key::new(0x0123_4567_89ab_cdef).unwrap()
}

/// A message: its kind, its epoch, and what it carries.
type Message = (u16, u64, Vec<u8>);

fn near_the_end(byte: u8) -> u32 {
    0xffff_ff80_u32.wrapping_add(u32::from(byte))
}

/// The name of a flow that packets have, too.
fn flow_name(input: &mut Input<'_>) -> Vec<u8> {
    let frame = frames(input, false).swap_remove(0);
    let flow = Packet::parse(&frame).flow_from_guest(&frame);
    match (Isn { flow, isn: 0, timestamp: None }).to_bytes() {
        Some(bytes) => bytes[..FLOW_BYTES].to_vec(),
        None => {
            let mut bytes = input.bytes(FLOW_BYTES).to_vec();
            bytes.resize(FLOW_BYTES, 0);
            bytes
        }
    }
}

fn isn(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = flow_name(input);
    let (number, timestamp) = (near_the_end(input.byte()), input.byte());
    bytes[0] |= timestamp & 1;
    bytes.extend(number.to_be_bytes());
    bytes.extend(u32::from(timestamp & !1).to_be_bytes());
    bytes.resize(ISN_BYTES, 0);
    bytes
}

/// Digests, of what guests mostly send there or of nothing.
fn digests(input: &mut Input<'_>) -> Vec<u8> {
    let key = key();
    let mut message = Vec::new();
    for _ in 0..=input.byte() % 3 {
        let (slot, how) = (input.byte(), input.byte());
        let slot = if slot < 0xf0 { u16::from(slot % 4) } else { 0x0f00 | u16::from(slot) };
        let mut seq = near_the_end(input.byte());
        message.extend((slot | if how & 1 == 0 { 1 << 15 } else { 0 }).to_be_bytes());
        message.extend(u16::from(how >> 1 & 3).to_be_bytes());
        message.extend(seq.to_be_bytes());
        message.extend(near_the_end(input.byte()).to_be_bytes());
        message.extend([input.byte(), 0, 0, 0]);
        if how & 1 == 0 {
            message.extend(flow_name(input));
        }
        for _ in 0..how >> 1 & 3 {
            let (bytes, wrong) = (1 + 4 * u16::from(input.byte()), input.byte());
            let said: Vec<u8> =
                (0..u32::from(bytes)).map(|at| (seq.wrapping_add(at) as u8).wrapping_mul(7)).collect();
            let digest = (key.digest(seq, &said) + u64::from(wrong / 200)) % PRIME;
            message.extend(bytes.to_be_bytes());
            message.extend(digest.to_be_bytes());
            seq = seq.wrapping_add(bytes.into());
        }
    }
    message
}

fn message(input: &mut Input<'_>, to_secondary: bool, running: u64) -> Message {
    let (what, epoch) = (input.byte(), input.byte());
    let epoch = match epoch % 16 {
        0 => running + 1,
        1 => running.wrapping_sub(1),
        2 => running + u64::from(epoch >> 4),
        3 => u64::MAX - u64::from(epoch >> 4),
        _ => running,
    };
    let (kind, mut payload) = match (what % 16, to_secondary) {
        (0..=3, true) => (MIRROR, frames(input, true).swap_remove(0)),
        (4, true) => {
            let frame = frames(input, true).swap_remove(0);
            let header = match input.byte() % 4 {
                0 => {
                    let mut bytes = input.bytes(FrameHeader::BYTES).to_vec();
                    bytes.resize(FrameHeader::BYTES, 0);
                    bytes
                }
                _ => header(input, &frame).bytes().to_vec(),
            };
            (HEADED_MIRROR, [header, frame].concat())
        }
        (5 | 6, true) => (ISN, isn(input)),
        (7, true) => (KEY, key().number().to_be_bytes().to_vec()),
        (8 | 9, true) => {
            let mut ask = flow_name(input);
            ask.extend(near_the_end(input.byte()).to_be_bytes());
            ask.extend(u32::from_be_bytes([input.byte(), 0, input.byte(), 255]).to_be_bytes());
            (ASK, ask)
        }
        (10, true) => (MARKER, Vec::new()),
        (0..=4, false) => (OUTPUT, frames(input, false).swap_remove(0)),
        (5, false) => (ANSWER, frames(input, false).swap_remove(0)),
        (6..=9, false) => (DIGEST, digests(input)),
        (10, false) => (EPOCH, Vec::new()),
        (11 | 12, _) => {
            let bytes = usize::from(input.byte());
            (u16::from(what >> 4), input.bytes(bytes).to_vec())
        }
        _ => {
            let bytes = usize::from(input.byte() % 80);
            (input.word(), input.bytes(bytes).to_vec())
        }
    };
    let damage = input.byte();
    let at = usize::from(input.byte());
    match damage % 16 {
        0 => payload.truncate(at),
        1 => payload.push(at as u8),
        2 if !payload.is_empty() => {
            let at = at % payload.len();
            payload[at] = damage;
        }
        _ => {}
    }
    (kind, epoch, payload)
}

/// Both halves; the peer of each is hostile.
struct Stand {
    primary: Primary,
    secondary: Secondary,
    actions: Actions,
    decoders: [Decoder; 2],
    output: Output,
    now_us: u64,
    /// What the primary does now lets go all that is held.
    lets_go: bool,
}

impl Stand {
    fn new(setup: u8) -> Self {
        let config = config(setup);
        let mut stand = Self {
            primary: Primary::new(&config, 1, 0),
            secondary: Secondary::new(&config, 1, 0),
            actions: Actions::new(),
            decoders: Default::default(),
            output: Output::new(config.policy.clone(), setup & 2 != 0, (setup & 1 != 0).then(key)),
            now_us: 0,
            lets_go: false,
        };
        if setup & 1 != 0 {
            stand.primary.want_digests(key(), &mut stand.actions);
            stand.primary_has_acted();
        }
        stand
    }

    /// Bytes come over a link.
    fn receive(&mut self, to_secondary: bool, mut bytes: &[u8], give_up: bool) {
        while !bytes.is_empty() {
            let decoder = &mut self.decoders[usize::from(to_secondary)];
            decoder.fill(&mut bytes).unwrap();
            loop {
                let frame = match self.decoders[usize::from(to_secondary)].next_frame() {
                    Ok(None) => break,
                    Ok(Some((header, payload))) => Ok((header.kind, header.epoch, payload.to_vec())),
                    Err(error) => Err(error),
                };
                let is_worthless = match frame {
                    Ok(message) if to_secondary => self.secondary_hears(&message),
                    Ok(message) => self.primary_hears(&message),
                    Err(_) => true,
                };
                if is_worthless {
                    self.decoders[usize::from(to_secondary)] = Decoder::default();
                    match (give_up, to_secondary) {
                        (true, true) => self.secondary.detach(),
                        (true, false) => self.primary.detach(),
                        _ => {}
                    }
                    return;
                }
            }
        }
    }

    /// Whether the message is refused.
    fn secondary_hears(&mut self, (kind, epoch, payload): &Message) -> bool {
        let result = self.secondary.peer_frame(*kind, *epoch, payload, self.now_us, &mut self.actions);
        assert!(result.is_ok() || self.actions.is_empty(), "{result:?}");
        for action in self.actions.iter() {
            assert!(!matches!(action, Action::ToLan(_)), "The secondary sends what the peer says");
            if let Action::ToGuest(frame) = action {
                assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.len()), "{} bytes", frame.len());
                assert!(frame.header().is_within(frame.len()), "{:?}", frame.header());
            }
        }
        self.secondary_has_acted();
        result.is_err()
    }

    fn primary_hears(&mut self, (kind, epoch, payload): &Message) -> bool {
        let running = self.primary.epoch();
        let result = self.primary.peer_frame(*kind, *epoch, payload, self.now_us, &mut self.actions);
        assert!(result.is_ok() || self.actions.is_empty(), "{result:?}");
        match *kind {
            _ if result.is_err() || *epoch < running => {}
            OUTPUT | ANSWER => self.output.svm_says(*epoch, payload),
            DIGEST => self.output.svm_digests(*epoch, payload),
            _ => assert!(self.actions.is_empty(), "a message of kind {kind} does something"),
        }
        let lets_go = self.actions.iter().any(|action| matches!(action, Action::ToLan(_)));
        assert!(!lets_go || *epoch == running, "A message of epoch {epoch} lets go what {running} holds");
        self.primary_has_acted();
        result.is_err()
    }

    fn primary_has_acted(&mut self) {
        let mode = self.primary.stats().mode;
        for action in self.actions.iter() {
            if let Action::ToLan(frame) = action {
                assert!(matches!(mode, Mode::Protected | Mode::Alone), "{mode:?}: {:02x?}", &frame[..]);
                let by_commit = self.lets_go || mode == Mode::Alone;
                self.output.leaves(frame, self.primary.epoch(), by_commit);
            }
        }
        self.actions.clear();
    }

    fn secondary_has_acted(&mut self) {
        let mode = self.secondary.stats().mode;
        let sends = self.actions.iter().any(|action| matches!(action, Action::ToLan(_)));
        assert!(!sends || mode == Mode::Alone, "{mode:?}");
        self.actions.clear();
        let kept = self.secondary.stats().digest.map_or(0, |digest| digest.kept_bytes);
        assert!(kept <= 16 << 20);
    }

    fn pvm_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        if self.primary.accepts_output() {
            if self.primary.stats().mode != Mode::Silent {
                self.output.pvm_sends(header, frame);
            }
            self.primary.guest_output(buffer(header, frame), self.now_us, &mut self.actions);
            self.primary_has_acted();
        }
    }

    fn svm_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        if self.secondary.accepts_output() {
            self.secondary.guest_output(buffer(header, frame), self.now_us, &mut self.actions);
            self.secondary_has_acted();
        }
    }

    fn lan_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        self.primary.headed_lan_input(header, frame, self.now_us, &mut self.actions);
        self.primary_has_acted();
        self.secondary.headed_lan_input(header, frame, self.now_us, &mut self.actions);
        self.secondary_has_acted();
    }

    fn tick(&mut self, us: u64) {
        self.now_us += us;
        self.primary.tick(self.now_us, &mut self.actions);
        self.primary_has_acted();
        self.secondary.flush(&mut self.actions);
        self.secondary.tick(self.now_us, &mut self.actions);
        self.secondary_has_acted();
    }

    /// What a controller may order, to either half; orders of the wrong epoch do nothing.
    fn order(&mut self, order: u8) {
        let wrong = u64::from(order >> 7);
        let (pvm_epoch, svm_epoch) = (self.primary.epoch() + wrong, self.secondary.stats().epoch + wrong);
        match order % 16 {
            0..=3 => {
                let result = self.primary.marker(pvm_epoch, &mut self.actions);
                assert!(result.is_ok() || self.actions.is_empty());
                self.primary_has_acted();
            }
            4..=7 => {
                self.lets_go = true;
                let is_pair = self.primary.stats().mode == Mode::Protected;
                let result = self.primary.commit(pvm_epoch, self.now_us, &mut self.actions);
                assert!(result.is_ok() || self.actions.is_empty());
                assert!(result.is_err() || wrong == 0);
                self.primary_has_acted();
                self.lets_go = false;
                if result.is_ok() && is_pair {
                    let compare = self.primary.stats().compare;
                    assert_eq!((compare.held_packets, compare.held_bytes, self.output.waiting()), (0, 0, 0));
                }
            }
            8..=11 => {
                let result = self.secondary.commit(svm_epoch, &mut self.actions);
                assert!(result.is_err() || wrong == 0);
                self.secondary_has_acted();
            }
            12 if order & 0x40 != 0 => self.primary.detach(),
            12 => self.secondary.detach(),
            13 if order & 0x40 != 0 => self.primary.silence(),
            13 => self.secondary.silence(),
            14 if order & 0x40 != 0 => {
                self.lets_go = true;
                self.primary.detach();
                self.primary.take_over(self.now_us, &mut self.actions);
                self.primary_has_acted();
                self.lets_go = false;
            }
            14 => {
                self.secondary.detach();
                self.secondary.take_over(self.now_us, &mut self.actions);
                self.secondary_has_acted();
            }
            _ => {}
        }
        if self.primary.stats().mode == Mode::Silent {
            let compare = self.primary.stats().compare;
            assert_eq!((compare.held_packets, compare.held_bytes, compare.svm_bytes), (0, 0, 0));
        }
    }
}

/// Anything that a peer sends, in any pieces.
pub fn peers(data: &[u8]) {
    let mut input = Input(data);
    let mut stand = Stand::new(input.byte());
    while !input.is_empty() {
        let what = input.byte();
        match what % 8 {
            0..=2 => {
                let to_secondary = what & 8 != 0;
                let running =
                    if to_secondary { stand.secondary.stats().epoch } else { stand.primary.epoch() };
                let (kind, epoch, payload) = message(&mut input, to_secondary, running);
                let mut wire = Vec::new();
                let times = if what & 0x70 == 0x70 { REPEATED } else { 1 };
                (0..times).for_each(|_| encode(kind, epoch, &[&payload], &mut wire));
                if what & 0x70 == 0x60 {
                    let at = usize::from(input.word()) % wire.len();
                    wire[at] ^= input.byte();
                }
                let cut = wire.len() * usize::from(what >> 4) / 16;
                let give_up = what & 0x80 != 0;
                stand.receive(to_secondary, &wire[..cut], give_up);
                stand.receive(to_secondary, &wire[cut..], give_up);
            }
            3 | 4 => {
                for frame in frames(&mut input, false) {
                    let header = header(&mut input, &frame);
                    if what & 0x18 != 0x08 {
                        stand.pvm_sends(header, &frame);
                    }
                    if what & 0x18 != 0x10 {
                        stand.svm_sends(header, &frame);
                    }
                }
            }
            5 => {
                for frame in frames(&mut input, true) {
                    let header = header(&mut input, &frame);
                    stand.lan_sends(header, &frame);
                }
            }
            6 if what & 8 == 0 => stand.tick(u64::from(input.word()) * 16),
            6 => {
                let bytes = usize::from(input.byte());
                let bytes = input.bytes(bytes);
                stand.receive(what & 0x10 != 0, bytes, false);
            }
            _ => stand.order(input.byte()),
        }
        check_limits(&stand.primary, &stand.secondary, FRAME_BYTES);
    }
}

/// What sound peers send, and nearly so.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // a TCP frame: kind, how, flags and options, numbers, window, data
    let tcp = |how: u8, flags: u8, seq: u8, data: u8| {
        let mut bytes = vec![15, how, flags, seq, 0x90, 200];
        match flags >> 4 {
            1 | 2 => bytes.push(seq),
            3..=7 => bytes.extend([seq, 5]),
            _ => {}
        }
        bytes.push(data);
        bytes
    };
    let sound = |what: &[u8], inside: &[u8]| [what, inside, &[9, 0]].concat();
    let mut all = Vec::new();
    for setup in 0..8 {
        for how in [0, 4, 1] {
            let (syn, bulk) = (tcp(how, 0x11, 0x40, 0), tcp(how, 0x33, 0x41, 255));
            let mut seed = vec![setup];
            if setup & 1 != 0 {
                seed.extend(sound(&[8, 7, 4], &[]));
            }
            // both open a connection, the peers tell each other
            seed.extend([&[3], &syn[..], &[2]].concat());
            seed.extend(sound(&[0, 0, 4], &syn));
            seed.extend(sound(&[8, 5, 4], &[&syn[..], &[0x20, 1]].concat()));
            seed.extend([&[5], &tcp(how, 0x34, 0x90, 0)[..], &[2]].concat());
            seed.extend(sound(&[8, 0, 4], &tcp(how, 0x34, 0x90, 0)));
            // data, and its digest: flow 0, named, one piece
            seed.extend([&[3], &bulk[..], &[2, 6, 1, 0]].concat());
            seed.extend(sound(&[0, 6, 4], &[&[0, 0, 2, 0x41, 0x90, 1], &syn[..], &[174, 0]].concat()));
            seed.extend(sound(&[8, 8, 4], &[&syn[..], &[0x41, 0, 1]].concat()));
            seed.extend(sound(&[0, 5, 4], &bulk));
            seed.extend([&[3], &[2, how, 20][..], &[2]].concat());
            seed.extend(sound(&[0, 0, 4], &[2, how, 20]));
            seed.extend(sound(&[8, 4, 4], &[&[2, how, 20][..], &[1, 2]].concat()));
            // a checkpoint, and what comes early
            seed.extend([3, 2, how, 24, 2]);
            seed.extend(sound(&[0, 0, 0], &[2, how, 24]));
            seed.extend([7, 0]);
            seed.extend(sound(&[8, 10, 4], &[]));
            seed.extend(sound(&[0x70, 0, 0], &[2, how, 21]));
            seed.extend([7, 8, 7, 4]);
            seed.extend(sound(&[0, 10, 4], &[]));
            seed.extend([&[3], &[2, how, 21][..], &[2]].concat());
            seed.extend(sound(&[0x60, 0, 4], &[2, how, 22]));
            seed.extend([7, 0x4e, 7, 14, 3, 2, how, 23, 2]);
            all.push(seed);
        }
    }
    all.into_iter().map(|seed| ("peers", seed)).collect()
}
