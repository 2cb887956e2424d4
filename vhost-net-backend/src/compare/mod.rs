//! The primary's comparison: which packets of the PVM may leave, given what the SVM has said.
//!
//! A packet leaves when the SVM has produced the same bytes, or when a checkpoint taken after it is committed; nothing
//! that is held is ever dropped. What the SVM says ahead of the PVM is kept up to a limit; beyond it a checkpoint is
//! wanted, and what was dropped costs nothing but that.

mod datagrams;
mod flows;
mod fragments;
mod held;
mod masking;
mod mismatches;
mod output;
mod pending;
mod stats;
mod stream;
mod tcp;
mod window;

pub use mismatches::{Differing, Mismatch, ServiceCount};
pub use stats::CompareStats;
pub(crate) use tcp::is_refusal;

use std::collections::VecDeque;

use datagrams::essence;
use flows::{FlowId, Flows, Protocol, Treated};
use fragments::Fragments;
use held::{Chain, HeldId, HeldPacket, HeldPackets, List};
use masking::Sender;
use mismatches::{How, Mismatches};
use output::Output;
use tcp::{Piece, Verdict, Wait, When};

use crate::digest::{Ask, Key, Run};
use crate::offload::FrameHeader;
use crate::packet::{Flags, FlowKey, FlowName, FromGuest, Kind, Packet};
use crate::policy::Policy;
use crate::proxy::{Actions, Buffer, Cause};

/// What the comparison keeps within. Times are in microseconds, like all times here.
#[derive(Clone, Debug)]
pub struct Limits {
    /// With more bytes of held packets than this a checkpoint is wanted.
    pub held_bytes_max: usize,
    /// With more bytes of held packets than this the guest must send no more.
    pub held_bytes_full: usize,
    /// When a packet is held longer than this a checkpoint is wanted.
    pub held_us_max: u64,
    /// The same for packets whose time a guest's timers choose, and for which nobody waits: acknowledgments without
    /// data, ARP and neighbour discovery. Longer than a delayed acknowledgment (RFC 9293 §3.8.6.3: 0.5 s at most,
    /// 0.2 s in Linux).
    pub patient_us_max: u64,
    /// When the SVM says a datagram that the PVM did not, the two have this long to come out even.
    pub disputed_us_max: u64,
    /// When the PVM has said only the beginning of what a digest covers, it has this long to go on before the SVM is
    /// asked for the bytes.
    pub unfinished_us_max: u64,
    /// Memory for what the SVM says ahead of the PVM.
    pub svm_bytes_max: usize,
    /// Entries in the table of flows. Flows that hold packets are kept beyond it.
    pub flows_max: usize,
    /// Whether released windows are kept within what the SVM has offered.
    pub clamp_windows: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            held_bytes_max: 16 << 20,
            held_bytes_full: 32 << 20,
            held_us_max: 100_000,
            patient_us_max: 250_000,
            disputed_us_max: 30_000,
            unfinished_us_max: 500,
            svm_bytes_max: 32 << 20,
            flows_max: 65_536,
            clamp_windows: true,
        }
    }
}

/// The comparison of one VM's output.
#[derive(Debug)]
pub struct Compare {
    limits: Limits,
    flows: Flows,
    held: HeldPackets,
    fragments: Fragments,
    /// Held packets that may wait too long: normally, patiently, and in dispute. Each in the order of their time.
    due: [List; 3],
    /// Connections that the SVM has reset, by the time when the PVM should have too.
    resets: VecDeque<(u64, FlowKey)>,
    /// The secret of the SVM's digests, if it sends any.
    key: Option<Box<Key>>,
    /// Where the PVM has said the beginning of what a digest covers: when to ask for the bytes, and where it starts.
    unfinished: VecDeque<(u64, FlowKey, u32)>,
    /// Bytes to ask the SVM for.
    asks: Vec<Ask>,
    svm_bytes: usize,
    /// A checkpoint has been asked for in this epoch.
    wanted: bool,
    suspended: bool,
    mismatches: Mismatches,
    stats: CompareStats,
}

