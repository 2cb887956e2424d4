//! Any frames through the packet parser and through a sound pair: what a hostile guest and a hostile LAN can do. What
//! leaves the primary must have been sent by the PVM and be said by the SVM or covered by a commit, and nothing that the
//! PVM sent is lost.

use std::collections::VecDeque;

use vhost_net_backend::digest::Key;
use vhost_net_backend::frame::FRAME_BYTES_MIN;
use vhost_net_backend::offload::FrameHeader;
use vhost_net_backend::packet::checksum::{self, Checksum};
use vhost_net_backend::packet::fragments::{Put, Reassembler};
use vhost_net_backend::packet::{Kind, Packet, Quoted, Transport, edge_positions};
use vhost_net_backend::policy::Policy;
use vhost_net_backend::proxy::{Action, Actions, Config, Primary, Secondary};
use vhost_net_backend::rewrite::{Exit, Limits, Rewriter};
use vhost_net_backend::wire::{ANSWER, DIGEST, Isn, OUTPUT};

use super::grammar::{buffer, frames, header, is_right, renumbered};
use super::input::Input;
use super::output::Output;

/// Few enough that an input reaches them.
const HELD_BYTES_MAX: usize = 8 << 10;
const HELD_BYTES_FULL: usize = 16 << 10;
const SVM_BYTES_MAX: usize = 16 << 10;
const FLOWS_MAX: usize = 6;
const CONNECTIONS_MAX: usize = 4;
const WAITING_BYTES_MAX: usize = 4 << 10;

/// No frame of an input is longer, nor are all fragments of one.
const FRAME_BYTES: usize = 2048;
/// What a message or a piece of a stream costs beside its bytes.
const COST_MAX: usize = 4096;

const RULES: &str = r#"[
    {"protocol": "udp", "remote_port": 1026, "action": "bypass"},
    {"protocol": "tcp", "remote_port": 1033, "action": "checkpoint"},
    {"protocol": "tcp", "remote_port": 1026, "action": "mask", "mask": [{"prefix": "\u0007", "length": 3}]},
    {"protocol": "udp", "remote_port": 1033, "action": "mask", "mask": [{"prefix": "\u0007", "length": 3}]}
]"#;

/// The limits of both, and their rules.
pub(super) fn config(setup: u8) -> Config {
    let mut config = Config::default();
    config.compare.held_bytes_max = HELD_BYTES_MAX;
    config.compare.held_bytes_full = HELD_BYTES_FULL;
    config.compare.svm_bytes_max = SVM_BYTES_MAX;
    config.compare.flows_max = FLOWS_MAX;
    config.compare.clamp_windows = setup & 4 == 0;
    config.rewrite = Limits { connections_max: CONNECTIONS_MAX, held_bytes_max: WAITING_BYTES_MAX };
    if setup & 2 != 0 {
        config.policy = RULES.parse::<Policy>().unwrap();
    }
    config
}

/// What is kept is within the limits, and what one packet more may cost.
pub(super) fn check_limits(primary: &Primary, secondary: &Secondary, frame_bytes_max: usize) {
    let compare = primary.stats().compare;
    assert!(compare.held_bytes <= HELD_BYTES_FULL + 2 * frame_bytes_max + COST_MAX, "{compare:?}");
    assert!(compare.svm_bytes <= SVM_BYTES_MAX + 2 * frame_bytes_max + COST_MAX, "{compare:?}");
    let rewrite = secondary.stats().rewrite;
    assert!(rewrite.connections <= CONNECTIONS_MAX, "{rewrite:?}");
    assert!(rewrite.held_bytes <= WAITING_BYTES_MAX, "{rewrite:?}");
}

