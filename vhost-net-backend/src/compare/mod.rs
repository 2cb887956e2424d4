//! The primary's comparison: which packets of the PVM may leave, given what the SVM has said.
//!
//! A packet leaves when the SVM has produced the same bytes, or when a checkpoint taken after it is committed; nothing
//! that is held is ever dropped. What the SVM says ahead of the PVM is kept up to a limit; beyond it a checkpoint is
//! wanted, and what was dropped costs nothing but that.

mod datagrams;
mod flows;
mod held;
mod stats;
mod stream;
mod tcp;
mod window;

pub use stats::CompareStats;
pub(crate) use tcp::is_refusal;

use std::collections::VecDeque;

use datagrams::essence;
use flows::{Flows, Protocol};
use held::{HeldPacket, HeldQueue, Order};
use tcp::{Difference, Verdict, Wait};

use crate::packet::{Flags, FlowKey, Kind, Packet};
use crate::proxy::{Actions, Cause};

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
    held: HeldQueue,
    /// Held packets by the time when they have waited too long: those that wait normally, the patient ones, and those
    /// in dispute. What is released meanwhile stays until its time comes.
    deadlines: [VecDeque<(u64, Order)>; 3],
    /// Connections that the SVM has reset, by the time when the PVM should have too.
    resets: VecDeque<(u64, FlowKey)>,
    svm_bytes: usize,
    /// A checkpoint has been asked for in this epoch.
    wanted: bool,
    suspended: bool,
    stats: CompareStats,
}

/// In which of its flow's queues a packet waits.
#[derive(Clone, Copy, Debug)]
enum Lane {
    InOrder,
    Repeats,
}

const NORMAL: usize = 0;
const PATIENT: usize = 1;
const DISPUTED: usize = 2;

impl Compare {
    /// Nothing is held, nothing is known.
    pub fn new(limits: Limits) -> Self {
        Self {
            flows: Flows::new(limits.flows_max),
            limits,
            held: HeldQueue::default(),
            deadlines: Default::default(),
            resets: VecDeque::new(),
            svm_bytes: 0,
            wanted: false,
            suspended: false,
            stats: CompareStats::default(),
        }
    }

