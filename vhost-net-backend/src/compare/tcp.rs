//! Comparison of one TCP flow: may the PVM's next segment leave?
//!
//! The secondary's rewriter has put the SVM's sequence numbers into the PVM's space, so both streams have the same
//! positions. Nothing but the guest's own direction is looked at.

use std::collections::VecDeque;

use super::held::HeldPacket;
use super::mismatches::{BYTES_SHOWN, Differing};
use super::pending::{Finding, Pending, Said};
use super::stream::{Agreement, Anchor, Ranges, Store};
use super::window::Window;
use crate::digest::{Key, Run};
use crate::packet::checksum::Checksum;
use crate::packet::{Flags, Kind, Packet, Segment, SynOptions};

/// Whether a segment of the PVM may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The SVM has said and acknowledged as much.
    Release,
    /// The SVM has not yet.
    Wait(Wait),
    /// The SVM has said something else, and waiting will not change that.
    Differ(Difference),
}

/// What a segment waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The SVM's bytes from here on: an offset into the segment's data.
    Bytes(usize),
    /// What the SVM's digest covers and neither the PVM has said nor the SVM.
    Piece(Piece),
    /// An acknowledgment by the SVM that reaches as far as this.
    Ack {
        /// What the PVM acknowledges.
        needed: u32,
        /// How far the SVM is.
        svm: Option<u32>,
    },
    /// The SVM's SYN.
    Syn,
    /// The SVM's FIN.
    Fin,
    /// The SVM's RST.
    Rst,
}

/// A piece of the SVM's stream of which only the digest is here, from the first byte that is not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Sequence number of that byte.
    pub(super) seq: u32,
    /// Bytes from there to the piece's end.
    pub(super) bytes: u32,
    /// When to ask the SVM for these bytes, if that is not known yet.
    pub(super) ask: Option<When>,
}

/// When to ask the SVM for the bytes of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At once: they differ, or cannot be compared otherwise.
    Now,
    /// If the PVM does not say all of the piece soon: it may have nothing more to say before the client answers.
    Soon,
}

/// How the streams differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// A byte of data.
    Byte {
        /// Bytes since the SYN; since some point of the stream where no SYN was seen.
        offset: u64,
        /// The PVM's.
        pvm: u8,
        /// The SVM's.
        svm: u8,
    },
    /// One of them opens, ends or resets the connection and the other does not.
    Event {
        /// What the PVM does.
        pvm: &'static str,
        /// What the SVM does.
        svm: &'static str,
    },
    /// The SYNs offer different options.
    Options {
        /// The PVM's.
        pvm: SynOptions,
        /// The SVM's.
        svm: SynOptions,
    },
}

/// The SVM's connections on one flow that are kept ahead of the PVM; more are a divergence anyway.
const AHEAD_MAX: usize = 4;

/// Flags of a SYN that must be the same.
const SYN_FLAGS: u16 = Flags::SYN | Flags::ACK | Flags::ECE | Flags::CWR;

#[derive(Debug)]
struct SvmSyn {
    isn: u32,
    flags: u16,
    options: SynOptions,
}

/// The SVM's end of one connection, as far as it is ahead of the PVM's.
#[derive(Debug, Default)]
struct SvmEnd {
    anchor: Anchor,
    syn: Option<Box<SvmSyn>>,
    store: Store,
    /// Made when the first digest comes.
    pending: Option<Box<Pending>>,
    fin: Option<u64>,
    reset: bool,
    /// Acknowledgment number of the RST that refused a SYN.
    refused: Option<u32>,
    ack: Option<u32>,
    /// Right edge of the window that it has offered.
    edge: Option<u32>,
}

/// One TCP flow.
#[derive(Debug, Default)]
pub(super) struct TcpFlow {
    /// The PVM's initial sequence number, when its SYN has been released.
    isn: Option<u32>,
    /// What of the PVM's stream need not be compared (again).
    settled: Ranges,
    fin: Option<u64>,
    reset: bool,
    /// How far the PVM has acknowledged in what was released.
    pvm_ack: Option<u32>,
    window: Window,
    /// The SVM's end of the connection that the PVM's next segment belongs to.
    svm: SvmEnd,
    /// Connections that the SVM has opened since on the same ports.
    ahead: VecDeque<SvmEnd>,
    /// What waits in front waits for what the PVM says next.
    short: bool,
    /// The SVM has just acknowledged what it had acknowledged before, and nothing else.
    svm_repeats: bool,
}