/// What any frame is taken for lies within it.
pub(super) fn parse(frame: &[u8]) {
    let first = Packet::parse_first_fragment(frame);
    for packet in [&Packet::parse(frame), &first] {
        assert!(packet.vlan.tags().len() <= 2);
        let _ = packet.flow_from_guest(frame).to_string();
        if let Some(quoted) = Quoted::find(packet, frame) {
            assert!(quoted.icmp_at + 8 <= quoted.tcp.start && quoted.tcp.len() >= 8);
            assert!(quoted.tcp.end <= frame.len());
        }
        match &packet.kind {
            Kind::Tcp { segment, .. } => {
                assert!(packet.network_at + 20 <= segment.at && segment.at + 20 == segment.options.start);
                assert!(segment.options.end == segment.payload.start && segment.payload.end <= frame.len());
                for (_, data) in segment.options(frame) {
                    assert!(segment.options.start + 2 <= data.start && data.end <= segment.options.end);
                }
                let _ = segment.syn_options(frame);
                if let Some(timestamps) = segment.timestamps(frame) {
                    assert!(timestamps.at + 8 <= segment.options.end);
                }
                for at in edge_positions(segment, frame) {
                    assert!(segment.options.start < at && at + 4 <= segment.options.end);
                }
                assert!(packet.tcp_flow_to_guest().is_some_and(|flow| flow.is_tcp()));
            }
            Kind::Datagram { content, place, transport, .. } => {
                assert!(packet.network_at + 20 <= content.start && content.start <= content.end);
                assert!(content.end <= frame.len());
                assert!(*place == 0 || matches!(transport, Transport::Fragment { .. }));
                assert_eq!(packet.is_fragment(), packet.fragment(frame).is_some());
            }
            Kind::Arp => assert!(packet.network_at + 28 <= frame.len()),
            Kind::Opaque => {}
        }
    }
}

/// Fragments by themselves: what goes in comes out.
#[derive(Default)]
struct Fragments {
    reassembler: Reassembler<Vec<u8>>,
    inside: Vec<Vec<u8>>,
}

impl Fragments {
    fn put(&mut self, frame: &[u8], now_us: u64) {
        let Some(fragment) = Packet::parse(frame).fragment(frame) else {
            return;
        };
        self.inside.push(frame.to_vec());
        match self.reassembler.put(&fragment, frame.to_vec(), now_us) {
            Put::Kept => {}
            Put::Whole(datagram) => {
                parse(&datagram.frame);
                assert!(datagram.cost() >= datagram.frame.len());
                self.came_out(datagram.into_fragments());
            }
            Put::Singly(frames) => self.came_out(frames),
        }
        self.check();
    }

    fn came_out(&mut self, frames: Vec<Vec<u8>>) {
        for frame in frames {
            let at = self.inside.iter().position(|inside| *inside == frame).expect("it was put in");
            self.inside.swap_remove(at);
        }
    }

    fn give_up(&mut self, before_us: u64, now_us: u64) {
        let frames = self.reassembler.give_up(before_us, now_us);
        self.came_out(frames);
        self.check();
    }

    fn check(&self) {
        let bytes: usize = self.inside.iter().map(Vec::len).sum();
        assert_eq!((self.reassembler.frames(), self.reassembler.bytes()), (self.inside.len(), bytes));
        assert_eq!(self.reassembler.oldest_us().is_some(), !self.inside.is_empty());
    }
}

/// What the rewriter did to a frame: numbers only, and a right checksum stays right.
fn check_rewritten(header: FrameHeader, before: &[u8], after: &[u8]) {
    assert_eq!(before.len(), after.len());
    let packet = Packet::parse_first_fragment(before);
    let mut may_change = Vec::new();
    if let Kind::Tcp { segment, addresses } = &packet.kind {
        may_change.extend(segment.at + 4..segment.at + 12);
        may_change.extend(segment.at + 16..segment.at + 18);
        for at in edge_positions(segment, before) {
            may_change.extend(at..at + 4);
        }
        if let Some(timestamps) = segment.timestamps(before) {
            may_change.extend(timestamps.at..timestamps.at + 8);
        }
        let all = segment.at..segment.payload.end;
        if header.checksum() == Checksum::Complete && is_right(addresses, &before[all.clone()]) {
            assert!(is_right(addresses, &after[all]), "{before:02x?} became {after:02x?}");
        }
    } else if let Some(quoted) = Quoted::find(&packet, before) {
        let tcp = quoted.tcp.start;
        may_change.extend(tcp + 4..tcp + 8);
        may_change.extend(tcp + 16..tcp + 18);
        may_change.extend(quoted.icmp_at + 2..quoted.icmp_at + 4);
        if let Kind::Datagram { addresses, content, .. } = &packet.kind
            && addresses.source.is_ipv4()
            && checksum::of(&[&before[content.clone()]]) == 0
        {
            assert_eq!(checksum::of(&[&after[content.clone()]]), 0, "{before:02x?} became {after:02x?}");
        }
    }
    for (at, (before, after)) in before.iter().zip(after).enumerate() {
        assert!(before == after || may_change.contains(&at), "byte {at} has changed");
    }
}