/// In which of its flow's lists a packet waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    InOrder,
    Aside,
    /// As the first, and it does not matter how long.
    ToCheckpoint,
}

const NORMAL: usize = 0;
const PATIENT: usize = 1;
const DISPUTED: usize = 2;

impl Compare {
    /// Nothing is held, nothing is known, and every flow is compared.
    pub fn new(limits: Limits) -> Self {
        Self::with_policy(limits, Policy::default())
    }

    /// The same, but flows are treated by these rules.
    pub fn with_policy(limits: Limits, policy: Policy) -> Self {
        Self {
            flows: Flows::new(limits.flows_max, policy),
            limits,
            held: HeldPackets::new(),
            fragments: Fragments::default(),
            due: [List::of(Chain::Due); 3],
            resets: VecDeque::new(),
            key: None,
            unfinished: VecDeque::new(),
            asks: Vec::new(),
            svm_bytes: 0,
            wanted: false,
            suspended: false,
            mismatches: Mismatches::default(),
            stats: CompareStats::default(),
        }
    }

    /// From now on the SVM may send digests made with this key.
    pub fn expect_digests(&mut self, key: Box<Key>) {
        self.key = Some(key);
    }

    /// Bytes that the SVM must be asked for, since digests do not do.
    pub fn take_asks(&mut self) -> impl Iterator<Item = Ask> {
        self.stats.asked += self.asks.len() as u64;
        self.asks.drain(..)
    }

    /// The PVM has sent this frame, which is `packet`.
    pub fn pvm_says(&mut self, frame: Buffer, packet: Packet, now_us: u64, actions: &mut Actions) {
        match packet.fragment(&frame) {
            Some(fragment) if !self.suspended => self.pvm_fragment(frame, &fragment, now_us, actions),
            _ => self.pvm_sends(Output::Frame(frame), packet, now_us, actions),
        }
    }