pub(super) fn at_least(a: Option<u32>, b: u32) -> bool {
    a.is_some_and(|a| a.wrapping_sub(b).cast_signed() >= 0)
}

pub(super) fn raise(old: &mut Option<u32>, new: u32) {
    if !at_least(*old, new) {
        *old = Some(new);
    }
}

/// A RST that answers a SYN (RFC 9293 §3.10.7.1): it stands outside of any connection, so it is told from others by
/// what it acknowledges.
pub(crate) fn is_refusal(segment: &Segment) -> bool {
    segment.flags.has(Flags::RST | Flags::ACK) && segment.seq == 0
}

impl SvmEnd {
    fn cost(&self) -> usize {
        self.store.cost() + self.pending.as_ref().map_or(0, |pending| pending.cost())
    }

    fn begin(segment: &Segment, frame: &[u8]) -> Self {
        let mut end = Self {
            anchor: Anchor::at(segment.seq),
            syn: Some(Box::new(SvmSyn {
                isn: segment.seq,
                flags: segment.flags.0 & SYN_FLAGS,
                options: segment.syn_options(frame),
            })),
            edge: Window::of_syn(segment, frame).pvm_edge(),
            ..Self::default()
        };
        let data_at = end.anchor.place(segment.seq) + 1;
        end.store.insert(data_at, &frame[segment.payload.clone()]);
        end
    }
}

impl TcpFlow {
    /// About how much memory the SVM's output takes here.
    pub(super) fn cost(&self) -> usize {
        self.svm.cost() + self.ahead.iter().map(SvmEnd::cost).sum::<usize>()
    }

    /// The PVM's initial sequence number, when its SYN has been released.
    pub(super) fn isn(&self) -> Option<u32> {
        self.isn
    }

    /// Whether the connection has ended as far as the guest is concerned.
    pub(super) fn is_closed(&self) -> bool {
        self.reset || self.fin.is_some()
    }

    /// Whether the SVM has reset the connection and the PVM has not.
    pub(super) fn svm_alone_has_reset(&self) -> bool {
        !self.reset && self.ahead.is_empty() && self.svm.reset
    }