/// A connection of known numbers: what goes out and comes back has the numbers that it had.
fn round_trip(input: &mut Input<'_>) {
    let shift = u32::from(input.word()) << 8;
    let exit = Exit::Peer { epoch: 1 };
    let mut rewriter = Rewriter::new(Limits::default());
    let mut actions = Actions::new();
    for syn in frames(input, false) {
        let packet = Packet::parse(&syn);
        let Kind::Tcp { segment, .. } = &packet.kind else {
            continue;
        };
        let (isn, timestamp) = (segment.seq.wrapping_sub(shift), segment.timestamps(&syn));
        let flow = packet.flow_from_guest(&syn);
        rewriter.outbound(FrameHeader::default(), &syn, 0, exit, &mut actions);
        rewriter.pvm_begins(
            &Isn { flow, isn, timestamp: timestamp.map(|timestamps| timestamps.value) },
            0,
            exit,
            &mut actions,
        );
        actions.clear();
        if !segment.flags.has(2) || segment.flags.has(4) {
            continue;
        }
        for frame in frames(input, false) {
            let packet = Packet::parse(&frame);
            let Kind::Tcp { segment, .. } = &packet.kind else {
                continue;
            };
            if packet.flow_from_guest(&frame) != flow || segment.flags.has(2) || segment.flags.has(4) {
                continue;
            }
            rewriter.outbound(FrameHeader::default(), &frame, 0, exit, &mut actions);
            let Some(Action::ToPeer { payload, .. }) = actions.iter().next() else {
                panic!("it went nowhere");
            };
            check_rewritten(FrameHeader::default(), &frame, payload);
            let Kind::Tcp { segment: out, .. } = Packet::parse(payload).kind else {
                panic!("it is TCP no more");
            };
            assert_eq!((out.seq, out.ack), (segment.seq.wrapping_sub(shift), segment.ack));
            let ack = out.seq_end();
            actions.clear();
            // the client acknowledges it
            let mut answer = answer_to(&frame, ack);
            answer[..6].copy_from_slice(&frame[6..12]);
            if Packet::parse(&answer).tcp_flow_to_guest() != Some(flow) {
                // a source route leads elsewhere
                continue;
            }
            rewriter.inbound(FrameHeader::default(), &answer, 0, &mut actions);
            let Some(Action::ToGuest(given)) = actions.iter().next() else {
                panic!("it went nowhere");
            };
            let Kind::Tcp { segment: back, .. } = Packet::parse(given).kind else {
                panic!("it is TCP no more");
            };
            check_rewritten(FrameHeader::default(), &answer, given);
            assert_eq!(back.ack, segment.seq_end());
            actions.clear();
        }
    }
}

/// What a client answers to a frame: the same the other way around, with an acknowledgment.
fn answer_to(frame: &[u8], ack: u32) -> Vec<u8> {
    let packet = Packet::parse(frame);
    let mut answer = frame.to_vec();
    let Kind::Tcp { segment, addresses } = &packet.kind else {
        return answer;
    };
    let (from, to) = if addresses.source.is_ipv4() {
        (packet.network_at + 12, packet.network_at + 16)
    } else {
        (packet.network_at + 8, packet.network_at + 24)
    };
    let bytes = to - from;
    let (source, destination) = (frame[from..to].to_vec(), frame[to..to + bytes].to_vec());
    answer[from..to].copy_from_slice(&destination);
    answer[to..to + bytes].copy_from_slice(&source);
    let at = segment.at;
    answer[at..at + 2].copy_from_slice(&frame[at + 2..at + 4]);
    answer[at + 2..at + 4].copy_from_slice(&frame[at..at + 2]);
    answer[at + 8..at + 12].copy_from_slice(&ack.to_be_bytes());
    answer[at + 13] = 0x10;
    answer
}

/// Both halves, and the links between them.
struct Stand {
    primary: Primary,
    secondary: Secondary,
    actions: Actions,
    to_primary: VecDeque<(u16, u64, Vec<u8>)>,
    to_secondary: VecDeque<(u16, u64, Vec<u8>)>,
    /// The link stands still.
    stalled: bool,
    /// The secondary has the marker.
    marker_is_here: bool,
    digests: bool,
    output: Output,
    now_us: u64,
    fragments: Fragments,
    /// Frames that the PVM has sent.
    recent: VecDeque<Vec<u8>>,
}