    fn pvm_sends(&mut self, frame: Output, packet: Packet, now_us: u64, actions: &mut Actions) {
        self.stats.pvm_packets += 1;
        let id = self.flows.get(&FromGuest(&packet, &frame), now_us);
        if self.suspended {
            self.hold(id, frame, packet, Lane::InOrder, now_us, actions);
            return;
        }
        let flow = &mut self.flows[id];
        let masked = match &mut flow.treated {
            Treated::Compare => None,
            Treated::Bypass => {
                if let (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) = (&mut flow.protocol, &packet.kind) {
                    tcp.passed(segment, &frame);
                }
                leave(&mut flow.protocol, &packet, frame, false, actions);
                self.stats.bypassed += 1;
                return;
            }
            Treated::Checkpoint => {
                self.hold(id, frame, packet, Lane::ToCheckpoint, now_us, actions);
                return;
            }
            Treated::Mask(masking) => masking.masked(Sender::Pvm, &packet, &frame),
        };
        let compared = masked.as_deref().unwrap_or(&frame);
        let before = flow.cost();
        let (mut leaves, mut lane, mut differs, mut piece) = (false, Lane::InOrder, None, None);
        match (&mut flow.protocol, &packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) if !flow.stuck => {
                let begins = tcp.begins(segment);
                if !flow.begins && tcp.repeats(segment) {
                    lane = Lane::Aside;
                }
                flow.begins |= begins;
                let first = match lane {
                    Lane::Aside => flow.aside.is_empty(),
                    _ => flow.held.is_empty() && (flow.aside.is_empty() || !begins),
                };
                if first {
                    match tcp.judge(segment, compared, &std::iter::empty(), self.key.as_deref()) {
                        Verdict::Release => {
                            tcp.passed(segment, &frame);
                            leaves = true;
                        }
                        Verdict::Wait(Wait::Piece(unfinished)) => piece = Some(unfinished),
                        Verdict::Wait(_) => {}
                        Verdict::Differ(difference) => {
                            differs = Some(How::told(difference, tcp, segment, compared));
                        }
                    }
                }
            }
            (Protocol::Tcp(_), _) => {}
            (Protocol::Messages(messages), _) => {
                if messages.take(essence(&packet, compared)) {
                    leaves = flow.held.is_empty() || !messages.ordered;
                    lane = Lane::Aside;
                }
            }
        }
        self.svm_bytes = self.svm_bytes + flow.cost() - before;
        if leaves {
            flow.begins &= !flow.held.is_empty();
            leave(&mut flow.protocol, &packet, frame, self.limits.clamp_windows, actions);
            self.stats.released_at_once += 1;
            return;
        }
        if let Some(how) = differs {
            flow.stuck = true;
            self.mismatch(id, how, now_us, actions);
        }
        let held = self.hold(id, frame, packet, lane, now_us, actions);
        if let Some(masked) = masked {
            self.held.mask(held, masked);
        }
        if let Some(piece) = piece {
            self.ask_for(id, &piece, now_us);
        }
        if piece.is_none() && self.is_short(id) {
            self.advance_tcp(id, now_us, actions);
        }
    }

    /// Whether what waits in front of a flow waits for what the PVM says next.
    fn is_short(&self, id: FlowId) -> bool {
        matches!(&self.flows[id].protocol, Protocol::Tcp(tcp) if tcp.is_short())
    }

    /// Sees to it that the PVM need not wait for itself: it may have no more to say before the client answers.
    fn ask_for(&mut self, id: FlowId, piece: &Piece, now_us: u64) {
        let (flow, Piece { seq, bytes, ask }) = (self.flows[id].key, *piece);
        match ask {
            Some(When::Now) => self.asks.push(Ask { flow, seq, bytes }),
            Some(When::Soon) => {
                self.unfinished.push_back((now_us + self.limits.unfinished_us_max, flow, seq));
            }
            None => {}
        }
    }

    fn hold(
        &mut self,
        id: FlowId,
        frame: Output,
        packet: Packet,
        lane: Lane,
        now_us: u64,
        actions: &mut Actions,
    ) -> HeldId {
        let flow = &mut self.flows[id];
        let patience = match (&packet.kind, &flow.protocol) {
            _ if lane == Lane::ToCheckpoint => None,
            // it has been said and waits for those before it, which have their own time
            (_, Protocol::Messages(_)) if lane == Lane::Aside => None,
            (_, Protocol::Messages(messages)) if messages.repeatable() => Some(PATIENT),
            (Kind::Tcp { segment, .. }, _) if segment.is_pure_ack() => Some(PATIENT),
            _ => Some(NORMAL),
        };
        let held = self.held.push(id, packet, frame, now_us);
        match lane {
            Lane::InOrder | Lane::ToCheckpoint => self.held.append(&mut flow.held, held),
            Lane::Aside => {
                self.held.append(&mut flow.aside, held);
                self.held.get_mut(held).aside = true;
            }
        }
        if self.wanted {
            return held;
        }
        match patience {
            Some(PATIENT) => self.await_due(PATIENT, held, now_us + self.limits.patient_us_max),
            Some(_) => self.await_due(NORMAL, held, now_us + self.limits.held_us_max),
            None => {}
        }
        self.want_within_limits(actions);
        held
    }

    /// The packet will have waited too long then.
    fn await_due(&mut self, class: usize, id: HeldId, due_us: u64) {
        self.held.append(&mut self.due[class], id);
        let packet = self.held.get_mut(id);
        (packet.due, packet.due_us) = (Some(class), due_us);
    }

    /// The packet waits no longer, or only for its turn.
    fn await_no_more(&mut self, id: HeldId) {
        if let Some(class) = self.held.get_mut(id).due.take() {
            self.held.unlink(&mut self.due[class], id);
        }
    }

    /// The place of a flow of which the SVM has something to say, if there is room to keep that. Losing it is safe: what
    /// the PVM says waits for a checkpoint, and that is on its way.
    fn flow_if_room(&mut self, name: &impl FlowName, now_us: u64, actions: &mut Actions) -> Option<FlowId> {
        if !self.has_room_for_svm(actions) {
            return None;
        }
        let id = self.flows.get_if_room(name, now_us);
        if id.is_none() {
            let detail = format!("The flow table is full ({} flows)", self.flows.len());
            self.want(Cause::Buffer, detail, actions);
        }
        id
    }

    /// The SVM has sent segments of this flow, of which only the digests are here.
    pub fn svm_digests(&mut self, key: &FlowKey, run: &Run<'_>, now_us: u64, actions: &mut Actions) {
        let count = run.pieces().count() as u64;
        self.stats.svm_packets += count;
        self.stats.digests += count;
        let Some(id) = self.flow_if_room(key, now_us, actions) else {
            self.stats.svm_packets_dropped += count;
            return;
        };
        let flow = &mut self.flows[id];
        if !matches!(flow.treated, Treated::Compare) {
            // of a flow that is masked, bytes are needed: without them it waits for a checkpoint
            self.stats.svm_packets_unused += count;
            return;
        }
        let before = flow.cost();
        if let Protocol::Tcp(tcp) = &mut flow.protocol {
            tcp.svm_digests(run);
            self.svm_bytes = self.svm_bytes + flow.cost() - before;
            self.advance_tcp(id, now_us, actions);
        }
    }

    /// The SVM has sent this frame; sequence numbers are in the PVM's space already.
    pub fn svm_says(&mut self, frame: &[u8], now_us: u64, actions: &mut Actions) {
        let packet = Packet::parse(frame);
        match packet.fragment(frame) {
            Some(fragment) => self.svm_fragment(frame, &fragment, now_us, actions),
            None => self.svm_sends(frame, &packet, now_us, actions),
        }
    }

    /// Whether what the SVM says may be kept.
    fn has_room_for_svm(&mut self, actions: &mut Actions) -> bool {
        if self.svm_bytes <= self.limits.svm_bytes_max {
            return true;
        }
        let detail = format!("{} bytes of the SVM's output wait for the PVM's", self.svm_bytes);
        self.want(Cause::Buffer, detail, actions);
        false
    }

    fn svm_sends(&mut self, frame: &[u8], packet: &Packet, now_us: u64, actions: &mut Actions) {
        self.stats.svm_packets += 1;
        let Some(id) = self.flow_if_room(&FromGuest(packet, frame), now_us, actions) else {
            self.stats.svm_packets_dropped += 1;
            return;
        };
        let flow = &mut self.flows[id];
        let masked = match &mut flow.treated {
            Treated::Compare => None,
            Treated::Bypass | Treated::Checkpoint => {
                self.stats.svm_packets_unused += 1;
                return;
            }
            Treated::Mask(masking) => masking.masked(Sender::Svm, packet, frame),
        };
        let frame = masked.as_deref().unwrap_or(frame);
        let before = flow.cost();
        match (&mut flow.protocol, &packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) => {
                let held = &self.held;
                let waiting = std::iter::successors(flow.held.first(), |id| held.next(Chain::Flow, *id));
                let is_known = tcp.svm_alone_has_reset();
                tcp.svm_says(segment, frame, waiting.map(|id| held.get(id)));
                if tcp.svm_alone_has_reset() && !is_known && !self.wanted {
                    self.resets.push_back((now_us + self.limits.held_us_max, flow.key));
                }
                self.svm_bytes = self.svm_bytes + flow.cost() - before;
                self.advance_tcp(id, now_us, actions);
            }
            (Protocol::Messages(_), _) => self.svm_message(id, packet, frame, now_us, actions),
            // a key tells TCP from the rest
            (Protocol::Tcp(_), _) => {}
        }
    }

    /// Whether the PVM has sent the SYN of this connection before, and it is held, or was the last to be released.
    pub fn has_seen_begin(&self, flow: &FlowKey, isn: u32) -> bool {
        let Some(flow) = self.flows.peek(flow) else {
            return false;
        };
        let begins = |packet: &Packet| {
            matches!(&packet.kind, Kind::Tcp { segment, .. }
                if segment.flags.has(Flags::SYN) && segment.seq == isn)
        };
        let mut waiting = std::iter::successors(flow.held.first(), |id| self.held.next(Chain::Flow, *id));
        matches!(&flow.protocol, Protocol::Tcp(tcp) if tcp.isn() == Some(isn))
            || waiting.any(|id| begins(&self.held.get(id).packet))
    }

    /// The PVM is paused for a checkpoint: nothing is gained by asking for another.
    pub fn checkpoint_begins(&mut self) {
        self.wanted = true;
    }

    /// From now on nothing leaves before [`Compare::commit`], and no checkpoint is asked for: the peer is lost.
    pub fn suspend(&mut self) {
        self.suspended = true;
        self.wanted = true;
    }

    /// The other end of a connection that the guest opens has answered its SYN.
    pub fn remote_answers(&mut self, flow: &FlowKey, scales_windows: bool) {
        if let Some(Protocol::Tcp(tcp)) = self.flows.find(flow).map(|flow| &mut flow.protocol) {
            tcp.remote_answers(scales_windows);
        }
    }

    /// Releases what of a TCP flow may leave now.
    fn advance_tcp(&mut self, id: FlowId, now_us: u64, actions: &mut Actions) {
        for lane in [Lane::Aside, Lane::InOrder] {
            loop {
                let flow = &mut self.flows[id];
                let next = match lane {
                    Lane::Aside => flow.aside.first(),
                    _ => flow.held.first(),
                };
                let (false, Some(waiting)) = (flow.stuck, next) else {
                    break;
                };
                let before = flow.cost();
                let all = &self.held;
                let held = all.get(waiting);
                let (Kind::Tcp { segment, .. }, Protocol::Tcp(tcp)) = (&held.packet.kind, &mut flow.protocol)
                else {
                    return;
                };
                if !flow.aside.is_empty() && lane == Lane::InOrder && tcp.begins(segment) {
                    // they belong to the connection before
                    break;
                }
                let key = self.key.as_deref();
                let verdict = tcp.judge(segment, held.compared(), &all.behind(Chain::Flow, waiting), key);
                let (mut differs, mut piece) = (None, None);
                match verdict {
                    Verdict::Release => tcp.passed(segment, held.frame()),
                    Verdict::Wait(Wait::Piece(unfinished)) => piece = Some(unfinished),
                    Verdict::Wait(_) => {}
                    Verdict::Differ(how) => differs = Some(How::told(how, tcp, segment, held.compared())),
                }
                self.svm_bytes = self.svm_bytes + flow.cost() - before;
                if let Some(how) = differs {
                    flow.stuck = true;
                    self.mismatch(id, how, now_us, actions);
                    return;
                }
                if let Some(piece) = piece {
                    self.ask_for(id, &piece, now_us);
                }
                if verdict != Verdict::Release {
                    break;
                }
                self.release(waiting, now_us, actions);
            }
        }
        let flow = &mut self.flows[id];
        let first = flow.aside.first().or(flow.held.first()).filter(|_| !flow.stuck);
        if let (Some(first), Protocol::Tcp(tcp)) = (first, &mut flow.protocol) {
            let held = self.held.get(first);
            if let Some(frame) = tcp.lowered_ack(&held.packet, held.frame()) {
                actions.push_copy_to_lan(FrameHeader::default(), &frame);
                self.stats.acks_lowered += 1;
            }
        }
        if let (true, Protocol::Tcp(tcp)) = (flow.is_free(), &mut flow.protocol)
            && let Some(frame) = tcp.reopened_window()
        {
            actions.push_copy_to_lan(FrameHeader::default(), &frame);
            self.stats.windows_reopened += 1;
        }
    }

    /// A packet that was held leaves, since the SVM has said the same.
    fn release(&mut self, id: HeldId, now_us: u64, actions: &mut Actions) {
        self.await_no_more(id);
        let frame = self.held.take_frame(id);
        let HeldPacket { flow, ref packet, since_us, aside, .. } = *self.held.get(id);
        let flow = &mut self.flows[flow];
        if let Some(frame) = frame {
            leave(&mut flow.protocol, packet, frame, self.limits.clamp_windows, actions);
        }
        self.held.unlink(if aside { &mut flow.aside } else { &mut flow.held }, id);
        self.held.forget(id);
        flow.begins &= !flow.held.is_empty();
        self.stats.released_after_wait(now_us.saturating_sub(since_us));
    }

    fn svm_message(&mut self, id: FlowId, packet: &Packet, frame: &[u8], now_us: u64, actions: &mut Actions) {
        let Protocol::Messages(messages) = &self.flows[id].protocol else {
            return;
        };
        let (ordered, repeatable, before) = (messages.ordered, messages.repeatable(), messages.cost());
        let said = essence(packet, frame);
        let mut found = false;
        let mut next = self.flows[id].held.first();
        // one word of the SVM serves for one packet, or where repetition means nothing for all that are the same
        while let Some(waiting) = next {
            next = self.held.next(Chain::Flow, waiting);
            let held = self.held.get(waiting);
            if essence(&held.packet, held.compared()) != said {
                continue;
            }
            found = true;
            if ordered {
                self.await_turn(waiting);
            } else {
                self.release(waiting, now_us, actions);
            }
            if !repeatable {
                break;
            }
        }
        while let Some(waiting) = self.flows[id].aside.first()
            && self.is_next(waiting)
        {
            self.release(waiting, now_us, actions);
        }
        let flow = &mut self.flows[id];
        if let Protocol::Messages(messages) = &mut flow.protocol
            && (repeatable || !found)
        {
            messages.keep(said);
            self.svm_bytes = self.svm_bytes + messages.cost() - before;
        }
        if let (false, false, Some(first)) = (found || repeatable, self.wanted, flow.held.first()) {
            let due_us = now_us + self.limits.disputed_us_max;
            if self.held.get(first).due_us > due_us {
                self.await_no_more(first);
                self.await_due(DISPUTED, first, due_us);
            }
        }
    }

    /// The SVM has said the same as this message, which waits only for its turn from now on.
    fn await_turn(&mut self, id: HeldId) {
        self.await_no_more(id);
        let HeldPacket { flow, order, .. } = *self.held.get(id);
        let flow = &mut self.flows[flow];
        self.held.unlink(&mut flow.held, id);
        let mut before = flow.aside.last();
        while let Some(last) = before
            && self.held.get(last).order > order
        {
            before = self.held.previous(Chain::Flow, last);
        }
        self.held.insert_behind(&mut flow.aside, before, id);
        self.held.get_mut(id).aside = true;
    }

    /// Whether nothing of its flow that the SVM has not said was sent before this message.
    fn is_next(&self, id: HeldId) -> bool {
        let held = self.held.get(id);
        let first = self.flows[held.flow].held.first();
        first.is_none_or(|first| self.held.get(first).order > held.order)
    }

    /// The epoch's checkpoint is committed: releases all that is held in the order in which the PVM sent it, and forgets
    /// what the SVM said.
    pub fn commit(&mut self, actions: &mut Actions) {
        while let Some(oldest) = self.held.oldest() {
            let held = self.held.get(oldest);
            let flow = &mut self.flows[held.flow];
            flow.held.clear();
            flow.aside.clear();
            flow.begins = false;
            if let (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) = (&mut flow.protocol, &held.packet.kind) {
                tcp.passed(segment, held.frame());
                tcp.leaves_unchanged(segment);
            }
            if let Some(frame) = self.held.take_frame(oldest) {
                frame.leave(actions);
            }
            self.held.forget(oldest);
            self.stats.released_by_commit += 1;
        }
        self.commit_fragments(actions);
        self.flows.commit(|tcp| {
            if let Some(frame) = tcp.reopened_window() {
                actions.push_copy_to_lan(FrameHeader::default(), &frame);
                self.stats.windows_reopened += 1;
            }
        });
        self.due.iter_mut().for_each(List::clear);
        self.resets.clear();
        self.unfinished.clear();
        self.asks.clear();
        self.svm_bytes = 0;
        self.wanted = false;
    }

    /// Drops all that is held.
    pub fn discard_all(&mut self) {
        let emptied = Self::with_policy(self.limits.clone(), self.flows.policy().clone());
        *self = Self {
            stats: std::mem::take(&mut self.stats),
            mismatches: std::mem::take(&mut self.mismatches),
            ..emptied
        };
    }

    /// Whether another packet of the PVM may come.
    pub fn has_room(&self) -> bool {
        self.held_bytes() < self.limits.held_bytes_full
    }

    /// When [`Compare::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        let unfinished = self.unfinished.front().map(|unfinished| unfinished.0);
        if self.wanted {
            // one wish an epoch is enough
            return unfinished;
        }
        let held = self.due.iter().filter_map(|list| Some(self.held.get(list.first()?).due_us));
        held.chain(self.resets.front().map(|reset| reset.0))
            .chain(self.fragments_deadline())
            .chain(unfinished)
            .min()
    }

    /// Looks whether something has waited too long.
    pub fn tick(&mut self, now_us: u64, actions: &mut Actions) {
        self.give_up_fragments(now_us, actions);
        while let Some((due_us, key, seq)) = self.unfinished.front().copied()
            && due_us <= now_us
        {
            self.unfinished.pop_front();
            if let Some(Protocol::Tcp(tcp)) = self.flows.find(&key).map(|flow| &mut flow.protocol)
                && let Some(bytes) = tcp.ask_now(seq)
            {
                self.asks.push(Ask { flow: key, seq, bytes });
            }
        }
        for class in [NORMAL, PATIENT, DISPUTED] {
            while let Some(first) = self.due[class].first()
                && self.held.get(first).due_us <= now_us
                && !self.wanted
            {
                self.await_no_more(first);
                self.waited_too_long(first, now_us, actions);
            }
        }
        while let Some((deadline, key)) = self.resets.front().copied()
            && deadline <= now_us
            && !self.wanted
        {
            self.resets.pop_front();
            // after a failover the client would be reset, though the PVM never meant to
            if let Some(flow) = self.flows.find(&key)
                && let Protocol::Tcp(tcp) = &flow.protocol
                && tcp.svm_alone_has_reset()
            {
                let id = self.flows.get(&key, now_us);
                self.mismatch(id, "the PVM goes on, the SVM resets".into(), now_us, actions);
            }
        }
        self.flows.age(now_us);
    }

    fn waited_too_long(&mut self, id: HeldId, now_us: u64, actions: &mut Actions) {
        let held = self.held.get(id);
        let waited_us = now_us.saturating_sub(held.since_us);
        let flow_id = held.flow;
        let flow = &mut self.flows[flow_id];
        let before = flow.cost();
        let first_id = flow.held.first().filter(|_| !held.aside).unwrap_or(id);
        let first = self.held.get(first_id);
        let mut what = "the SVM's datagram".to_owned();
        let (mut differs, mut piece) = (None, None);
        match (&mut flow.protocol, &first.packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) => {
                let behind = &self.held.behind(Chain::Flow, first_id);
                let verdict = tcp.judge(segment, first.compared(), behind, self.key.as_deref());
                if let Verdict::Wait(wait) = verdict {
                    what = describe_wait(wait);
                    if let Wait::Piece(unfinished) = wait {
                        piece = Some(unfinished);
                    }
                }
            }
            (Protocol::Messages(messages), _) => {
                differs = messages.difference(essence(&held.packet, held.compared()));
            }
            (Protocol::Tcp(_), _) => {}
        }
        self.svm_bytes = self.svm_bytes + flow.cost() - before;
        if let Some(bytes) = differs {
            self.mismatch(flow_id, How::in_bytes(bytes), now_us, actions);
            return;
        }
        if let Some(piece) = piece {
            self.ask_for(flow_id, &piece, now_us);
        }
        self.stats.held_too_long += 1;
        let how = format!("held for {} ms, waits for {what}", waited_us / 1000).into();
        self.record(flow_id, Cause::HeldTooLong, how, now_us, actions);
    }

    fn mismatch(&mut self, id: FlowId, how: How, now_us: u64, actions: &mut Actions) {
        self.stats.mismatches += 1;
        self.record(id, Cause::Mismatch, how, now_us, actions);
    }

    /// A flow goes on only with a checkpoint.
    fn record(&mut self, id: FlowId, cause: Cause, how: How, now_us: u64, actions: &mut Actions) {
        let flow = &mut self.flows[id];
        flow.mismatches = flow.mismatches.saturating_add(1);
        let How { what, bytes } = how;
        let name = flow.key.to_string();
        let detail = format!("{name}: {what}");
        let mismatch = Mismatch { at_us: now_us, cause, flow: name, count: flow.mismatches, what, bytes };
        self.mismatches.add(&flow.key, mismatch);
        self.want(cause, detail, actions);
    }

    fn want(&mut self, cause: Cause, detail: String, actions: &mut Actions) {
        if !self.wanted {
            self.wanted = true;
            *self.stats.checkpoints_wanted.entry(cause).or_default() += 1;
            actions.push_checkpoint_wanted(cause, detail);
        }
    }

    /// The figures.
    pub fn stats(&self) -> CompareStats {
        CompareStats {
            held_packets: self.held.count() + self.fragments.pvm.frames(),
            held_bytes: self.held_bytes(),
            held_bytes_peak: self.held.bytes_peak(),
            svm_bytes: self.svm_bytes,
            flows: self.flows.len(),
            recent_mismatches: self.mismatches.recent(),
            mismatches_by_service: self.mismatches.services(),
            ..self.stats.clone()
        }
    }
}

/// A packet that has not waited, or has no longer to, leaves.
fn leave(protocol: &mut Protocol, packet: &Packet, mut frame: Output, clamp: bool, actions: &mut Actions) {
    if let (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) = (protocol, &packet.kind) {
        if clamp {
            let checksum = frame.checksum();
            tcp.leaves(packet, segment, checksum, &mut frame);
        } else {
            tcp.leaves_unchanged(segment);
        }
    }
    frame.leave(actions);
}

fn describe_wait(wait: Wait) -> String {
    match wait {
        Wait::Bytes(offset) => format!("the SVM's bytes from {offset} on"),
        Wait::Piece(Piece { bytes, .. }) => {
            format!("{bytes} bytes of which the SVM sent a digest, or that the PVM has not said")
        }
        Wait::Ack { needed, svm: Some(svm) } => format!("the SVM's ack of {needed}, it is at {svm}"),
        Wait::Ack { needed, svm: None } => format!("the SVM's ack of {needed}, it has sent none"),
        Wait::Syn => "the SVM's SYN".to_owned(),
        Wait::Fin => "the SVM's FIN".to_owned(),
        Wait::Rst => "the SVM's RST".to_owned(),
    }
}

#[cfg(test)]
mod tests;