    /// The PVM has sent this frame.
    pub fn pvm_says(&mut self, frame: &[u8], packet: Packet, now_us: u64, actions: &mut Actions) {
        let key = packet.flow_from_guest(frame);
        self.stats.pvm_packets += 1;
        if self.suspended {
            self.hold(key, frame, packet, (false, Lane::InOrder), now_us, actions);
            return;
        }
        let flow = self.flows.get(&key, now_us);
        let before = flow.cost();
        let (mut leaves, mut matched, mut repeats, mut difference) = (false, false, false, None);
        match (&mut flow.protocol, &packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) if !flow.stuck => {
                repeats = !flow.begins && tcp.repeats(segment);
                flow.begins |= tcp.begins(segment);
                let first = if repeats { flow.repeats.is_empty() } else { flow.held.is_empty() };
                let waits_its_turn = tcp.begins(segment) && !flow.repeats.is_empty();
                if first && !waits_its_turn {
                    match tcp.judge(segment, frame) {
                        Verdict::Release => {
                            tcp.passed(segment, frame);
                            leaves = true;
                        }
                        Verdict::Wait(_) => {}
                        Verdict::Differ(what) => difference = Some(what),
                    }
                }
            }
            (Protocol::Tcp(_), _) => {}
            (Protocol::Messages(messages), _) => {
                matched = messages.take(essence(&packet, frame));
                leaves = matched && (flow.held.is_empty() || !messages.ordered);
            }
        }
        self.svm_bytes = self.svm_bytes + flow.cost() - before;
        if leaves {
            flow.begins &= !flow.held.is_empty();
            leave(&mut flow.protocol, &packet, frame, self.limits.clamp_windows, actions);
            self.stats.released_at_once += 1;
            return;
        }
        if let Some(difference) = difference {
            flow.stuck = true;
            self.mismatch(&key, &describe(difference), actions);
        }
        let lane = if repeats { Lane::Repeats } else { Lane::InOrder };
        self.hold(key, frame, packet, (matched, lane), now_us, actions);
    }

    fn hold(
        &mut self,
        key: FlowKey,
        frame: &[u8],
        packet: Packet,
        (matched, lane): (bool, Lane),
        now_us: u64,
        actions: &mut Actions,
    ) {
        let flow = self.flows.get(&key, now_us);
        let patient = match (&packet.kind, &flow.protocol) {
            (Kind::Tcp { segment, .. }, _) => segment.is_pure_ack(),
            (_, Protocol::Messages(messages)) => messages.repeatable(),
            _ => false,
        };
        let frame = self.held.copy_of(frame);
        let order = self.held.push(HeldPacket { flow: key, packet, frame, since_us: now_us, matched });
        match lane {
            Lane::InOrder => flow.held.push_back(order),
            Lane::Repeats => flow.repeats.push_back(order),
        }
        let (class, limit) =
            if patient { (PATIENT, self.limits.patient_us_max) } else { (NORMAL, self.limits.held_us_max) };
        if !self.wanted {
            self.deadlines[class].push_back((now_us + limit, order));
        }
        if self.held.bytes() > self.limits.held_bytes_max && !self.wanted {
            let detail = format!("{} bytes in {} packets are held", self.held.bytes(), self.held.count());
            self.want(Cause::HeldBytes, detail, actions);
        }
    }

    /// The SVM has sent this frame; sequence numbers are in the PVM's space already.
    pub fn svm_says(&mut self, frame: &[u8], now_us: u64, actions: &mut Actions) {
        let packet = Packet::parse(frame);
        let key = packet.flow_from_guest(frame);
        self.stats.svm_packets += 1;
        if self.svm_bytes > self.limits.svm_bytes_max {
            // losing it is safe: what the PVM says waits for a checkpoint, and that is on its way
            self.stats.svm_packets_dropped += 1;
            let detail = format!("{} bytes of the SVM's output wait for the PVM's", self.svm_bytes);
            self.want(Cause::Buffer, detail, actions);
            return;
        }
        if !self.flows.has_room_for(&key) {
            self.stats.svm_packets_dropped += 1;
            let detail = format!("The flow table is full ({} flows)", self.flows.len());
            self.want(Cause::Buffer, detail, actions);
            return;
        }
        let flow = self.flows.get(&key, now_us);
        let before = flow.cost();
        match (&mut flow.protocol, &packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) => {
                tcp.svm_says(segment, frame);
                if segment.flags.has(Flags::RST) && tcp.svm_alone_has_reset() && !self.wanted {
                    self.resets.push_back((now_us + self.limits.held_us_max, key));
                }
                self.svm_bytes = self.svm_bytes + flow.cost() - before;
                self.advance_tcp(&key, now_us, actions);
            }
            (Protocol::Messages(_), _) => self.svm_message(&key, &packet, frame, now_us, actions),
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
        matches!(&flow.protocol, Protocol::Tcp(tcp) if tcp.isn() == Some(isn))
            || flow.held.iter().filter_map(|order| self.held.get(*order)).any(|held| begins(&held.packet))
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
        if let Some(Protocol::Tcp(tcp)) = self.flows.find(flow) {
            tcp.remote_answers(scales_windows);
        }
    }

    /// Releases what of a TCP flow may leave now.
    fn advance_tcp(&mut self, key: &FlowKey, now_us: u64, actions: &mut Actions) {
        let flow = self.flows.get(key, now_us);
        for lane in [Lane::Repeats, Lane::InOrder] {
            loop {
                let next = match lane {
                    Lane::InOrder => flow.held.front(),
                    Lane::Repeats => flow.repeats.front(),
                };
                let (false, Some(order)) = (flow.stuck, next.copied()) else {
                    break;
                };
                let before = flow.cost();
                let (Some(held), Protocol::Tcp(tcp)) = (self.held.get(order), &mut flow.protocol) else {
                    return;
                };
                let Kind::Tcp { segment, .. } = &held.packet.kind else {
                    return;
                };
                let begins = tcp.begins(segment);
                if begins && !flow.repeats.is_empty() {
                    // they belong to the connection before
                    break;
                }
                let verdict = tcp.judge(segment, &held.frame);
                if verdict == Verdict::Release {
                    tcp.passed(segment, &held.frame);
                    match lane {
                        Lane::InOrder => flow.held.pop_front(),
                        Lane::Repeats => flow.repeats.pop_front(),
                    };
                    flow.begins &= !flow.held.is_empty();
                    if let Some(held) = self.held.remove(order) {
                        let clamp = self.limits.clamp_windows;
                        leave(&mut flow.protocol, &held.packet, &held.frame, clamp, actions);
                        self.stats.released_after_wait(now_us.saturating_sub(held.since_us));
                        self.held.recycle(held);
                    }
                }
                self.svm_bytes = self.svm_bytes + flow.cost() - before;
                match verdict {
                    Verdict::Release => {}
                    Verdict::Wait(_) => break,
                    Verdict::Differ(difference) => {
                        flow.stuck = true;
                        self.mismatch(key, &describe(difference), actions);
                        return;
                    }
                }
            }
        }
        if let (true, Protocol::Tcp(tcp)) = (flow.is_free(), &mut flow.protocol)
            && let Some(frame) = tcp.reopened_window()
        {
            actions.push_to_lan(&frame);
            self.stats.windows_reopened += 1;
        }
    }

    fn svm_message(
        &mut self,
        key: &FlowKey,
        packet: &Packet,
        frame: &[u8],
        now_us: u64,
        actions: &mut Actions,
    ) {
        let flow = self.flows.get(key, now_us);
        let before = flow.cost();
        let Protocol::Messages(messages) = &mut flow.protocol else {
            return;
        };
        let said = essence(packet, frame);
        let held = &mut self.held;
        let same = |order: &Order, held: &HeldQueue| {
            held.get(*order).is_some_and(|held| !held.matched && essence(&held.packet, &held.frame) == said)
        };
        let mut found = false;
        // one word of the SVM serves for one packet, or where repetition means nothing for all that are the same
        while let Some(index) = flow.held.iter().position(|order| same(order, held)) {
            found = true;
            if messages.ordered {
                if let Some(packet) = held.get_mut(flow.held[index]) {
                    packet.matched = true;
                }
            } else if let Some(order) = flow.held.remove(index) {
                release(held, order, now_us, &mut self.stats, actions);
            }
            if !messages.repeatable() {
                break;
            }
        }
        if messages.repeatable() || !found {
            messages.keep(said);
        }
        let matched = |order: &Order, held: &HeldQueue| held.get(*order).is_none_or(|held| held.matched);
        while let Some(order) = flow.held.front().copied()
            && matched(&order, held)
        {
            flow.held.pop_front();
            release(held, order, now_us, &mut self.stats, actions);
        }
        if !found
            && !messages.repeatable()
            && !self.wanted
            && let Some(order) = flow.held.iter().find(|order| !matched(order, held))
        {
            self.deadlines[DISPUTED].push_back((now_us + self.limits.disputed_us_max, *order));
        }
        self.svm_bytes = self.svm_bytes + flow.cost() - before;
    }

    /// The epoch's checkpoint is committed: releases all that is held in the order in which the PVM sent it, and forgets
    /// what the SVM said.
    pub fn commit(&mut self, now_us: u64, actions: &mut Actions) {
        while let Some(packet) = self.held.pop() {
            let flow = self.flows.get(&packet.flow, now_us);
            flow.held.clear();
            flow.repeats.clear();
            flow.begins = false;
            if let (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) = (&mut flow.protocol, &packet.packet.kind)
            {
                tcp.passed(segment, &packet.frame);
                tcp.leaves_unchanged(segment);
            }
            actions.push_to_lan(&packet.frame);
            self.stats.released_by_commit += 1;
            self.held.recycle(packet);
        }
        self.flows.commit(|tcp| {
            if let Some(frame) = tcp.reopened_window() {
                actions.push_to_lan(&frame);
                self.stats.windows_reopened += 1;
            }
        });
        self.deadlines.iter_mut().for_each(VecDeque::clear);
        self.resets.clear();
        self.svm_bytes = 0;
        self.wanted = false;
    }

    /// Drops all that is held.
    pub fn discard_all(&mut self) {
        *self = Self { stats: std::mem::take(&mut self.stats), ..Self::new(self.limits.clone()) };
    }

    /// Whether another packet of the PVM may come.
    pub fn has_room(&self) -> bool {
        self.held.bytes() < self.limits.held_bytes_full
    }

    /// When [`Compare::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.wanted {
            // one wish an epoch is enough
            return None;
        }
        let held = self.deadlines.iter().filter_map(|queue| Some(queue.front()?.0));
        held.chain(self.resets.front().map(|reset| reset.0)).min()
    }

    /// Looks whether something has waited too long.
    pub fn tick(&mut self, now_us: u64, actions: &mut Actions) {
        for class in [NORMAL, PATIENT, DISPUTED] {
            while let Some((deadline, order)) = self.deadlines[class].front().copied() {
                let waits = self.held.get(order).is_some_and(|held| class != DISPUTED || !held.matched);
                if waits && (deadline > now_us || self.wanted) {
                    break;
                }
                self.deadlines[class].pop_front();
                if waits {
                    self.waited_too_long(order, now_us, actions);
                }
            }
        }
        while let Some((deadline, key)) = self.resets.front().copied()
            && deadline <= now_us
            && !self.wanted
        {
            self.resets.pop_front();
            // after a failover the client would be reset, though the PVM never meant to
            if let Some(Protocol::Tcp(tcp)) = self.flows.find(&key)
                && tcp.svm_alone_has_reset()
            {
                self.mismatch(&key, "the PVM goes on, the SVM resets", actions);
            }
        }
        self.flows.age(now_us);
    }

    fn waited_too_long(&mut self, order: Order, now_us: u64, actions: &mut Actions) {
        let Some(held) = self.held.get(order) else {
            return;
        };
        let (key, waited_us) = (held.flow, now_us.saturating_sub(held.since_us));
        let flow = self.flows.get(&key, now_us);
        let before = flow.cost();
        let first = match flow.held.front() {
            Some(first) if !flow.repeats.contains(&order) => self.held.get(*first).unwrap_or(held),
            _ => held,
        };
        let mut what = "the SVM's datagram".to_owned();
        let mut differs = None;
        match (&mut flow.protocol, &first.packet.kind) {
            (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) => {
                if let Verdict::Wait(wait) = tcp.judge(segment, &first.frame) {
                    what = describe_wait(wait);
                }
            }
            (Protocol::Messages(messages), _) => {
                differs = messages.difference(essence(&held.packet, &held.frame));
            }
            (Protocol::Tcp(_), _) => {}
        }
        self.svm_bytes = self.svm_bytes + flow.cost() - before;
        if let Some((offset, pvm, svm)) = differs {
            let byte =
                |byte: Option<u8>| byte.map_or_else(|| "the end".to_owned(), |byte| format!("{byte:#04x}"));
            self.mismatch(&key, &format!("offset {offset}: PVM {}, SVM {}", byte(pvm), byte(svm)), actions);
            return;
        }
        self.stats.held_too_long += 1;
        let detail = format!("{key}: held for {} ms, waits for {what}", waited_us / 1000);
        self.want(Cause::HeldTooLong, detail, actions);
    }

    fn mismatch(&mut self, key: &FlowKey, what: &str, actions: &mut Actions) {
        self.stats.mismatches += 1;
        let detail = format!("{key}: {what}");
        self.stats.last_mismatch = Some(detail.clone());
        self.want(Cause::Mismatch, detail, actions);
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
            held_packets: self.held.count(),
            held_bytes: self.held.bytes(),
            held_bytes_peak: self.held.bytes_peak(),
            svm_bytes: self.svm_bytes,
            flows: self.flows.len(),
            ..self.stats.clone()
        }
    }
}