impl Stand {
    fn new(setup: u8) -> Self {
        let config = config(setup);
        let digests = setup & 1 != 0;
        let key = || Key::new(0x0123_4567_89ab_cdef).unwrap();
        let mut stand = Self {
            primary: Primary::new(&config, 1, 0),
            secondary: Secondary::new(&config, 1, 0),
            actions: Actions::new(),
            to_primary: VecDeque::new(),
            to_secondary: VecDeque::new(),
            stalled: false,
            marker_is_here: false,
            digests,
            output: Output::new(config.policy.clone(), setup & 2 != 0, digests.then(key)),
            now_us: 0,
            fragments: Fragments::default(),
            recent: VecDeque::new(),
        };
        if digests {
            stand.primary.want_digests(key(), &mut stand.actions);
        }
        stand.primary_has_acted(false);
        stand.deliver();
        stand
    }

    /// Parses what may be no frame. Whether it is one: devices and taps give no others to the proxy.
    fn is_frame(&mut self, frame: &[u8]) -> bool {
        parse(frame);
        self.fragments.put(frame, self.now_us);
        frame.len() >= FRAME_BYTES_MIN
    }

    fn pvm_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        if !self.is_frame(frame) || !self.primary.accepts_output() {
            return;
        }
        if self.recent.len() == 16 {
            self.recent.pop_front();
        }
        self.recent.push_back(frame.to_vec());
        self.output.pvm_sends(header, frame);
        self.primary.guest_output(buffer(header, frame), self.now_us, &mut self.actions);
        self.primary_has_acted(false);
    }

    fn svm_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        if !self.is_frame(frame) {
            return;
        }
        self.secondary.guest_output(buffer(header, frame), self.now_us, &mut self.actions);
        let made: Vec<_> = self.actions.iter().collect();
        if let ([Action::ToPeer { kind: OUTPUT, payload, .. }], false) = (&made[..], self.digests) {
            check_rewritten(header, frame, payload);
        }
        self.secondary_has_acted();
    }

    fn lan_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        if !self.is_frame(frame) {
            return;
        }
        self.primary.headed_lan_input(header, frame, self.now_us, &mut self.actions);
        self.primary_has_acted(false);
        self.deliver();
    }

    /// Looks at what the primary wants, and sends what is for the peer.
    fn primary_has_acted(&mut self, by_commit: bool) {
        for action in self.actions.iter() {
            match action {
                Action::ToLan(frame) => self.output.leaves(frame, self.primary.epoch(), by_commit),
                Action::ToPeer { kind, epoch, payload } => {
                    self.to_secondary.push_back((kind, epoch, payload.to_vec()));
                }
                Action::MarkerArrived { .. } => panic!("a primary has no marker"),
                Action::ToGuest(_) | Action::CheckpointWanted { .. } => {}
            }
        }
        self.actions.clear();
    }

    fn secondary_has_acted(&mut self) {
        for action in self.actions.iter() {
            match action {
                Action::ToLan(frame) => panic!("The secondary sends {:02x?}", &frame[..]),
                Action::ToPeer { kind, epoch, payload } => {
                    self.to_primary.push_back((kind, epoch, payload.to_vec()));
                }
                Action::MarkerArrived { .. } => self.marker_is_here = true,
                Action::ToGuest(_) | Action::CheckpointWanted { .. } => {}
            }
        }
        self.actions.clear();
    }

    /// What is on the links arrives. What sound halves say to each other is never refused.
    fn deliver(&mut self) {
        if self.stalled {
            return;
        }
        loop {
            if let (false, Some((kind, epoch, payload))) =
                (self.marker_is_here, self.to_secondary.pop_front())
            {
                self.secondary.peer_frame(kind, epoch, &payload, self.now_us, &mut self.actions).unwrap();
                self.secondary_has_acted();
            } else if let Some((kind, epoch, payload)) = self.to_primary.pop_front() {
                match kind {
                    OUTPUT | ANSWER => self.output.svm_says(epoch, &payload),
                    DIGEST => self.output.svm_digests(epoch, &payload),
                    _ => {}
                }
                self.primary.peer_frame(kind, epoch, &payload, self.now_us, &mut self.actions).unwrap();
                self.primary_has_acted(false);
            } else {
                break;
            }
        }
        check_limits(&self.primary, &self.secondary, FRAME_BYTES);
    }

    fn flush(&mut self) {
        self.secondary.flush(&mut self.actions);
        self.secondary_has_acted();
        self.deliver();
    }

    fn tick(&mut self, us: u64) {
        self.now_us += us;
        self.primary.tick(self.now_us, &mut self.actions);
        self.primary_has_acted(false);
        self.secondary.tick(self.now_us, &mut self.actions);
        self.secondary_has_acted();
        self.fragments.give_up(self.now_us.saturating_sub(50_000), self.now_us);
        self.deliver();
    }

    /// A checkpoint, between whose steps more may happen.
    fn checkpoint(&mut self, early: Option<&[u8]>) {
        self.stalled = false;
        let epoch = self.primary.epoch();
        self.primary.marker(epoch, &mut self.actions).unwrap();
        self.primary_has_acted(false);
        self.flush();
        assert!(self.marker_is_here);
        self.secondary.commit(epoch, &mut self.actions).unwrap();
        self.marker_is_here = false;
        self.secondary_has_acted();
        self.deliver();
        if let Some(frame) = early {
            self.svm_sends(FrameHeader::default(), frame);
            self.flush();
        }
        self.primary.commit(epoch, self.now_us, &mut self.actions).unwrap();
        self.primary_has_acted(true);
        let compare = self.primary.stats().compare;
        assert_eq!((compare.held_packets, compare.held_bytes, self.output.waiting()), (0, 0, 0));
        assert!(early.is_some() || compare.svm_bytes == 0, "{compare:?}");
        let rewrite = self.secondary.stats().rewrite;
        assert!(early.is_some() || (rewrite.connections, rewrite.held_bytes) == (0, 0), "{rewrite:?}");
        self.deliver();
    }

    /// The link breaks, and one side wins.
    fn fail(mut self, primary_wins: bool) {
        self.primary.detach();
        self.secondary.detach();
        let frame = [2; 60];
        if self.primary.accepts_output() {
            self.output.pvm_sends(FrameHeader::default(), &frame);
            self.primary.guest_output(frame[..].into(), self.now_us, &mut self.actions);
        }
        self.primary.tick(self.now_us + 10_000_000, &mut self.actions);
        self.secondary.guest_output(frame[..].into(), self.now_us, &mut self.actions);
        assert!(!self.actions.iter().any(|action| matches!(action, Action::ToLan(_))), "nothing is decided");
        if primary_wins {
            self.secondary.silence();
            self.primary.take_over(self.now_us, &mut self.actions);
            self.primary_has_acted(true);
            assert_eq!(self.output.waiting(), 0);
        } else {
            self.primary.silence();
            self.secondary.take_over(self.now_us, &mut self.actions);
            self.actions.clear();
            self.primary.guest_output(frame[..].into(), self.now_us, &mut self.actions);
            self.primary.tick(self.now_us + 20_000_000, &mut self.actions);
            assert!(self.actions.is_empty());
        }
        let compare = self.primary.stats().compare;
        assert_eq!((compare.held_packets, compare.held_bytes, compare.svm_bytes), (0, 0, 0));
    }
}