    /// Takes in a segment of the SVM. `waiting` are the PVM's segments that wait, in order: what they say too is compared
    /// here and not kept.
    pub(super) fn svm_says<'a>(
        &mut self,
        segment: &Segment,
        frame: &[u8],
        waiting: impl Iterator<Item = &'a HeldPacket>,
    ) {
        let flags = segment.flags;
        if flags.has(Flags::SYN) && !flags.has(Flags::RST) {
            let known = self.isn == Some(segment.seq)
                || self.ahead.iter().any(|end| end.syn.as_ref().is_some_and(|syn| syn.isn == segment.seq));
            if !known {
                if self.ahead.len() == AHEAD_MAX {
                    self.ahead.pop_front();
                }
                self.ahead.push_back(SvmEnd::begin(segment, frame));
            }
        }
        let current = self.ahead.is_empty();
        let svm = self.ahead.back_mut().unwrap_or(&mut self.svm);
        if flags.has(Flags::RST) {
            if is_refusal(segment) {
                svm.refused = Some(segment.ack);
            } else {
                svm.reset = true;
            }
            return;
        }
        self.svm_repeats = current && segment.is_pure_ack() && svm.ack == Some(segment.ack);
        if flags.has(Flags::ACK) {
            raise(&mut svm.ack, segment.ack);
        }
        if flags.has(Flags::SYN) {
            return;
        }
        if let (Some(edge), true, true) = (self.window.edge_of(segment), current, flags.has(Flags::ACK)) {
            raise(&mut svm.edge, edge);
        }
        let start = svm.anchor.place(segment.seq);
        let data = &frame[segment.payload.clone()];
        let end = start + data.len() as u64;
        if flags.has(Flags::FIN) {
            svm.fin = Some(end);
        }
        if data.is_empty() {
            return;
        }
        if current {
            self.compare_with_waiting(start, data, waiting);
        } else {
            svm.store.insert(start, data);
        }
    }

    /// Takes in segments of the SVM of which only the digests are here.
    pub(super) fn svm_digests(&mut self, run: &Run<'_>) {
        let current = self.ahead.is_empty();
        let svm = self.ahead.back_mut().unwrap_or(&mut self.svm);
        raise(&mut svm.ack, run.ack);
        if let (Some(edge), true) = (self.window.edge_at(run.ack, run.window), current) {
            raise(&mut svm.edge, edge);
        }
        let mut start = svm.anchor.place(run.seq);
        for (bytes, digest) in run.pieces() {
            let end = start + u64::from(bytes);
            if !current || self.settled.first_gap(start, end).is_some() {
                svm.pending.get_or_insert_default().insert(start, bytes, digest);
            }
            start = end;
        }
    }

    /// Whether more of the PVM's stream may let go what waits in front.
    pub(super) fn is_short(&self) -> bool {
        self.short
    }

    /// The piece at `seq` was to be asked for by now, if the PVM did not say all of it: how many bytes to ask for.
    pub(super) fn ask_now(&mut self, seq: u32) -> Option<u32> {
        let start = self.svm.anchor.place(seq);
        Some((self.svm.pending.as_mut()?.ask_now(start)? - start) as u32)
    }

    /// Compares data of the SVM with the segments that wait, and keeps what they do not say.
    fn compare_with_waiting<'a>(
        &mut self,
        start: u64,
        data: &[u8],
        mut waiting: impl Iterator<Item = &'a HeldPacket>,
    ) {
        let end = start + data.len() as u64;
        let slice = |from: u64, to: u64| &data[(from - start) as usize..(to - start) as usize];
        let mut from = start;
        let mut pvm = None;
        while let Some((first, last)) = self.settled.first_gap(from, end) {
            // the waiting segment that says something from there on
            while pvm.as_ref().is_none_or(|&(_, to, _): &(u64, u64, &[u8])| to <= first) {
                let Some(held) = waiting.next() else {
                    pvm = Some((u64::MAX, u64::MAX, &[][..]));
                    break;
                };
                pvm = match &held.packet.kind {
                    Kind::Tcp { segment, .. } if !self.begins(segment) => {
                        let at = self.svm.anchor.place(data_seq(segment));
                        let data = &held.compared()[segment.payload.clone()];
                        Some((at, at + data.len() as u64, data))
                    }
                    // another connection
                    _ => Some((u64::MAX, u64::MAX, &[][..])),
                };
            }
            let Some((at, to, said)) = pvm else {
                break;
            };
            if at > first {
                from = last.min(at);
                self.svm.store.insert(first, slice(first, from));
                continue;
            }
            from = last.min(to);
            let same = same_bytes(slice(first, from), &said[(first - at) as usize..]);
            let same_to = first + same as u64;
            self.settled.insert(first, same_to);
            self.svm.store.remove(first, same_to);
            if same_to < from {
                self.svm.store.insert(same_to, slice(same_to, from));
            }
        }
    }

    /// Whether the segment begins a connection that is not the present one.
    pub(super) fn begins(&self, segment: &Segment) -> bool {
        begins(segment, self.isn)
    }

    /// Whether the segment says nothing but what is settled, so that it need not wait for what the PVM sent before it:
    /// a retransmission, an acknowledgment. It must not: both VMs may have to hear from the client before they go on.
    pub(super) fn repeats(&mut self, segment: &Segment) -> bool {
        if segment.flags.has(Flags::RST) || self.begins(segment) {
            return false;
        }
        let start = self.svm.anchor.place(data_seq(segment));
        let end = start + segment.payload.len() as u64;
        self.settled.first_gap(start, end).is_none()
            && (!segment.flags.has(Flags::FIN) || self.fin == Some(end))
    }

    /// Whether this segment of the PVM may leave. All that the PVM sent on this flow before has left, or the segment
    /// [repeats](TcpFlow::repeats). `following` are those that wait behind it, in order.
    pub(super) fn judge<'a>(
        &mut self,
        segment: &Segment,
        frame: &'a [u8],
        following: &(impl Iterator<Item = &'a HeldPacket> + Clone),
        key: Option<&Key>,
    ) -> Verdict {
        self.short = false;
        if segment.flags.has(Flags::RST) {
            return self.judge_reset(segment);
        }
        if self.begins(segment) {
            return self.judge_syn(segment, frame);
        }
        if let Err(verdict) = self.judge_data(segment, frame, following, key) {
            return verdict;
        }
        if let Err(verdict) = self.judge_fin(segment) {
            return verdict;
        }
        if segment.flags.has(Flags::ACK) && !at_least(self.svm.ack, segment.ack) {
            if self.svm.reset {
                return Verdict::Differ(Difference::Event { pvm: "goes on", svm: "resets" });
            }
            return Verdict::Wait(Wait::Ack { needed: segment.ack, svm: self.svm.ack });
        }
        Verdict::Release
    }

    fn judge_reset(&self, segment: &Segment) -> Verdict {
        let svm = self.ahead.back().unwrap_or(&self.svm);
        let said = if is_refusal(segment) {
            svm.refused == Some(segment.ack)
        } else {
            // after the first RST the connection is dead to the client; how many strays each VM answers is chance
            self.reset || self.svm.reset
        };
        if said {
            return Verdict::Release;
        }
        match &svm.syn {
            Some(syn)
                if is_refusal(segment) && syn.flags & Flags::ACK != 0 && svm.ack == Some(segment.ack) =>
            {
                Verdict::Differ(Difference::Event { pvm: "refuses", svm: "accepts" })
            }
            _ => Verdict::Wait(Wait::Rst),
        }
    }

    fn judge_syn(&self, segment: &Segment, frame: &[u8]) -> Verdict {
        let ours = |end: &&SvmEnd| end.syn.as_ref().is_some_and(|syn| syn.isn == segment.seq);
        let Some((svm, syn)) = self.ahead.iter().find(ours).and_then(|end| Some((end, end.syn.as_ref()?)))
        else {
            let last = self.ahead.back().unwrap_or(&self.svm);
            if segment.flags.has(Flags::ACK) && last.refused == Some(segment.ack) {
                return Verdict::Differ(Difference::Event { pvm: "accepts", svm: "refuses" });
            }
            return Verdict::Wait(Wait::Syn);
        };
        if syn.flags != segment.flags.0 & SYN_FLAGS {
            return Verdict::Differ(Difference::Event { pvm: "SYN", svm: "a SYN with other flags" });
        }
        let options = segment.syn_options(frame);
        if syn.options != options {
            return Verdict::Differ(Difference::Options { pvm: options, svm: syn.options });
        }
        let data = &frame[segment.payload.clone()];
        let mut anchor = svm.anchor;
        match svm.store.agreement(anchor.place(segment.seq) + 1, data) {
            Agreement::Whole => {}
            Agreement::Until(same) => return Verdict::Wait(Wait::Bytes(same)),
            Agreement::Differs(same, svm) => {
                return Verdict::Differ(Difference::Byte { offset: same as u64, pvm: data[same], svm });
            }
        }
        if segment.flags.has(Flags::ACK) && !at_least(svm.ack, segment.ack) {
            return Verdict::Wait(Wait::Ack { needed: segment.ack, svm: svm.ack });
        }
        Verdict::Release
    }

    fn judge_data<'a>(
        &mut self,
        segment: &Segment,
        frame: &'a [u8],
        following: &(impl Iterator<Item = &'a HeldPacket> + Clone),
        key: Option<&Key>,
    ) -> Result<(), Verdict> {
        let data = &frame[segment.payload.clone()];
        let start = self.svm.anchor.place(data_seq(segment));
        let end = start + data.len() as u64;
        let mut from = start;
        while let Some((first, last)) = self.settled.first_gap(from, end) {
            let ours = &data[(first - start) as usize..(last - start) as usize];
            let agreement = self.svm.store.agreement(first, ours);
            let same = match agreement {
                Agreement::Whole => ours.len(),
                Agreement::Until(same) | Agreement::Differs(same, _) => same,
            };
            from = first + same as u64;
            self.settled.insert(first, from);
            self.svm.store.remove(first, from);
            if let (Agreement::Until(_), Some(key)) = (agreement, key)
                && let Some(to) = self.judge_digests(from, key, (segment, data), following.clone())?
            {
                self.settled.insert(from, to);
                from = to;
                continue;
            }
            match agreement {
                Agreement::Whole => {}
                Agreement::Until(_) if self.svm.fin.is_some_and(|fin| fin <= from) => {
                    return Err(Verdict::Differ(Difference::Event { pvm: "sends data", svm: "has ended" }));
                }
                Agreement::Until(_) if self.svm.reset => {
                    return Err(Verdict::Differ(Difference::Event { pvm: "sends data", svm: "resets" }));
                }
                Agreement::Until(_) => return Err(Verdict::Wait(Wait::Bytes((from - start) as usize))),
                Agreement::Differs(_, svm) => {
                    let pvm = ours[same];
                    return Err(Verdict::Differ(Difference::Byte { offset: self.offset(from), pvm, svm }));
                }
            }
        }
        Ok(())
    }

    /// How far the PVM's stream from a position on is the same by the SVM's digests; `None` where there are none.
    fn judge_digests<'a>(
        &mut self,
        from: u64,
        key: &Key,
        (segment, data): (&Segment, &'a [u8]),
        following: impl Iterator<Item = &'a HeldPacket> + Clone,
    ) -> Result<Option<u64>, Verdict> {
        let (anchor, isn) = (self.svm.anchor, self.isn);
        let Some(pending) = &mut self.svm.pending else {
            return Ok(None);
        };
        let said =
            |segment: &Segment, bytes: &'a [u8]| Said { at: { anchor }.place(data_seq(segment)), bytes };
        let following = following.map_while(|held| match &held.packet.kind {
            Kind::Tcp { segment, .. } if !begins(segment, isn) => {
                Some(said(segment, &held.compared()[segment.payload.clone()]))
            }
            // another connection
            _ => None,
        });
        let all = std::iter::once(said(segment, data)).chain(following);
        let wait = |end: u64, known: bool, when| {
            let ask = (!known).then_some(when);
            Err(Verdict::Wait(Wait::Piece(Piece { seq: from as u32, bytes: (end - from) as u32, ask })))
        };
        match pending.compare(from, key, &all) {
            Finding::Same(to) => Ok(Some(to)),
            Finding::Nothing => Ok(None),
            Finding::Short { end, known } => {
                self.short = true;
                wait(end, known, When::Soon)
            }
            Finding::Bytes { end, known } => wait(end, known, When::Now),
        }
    }

    fn judge_fin(&mut self, segment: &Segment) -> Result<(), Verdict> {
        if !segment.flags.has(Flags::FIN) {
            return Ok(());
        }
        let end = self.svm.anchor.place(data_seq(segment)) + segment.payload.len() as u64;
        if self.fin == Some(end) || self.svm.fin == Some(end) {
            return Ok(());
        }
        if self.svm.fin.is_some()
            || self.svm.store.end().is_some_and(|last| last > end)
            || self.svm.pending.as_ref().is_some_and(|pending| pending.reaches_beyond(end))
        {
            return Err(Verdict::Differ(Difference::Event { pvm: "ends", svm: "sends more data" }));
        }
        if self.svm.reset {
            return Err(Verdict::Differ(Difference::Event { pvm: "ends", svm: "resets" }));
        }
        Err(Verdict::Wait(Wait::Fin))
    }

    fn offset(&self, position: u64) -> u64 {
        // how far it is from the ISN says something to an operator only within the first 4 GiB
        match self.isn {
            Some(isn) => u64::from((position as u32).wrapping_sub(isn).wrapping_sub(1)),
            None => position & u64::from(u32::MAX),
        }
    }

    /// What the SVM says where the segment, which is judged to differ by a byte, differs.
    pub(super) fn differing(&mut self, segment: &Segment, frame: &[u8], offset: u64) -> Differing {
        let data = &frame[segment.payload.clone()];
        let start = self.svm.anchor.place(data_seq(segment));
        let end = start + data.len() as u64;
        match self.settled.first_gap(start, end) {
            Some((first, _)) if !self.begins(segment) => {
                let svm = self.svm.store.copy(first, BYTES_SHOWN);
                Differing::at(offset, (first - start) as usize, data, &svm)
            }
            // data of a SYN, which has no others around it
            _ => Differing::at(offset, offset as usize, data, &[]),
        }
    }

    /// The segment leaves, because it was judged so or because a checkpoint was committed.
    pub(super) fn passed(&mut self, segment: &Segment, frame: &[u8]) {
        let flags = segment.flags;
        if flags.has(Flags::RST) {
            self.reset |= !is_refusal(segment);
            return;
        }
        if self.begins(segment) {
            self.adopt(segment, frame);
        }
        let start = self.svm.anchor.place(data_seq(segment));
        let end = start + segment.payload.len() as u64;
        self.settled.insert(start, end);
        self.svm.store.remove(start, end);
        if let Some(pending) = &mut self.svm.pending {
            pending.remove_settled(&self.settled);
        }
        self.svm.anchor.advance(end);
        if flags.has(Flags::FIN) {
            self.fin = Some(end);
        }
        if flags.has(Flags::ACK) {
            raise(&mut self.pvm_ack, segment.ack);
        }
    }

    /// The PVM's next connection on this flow begins.
    fn adopt(&mut self, segment: &Segment, frame: &[u8]) {
        let ours = |end: &SvmEnd| end.syn.as_ref().is_some_and(|syn| syn.isn == segment.seq);
        let svm = match self.ahead.iter().position(ours) {
            Some(index) => self.ahead.drain(..=index).next_back().unwrap_or_default(),
            None => SvmEnd { anchor: Anchor::at(segment.seq), ..SvmEnd::default() },
        };
        *self = Self {
            isn: Some(segment.seq),
            window: Window::of_syn(segment, frame),
            svm,
            ahead: std::mem::take(&mut self.ahead),
            ..Self::default()
        };
    }

    /// The segment, which has [`TcpFlow::passed`], leaves as it is.
    pub(super) fn leaves_unchanged(&mut self, segment: &Segment) {
        if segment.flags.0 & (Flags::SYN | Flags::RST) == 0 {
            self.window.passed(segment);
        }
    }

    /// The segment, which has [`TcpFlow::passed`], leaves as `frame`; its window may be narrowed there.
    pub(super) fn leaves(
        &mut self,
        packet: &Packet,
        segment: &Segment,
        checksum: Checksum,
        frame: &mut [u8],
    ) {
        if segment.flags.0 & (Flags::SYN | Flags::RST) == 0 {
            self.window.narrow(self.svm.edge, packet, segment, checksum, frame);
        }
    }

    /// A frame that opens the client's window again, if the SVM has caught up. For when nothing of the flow is held.
    pub(super) fn reopened_window(&mut self) -> Option<Vec<u8>> {
        if self.reset { None } else { self.window.reopen(self.svm.edge) }
    }

    /// A frame that tells the client how far the SVM has got, if that is what it must know to go on. `packet` waits in
    /// front for the SVM's acknowledgment.
    ///
    /// When the SVM has missed the end of what the client sent, and the PVM has it all, the client sends the beginning
    /// again, which both have, and hears nothing new for ever. The SVM repeats its acknowledgment then.
    pub(super) fn lowered_ack(&mut self, packet: &Packet, frame: &[u8]) -> Option<Vec<u8>> {
        let Kind::Tcp { segment, .. } = &packet.kind else {
            return None;
        };
        let ack = self.svm.ack.filter(|_| std::mem::take(&mut self.svm_repeats))?;
        let is_news = !at_least(self.pvm_ack, ack) && !at_least(Some(ack), segment.ack);
        if !is_news || !segment.flags.has(Flags::ACK) || segment.flags.0 & (Flags::SYN | Flags::RST) != 0 {
            return None;
        }
        let frame = self.window.lowered(ack, self.svm.edge, packet, frame)?;
        raise(&mut self.pvm_ack, ack);
        Some(frame)
    }

    /// The other end answers the guest's SYN.
    pub(super) fn remote_answers(&mut self, scales_windows: bool) {
        self.window.answered(scales_windows);
    }

    /// A checkpoint was committed: the SVM is what the PVM is.
    pub(super) fn commit(&mut self) {
        self.ahead.clear();
        self.svm = SvmEnd {
            anchor: self.svm.anchor,
            ack: self.pvm_ack,
            edge: self.window.pvm_edge(),
            ..SvmEnd::default()
        };
    }
}

/// Whether the segment begins a connection that is not the one that began with `isn`.
fn begins(segment: &Segment, isn: Option<u32>) -> bool {
    segment.flags.has(Flags::SYN) && !segment.flags.has(Flags::RST) && isn != Some(segment.seq)
}

/// How many bytes at the beginning of `some` are those of `others`, which are at least as many.
fn same_bytes(some: &[u8], others: &[u8]) -> usize {
    if some == &others[..some.len()] {
        return some.len();
    }
    some.iter().zip(others).take_while(|(a, b)| a == b).count()
}

/// The sequence number of the first byte of data.
fn data_seq(segment: &Segment) -> u32 {
    segment.seq.wrapping_add(u32::from(segment.flags.has(Flags::SYN)))
}