/// A packet that has not waited, or has no longer to, leaves.
fn leave(protocol: &mut Protocol, packet: &Packet, frame: &[u8], clamp: bool, actions: &mut Actions) {
    let leaving = actions.push_to_lan(frame);
    if let (Protocol::Tcp(tcp), Kind::Tcp { segment, .. }) = (protocol, &packet.kind) {
        if clamp {
            tcp.leaves(packet, segment, leaving);
        } else {
            tcp.leaves_unchanged(segment);
        }
    }
}

fn release(held: &mut HeldQueue, order: Order, now_us: u64, stats: &mut CompareStats, actions: &mut Actions) {
    if let Some(packet) = held.remove(order) {
        actions.push_to_lan(&packet.frame);
        stats.released_after_wait(now_us.saturating_sub(packet.since_us));
        held.recycle(packet);
    }
}

fn describe(difference: Difference) -> String {
    match difference {
        Difference::Byte { offset, pvm, svm } => format!("offset {offset}: PVM {pvm:#04x}, SVM {svm:#04x}"),
        Difference::Event { pvm, svm } => format!("the PVM {pvm}, the SVM {svm}"),
        Difference::Options { pvm, svm } => format!("options of the SYN: PVM {pvm:?}, SVM {svm:?}"),
    }
}

fn describe_wait(wait: Wait) -> String {
    match wait {
        Wait::Bytes(offset) => format!("the SVM's bytes from {offset} on"),
        Wait::Ack { needed, svm: Some(svm) } => format!("the SVM's ack of {needed}, it is at {svm}"),
        Wait::Ack { needed, svm: None } => format!("the SVM's ack of {needed}, it has sent none"),
        Wait::Syn => "the SVM's SYN".to_owned(),
        Wait::Fin => "the SVM's FIN".to_owned(),
        Wait::Rst => "the SVM's RST".to_owned(),
    }
}

#[cfg(test)]
mod tests;