/// Any frames of the guest and the LAN, with checkpoints in between.
pub fn packets(data: &[u8]) {
    let mut input = Input(data);
    let setup = input.byte();
    let mut stand = Stand::new(setup);
    // the SVM numbers its connections otherwise
    let shift = if setup & 8 == 0 { 0 } else { 0x1234_5678 };
    while !input.is_empty() {
        let what = input.byte();
        match what % 16 {
            0..=6 => {
                for frame in frames(&mut input, false) {
                    let header = header(&mut input, &frame);
                    let (pvm, svm) = ([1, 1, 1, 0, 0, 1, 2], [0, 1, 2, 1, 1, 1, 1]);
                    let (pvm, svm) = (pvm[usize::from(what % 16)], svm[usize::from(what % 16)]);
                    // who is first
                    for turn in 0..2 {
                        if turn == what >> 6 & 1 {
                            (0..pvm).for_each(|_| stand.pvm_sends(header, &frame));
                        } else {
                            let header = if shift == 0 { header } else { FrameHeader::default() };
                            (0..svm).for_each(|_| stand.svm_sends(header, &renumbered(&frame, shift)));
                        }
                        stand.deliver();
                    }
                }
            }
            7 | 8 => {
                // what the PVM said comes again, cut otherwise
                let Some(frame) = stand.recent.get(usize::from(what >> 4)).cloned() else {
                    continue;
                };
                let piece = resegmented(&frame, input.byte());
                if what % 16 == 7 {
                    stand.svm_sends(FrameHeader::default(), &renumbered(&piece, shift));
                } else {
                    stand.pvm_sends(FrameHeader::default(), &piece);
                }
                stand.deliver();
            }
            9 | 10 => {
                for frame in frames(&mut input, true) {
                    let header = header(&mut input, &frame);
                    stand.lan_sends(header, &frame);
                }
            }
            11 => stand.flush(),
            12 => stand.tick(u64::from(input.word()) * 16),
            13 => stand.stalled = !stand.stalled,
            14 => round_trip(&mut input),
            _ => {
                let early = (what & 0x10 != 0).then(|| frames(&mut input, false).swap_remove(0));
                stand.checkpoint(early.as_deref());
            }
        }
    }
    if setup & 0x30 == 0x30 {
        stand.fail(setup & 0x40 != 0);
    } else {
        stand.checkpoint(None);
        let last_us = stand.now_us;
        stand.fragments.give_up(u64::MAX, last_us);
        assert!(stand.fragments.inside.is_empty());
    }
}

/// A part of a TCP segment, as another stack would have cut it.
fn resegmented(frame: &[u8], cut: u8) -> Vec<u8> {
    let packet = Packet::parse(frame);
    let Kind::Tcp { segment, addresses } = &packet.kind else {
        return frame.to_vec();
    };
    let payload = segment.payload.clone();
    if payload.is_empty() || segment.flags.has(2) {
        return frame.to_vec();
    }
    let from = payload.start + usize::from(cut >> 4) * payload.len() / 16;
    let to = payload.end.min(from + 1 + usize::from(cut % 16) * payload.len() / 15);
    let mut piece = [&frame[..payload.start], &frame[from..to]].concat();
    let bytes = (piece.len() - packet.network_at) as u16;
    let seq = segment.seq.wrapping_add((from - payload.start) as u32);
    let (ip, at) = (packet.network_at, segment.at);
    if addresses.source.is_ipv4() {
        piece[ip + 2..ip + 4].copy_from_slice(&bytes.to_be_bytes());
    } else {
        piece[ip + 4..ip + 6].copy_from_slice(&(bytes - 40).to_be_bytes());
    }
    piece[at + 4..at + 8].copy_from_slice(&seq.to_be_bytes());
    piece[at + 16..at + 18].fill(0);
    let sum = checksum::of_tcp(addresses, &piece[at..]);
    piece[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
    piece
}

/// What sound guests and clients send.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // what, then kind, how, flags and options, numbers, window, data; the header
    let tcp = |what: u8, how: u8, flags: u8, seq: u8, data: u8| {
        let mut bytes = vec![what, 15, how, flags, seq, 0x90, 200];
        match flags >> 4 {
            1 | 2 => bytes.push(seq),
            3..=7 => bytes.extend([seq, 5]),
            _ => {}
        }
        bytes.extend([data, 2]);
        bytes
    };
    let mut all = Vec::new();
    for setup in 0..16 {
        for how in [0, 4, 1, 0x0c, 0x15] {
            let mut seed = vec![setup];
            seed.extend(tcp(1, how, 0x11, 0x40, 0));
            seed.extend([9, 15, how, 0x34, 0x90, 0x41, 200, 1, 0x40, 0, 2]);
            for round in 0..3 {
                seed.extend(tcp(1, how, 0x33, 0x41 + 20 * round, 20));
                seed.extend(tcp(0, how, 0x33, 0x90 + 20 * round, 255));
                seed.extend([7 | round << 4, 0x07, 7 | round << 4, 0x8f, 11, 12, 0, 1]);
                seed.extend([9, 15, how, 0x64, 0x90, 0x41, 200, 0x50, 0x60, 0, 2]);
            }
            seed.extend([15]);
            seed.extend(tcp(1, how, 0x35, 0x80, 9));
            // UDP, ICMP, an error about a segment, ARP, ESP, fragments
            seed.extend([1, 2, how, 9, 2, 2, 3, how, 9, 2, 3, 3, how, 9, 2, 1, 4, how, 9, 2]);
            seed.extend([9, 5, how, 0x04, 0x41, 0x90, 200, 0, 20, 2, 1, 0, how, 1, 2, 1, 0x16, how, 4, 2]);
            seed.extend([1, 2, how & 4 | 0x20, 255, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
            seed.extend([1, 10, how & 4 | 0x20, 0x33, 0x41, 0x90, 200, 1, 2, 255, 2, 3, 2, 2, 2, 2, 2, 2]);
            seed.extend([
                14, 3, 1, 15, how, 0x11, 0x40, 0x90, 200, 1, 0, 15, how, 0x34, 0x41, 0x90, 1, 2, 3, 9,
            ]);
            seed.extend([13, 0, 2, how, 9, 2, 3, 2, how, 9, 2, 13, 12, 0xff, 0xff, 31, 2, how, 9]);
            all.push(seed);
        }
    }
    all.into_iter().map(|seed| ("packets", seed)).collect()
}
