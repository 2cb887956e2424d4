//! What may leave: computed from what the two VMs send and from the checkpoints alone, not by the code under test.
//!
//! Positions in a stream count from the sender's own SYN, so that the two VMs' initial sequence numbers, which are seen in
//! their packets, do not matter.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::segment::{Flow, Segment, is_whole, syn_answer};
use crate::trace;

/// `a >= b` for sequence numbers.
fn reaches(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() >= 0
}

fn raise(seen: &mut Option<u32>, value: u32) {
    if seen.is_none_or(|seen| reaches(value, seen)) {
        *seen = Some(value);
    }
}

/// It repeats a byte's place, not the byte (RFC 9293 §3.8.4).
fn is_keep_alive(segment: &Segment) -> bool {
    segment.payload == [0] && !segment.syn && !segment.fin
}

/// A connection, and what tells it from others on the same ports: the client's first sequence number, if the client opened
/// it.
type Key = (Flow, u32);

/// What one VM has said on a connection.
#[derive(Clone, Debug, Default)]
struct Said {
    isn: Option<u32>,
    /// TSval of the SYN.
    clock: Option<u32>,
    /// Byte by position behind the SYN.
    bytes: BTreeMap<u32, u8>,
    syn: bool,
    fin: Option<u32>,
    rst: bool,
    /// Highest acknowledgment, in the client's sequence numbers.
    ack: Option<u32>,
    /// Highest right edge of a window, likewise.
    edge: Option<u32>,
}

impl Said {
    fn position(&self, segment: &Segment) -> Option<u32> {
        Some(segment.seq.wrapping_sub(self.isn?).wrapping_sub(u32::from(!segment.syn)))
    }

    /// Whether a byte was said there, or the SYN.
    fn has(&self, position: u32) -> bool {
        position == u32::MAX || self.bytes.contains_key(&position)
    }

    fn add(&mut self, segment: &Segment, scale: Option<u8>) {
        if segment.rst {
            self.rst = true;
            return;
        }
        if segment.syn {
            assert!(
                self.isn.is_none_or(|isn| isn == segment.seq),
                "a port is used twice: the simulation is at fault"
            );
            if self.isn.is_none() {
                self.clock = segment.timestamps.map(|(value, _)| value);
            }
            self.isn = Some(segment.seq);
            self.syn = true;
        }
        if let Some(ack) = segment.ack {
            raise(&mut self.ack, ack);
            if let Some(scale) = scale {
                raise(&mut self.edge, ack.wrapping_add(segment.window << scale));
            }
        }
        let Some(position) = self.position(segment) else { return };
        if is_keep_alive(segment) && self.has(position) {
            return;
        }
        for (byte, at) in segment.payload.iter().zip(position..) {
            self.bytes.insert(at, *byte);
        }
        if segment.fin {
            self.fin = Some(position + segment.payload.len() as u32);
        }
    }
}

/// How far a VM had come on a connection.
#[derive(Clone, Debug, Default)]
struct Mark {
    isn: Option<u32>,
    syn: bool,
    bytes: u32,
    fin: bool,
    rst: bool,
    ack: Option<u32>,
    edge: Option<u32>,
}

#[derive(Debug, Default)]
struct Connection {
    /// The shift of the guest's windows, the same for both VMs.
    named_scale: u8,
    guest_opens: bool,
    /// Whether the client scales windows, if the guest opens the connection and that is known.
    client_scales: Option<bool>,
    pvm: Said,
    /// In its present epoch.
    svm: Said,
    /// The client may know where the PVM's numbers begin.
    syn_released: bool,
    /// The SVM has this connection from a checkpoint: its numbers are the PVM's.
    is_copy: bool,
    /// The last clock of the guest that the client has echoed to the SVM.
    echoed: Option<u32>,
    /// Covered by the last committed checkpoint.
    committed: Mark,
    snapshot: Mark,
}

impl Connection {
    fn scale(&self, segment: &Segment) -> Option<u8> {
        match (segment.syn, self.guest_opens, self.client_scales) {
            (true, ..) => Some(0),
            (false, false, _) | (false, true, Some(true)) => Some(self.named_scale),
            (false, true, Some(false)) => Some(0),
            (false, true, None) => None,
        }
    }
}

/// Knows what may leave.
#[derive(Default)]
pub(crate) struct Oracle {
    connections: BTreeMap<Key, Connection>,
    /// The last connection of each VM on a flow.
    pvm_last: BTreeMap<Flow, u32>,
    svm_last: BTreeMap<Flow, u32>,
    snapshot_last: BTreeMap<Flow, u32>,
    /// Other frames that the PVM sent, and how many of each.
    pvm_frames: HashMap<Vec<u8>, u32>,
    svm_frames: HashSet<Vec<u8>>,
    committed_frames: HashSet<Vec<u8>>,
    snapshot_frames: HashSet<Vec<u8>>,
    /// What was given to the primary and has not come out, and how often: without what it may change.
    outstanding: HashMap<Vec<u8>, u32>,
    outstanding_frames: u64,
    /// A table of flows that is too small for them forgets how far windows reach: then they are not looked at.
    forgets_windows: bool,
    pub(crate) released: u64,
    pub(crate) reopened: u64,
}

/// A frame without its TCP window and checksum.
fn essence(frame: &[u8], segment: Option<&Segment>) -> Vec<u8> {
    let mut essence = frame.to_vec();
    if let Some(segment) = segment {
        essence[segment.at + 14..segment.at + 18].fill(0);
    }
    essence
}

impl Oracle {
    pub(crate) fn new(forgets_windows: bool) -> Self {
        Self { forgets_windows, ..Self::default() }
    }

    fn connection(&mut self, segment: &Segment, of_svm: bool) -> &mut Connection {
        let last = if of_svm { &mut self.svm_last } else { &mut self.pvm_last };
        if let (true, Some(ack)) = (segment.syn, segment.ack) {
            last.insert(segment.flow, ack);
        }
        let last = last.get(&segment.flow).copied().unwrap_or(0);
        let connection = self.connections.entry((segment.flow, last)).or_default();
        if segment.syn {
            connection.guest_opens = segment.ack.is_none();
            connection.named_scale = segment.window_scale.unwrap_or(0);
        }
        connection
    }

    /// The primary takes this frame from the PVM.
    pub(crate) fn pvm_says(&mut self, frame: &[u8]) {
        let segment = Segment::of_guest(frame);
        *self.outstanding.entry(essence(frame, segment.as_ref())).or_default() += 1;
        self.outstanding_frames += 1;
        match segment {
            Some(segment) => {
                let connection = self.connection(&segment, false);
                let scale = connection.scale(&segment);
                connection.pvm.add(&segment, scale);
            }
            None => *self.pvm_frames.entry(frame.to_vec()).or_default() += 1,
        }
    }

    /// The secondary takes this frame from the SVM.
    pub(crate) fn svm_says(&mut self, frame: &[u8]) {
        match Segment::of_guest(frame) {
            Some(segment) => {
                let connection = self.connection(&segment, true);
                let scale = connection.scale(&segment);
                connection.svm.add(&segment, scale);
            }
            None => drop(self.svm_frames.insert(frame.to_vec())),
        }
    }

    /// The client has sent this frame, and it reached the PVM.
    pub(crate) fn pvm_hears(&mut self, frame: &[u8]) {
        if let Some((flow, scales)) = syn_answer(frame)
            && let Some(connection) = self.connections.get_mut(&(flow, 0))
        {
            connection.client_scales.get_or_insert(scales);
        }
    }

    /// The PVM is paused for a checkpoint.
    pub(crate) fn snapshot(&mut self) {
        for connection in self.connections.values_mut() {
            let pvm = &connection.pvm;
            connection.snapshot = Mark {
                isn: pvm.isn,
                syn: pvm.syn,
                bytes: pvm.bytes.keys().next_back().map_or(0, |last| last + 1),
                fin: pvm.fin.is_some(),
                rst: pvm.rst,
                ack: pvm.ack,
                edge: pvm.edge,
            };
        }
        self.snapshot_last = self.pvm_last.clone();
        self.snapshot_frames.extend(self.pvm_frames.keys().cloned());
    }

    /// The secondary has committed the checkpoint: what the PVM sent before it may leave.
    pub(crate) fn committed(&mut self) {
        for connection in self.connections.values_mut() {
            connection.committed = connection.snapshot.clone();
        }
        self.committed_frames.clone_from(&self.snapshot_frames);
    }

    /// The SVM is what the PVM was at the snapshot.
    pub(crate) fn svm_replaced(&mut self) {
        for connection in self.connections.values_mut() {
            connection.is_copy = connection.committed.isn.is_some();
            connection.echoed = None;
            connection.svm = Said { isn: connection.committed.isn, ..Said::default() };
        }
        self.svm_last = self.snapshot_last.clone();
        self.svm_frames.clear();
    }

    /// The primary, which is half of a pair, sends this frame to the LAN.
    pub(crate) fn primary_sends(&mut self, frame: &[u8]) {
        let segment = Segment::of_guest(frame);
        self.account(frame, segment.as_ref());
        let Some(segment) = segment else {
            let said = self.svm_frames.contains(frame) || self.committed_frames.contains(frame);
            assert!(said, "output commit: the SVM has not said {}", trace::frame(frame));
            return;
        };
        let last = self.pvm_last.get(&segment.flow).copied().unwrap_or(0);
        let connection = &self.connections[&(segment.flow, last)];
        let what = |rule: &str| {
            let Connection { pvm, svm, committed, .. } = connection;
            format!(
                "output commit: {rule}: {}\n  PVM ack {:?} edge {:?}, SVM isn {:?} ack {:?} edge {:?} fin {:?}, {committed:?}",
                trace::frame(frame),
                pvm.ack,
                pvm.edge,
                svm.isn,
                svm.ack,
                svm.edge,
                svm.fin
            )
        };
        let Connection { pvm, svm, committed, .. } = connection;
        if segment.rst {
            assert!(svm.rst || committed.rst, "{}", what("the SVM has not reset the connection"));
            return;
        }
        if segment.syn {
            assert!(svm.syn || committed.syn, "{}", what("the SVM has not opened the connection"));
        }
        let position = pvm.position(&segment).expect("the PVM's SYN was seen");
        let data: &[u8] = if is_keep_alive(&segment) && pvm.has(position) { &[] } else { &segment.payload };
        for (byte, at) in data.iter().zip(position..) {
            assert_eq!(pvm.bytes.get(&at), Some(byte), "{}", what("the PVM said something else"));
            let said = at < committed.bytes || svm.bytes.get(&at) == Some(byte);
            assert!(said, "{} (byte {at})", what("the SVM has not said these bytes"));
        }
        if segment.fin {
            let end = position + segment.payload.len() as u32;
            assert!(svm.fin == Some(end) || committed.fin, "{}", what("the SVM has not ended the stream"));
        }
        let Some(ack) = segment.ack else {
            self.syn_is_released(&segment);
            return;
        };
        let within = |value: u32, limit: Option<u32>| limit.is_some_and(|limit| reaches(limit, value));
        let acked = within(ack, svm.ack) || within(ack, committed.ack);
        assert!(acked, "{}", what("the SVM has not acknowledged as much"));
        if let (Some(scale), false) = (connection.scale(&segment), self.forgets_windows) {
            let edge = ack.wrapping_add(segment.window << scale);
            let offered = within(edge, svm.edge) || within(edge, committed.edge);
            assert!(offered, "{}", what("the SVM has not offered such a window"));
        }
        self.syn_is_released(&segment);
    }

    fn syn_is_released(&mut self, segment: &Segment) {
        let last = self.pvm_last.get(&segment.flow).copied().unwrap_or(0);
        if let (true, Some(connection)) = (segment.syn, self.connections.get_mut(&(segment.flow, last))) {
            connection.syn_released = true;
        }
    }

    /// The SVM's connection, and how far its numbers are ahead of those that the client knows, if that is certain.
    fn shifted(&mut self, flow: Flow) -> Option<(&mut Connection, u32)> {
        let (pvm_last, svm_last) = (self.pvm_last.get(&flow), self.svm_last.get(&flow));
        let connection = self.connections.get_mut(&(flow, svm_last.copied().unwrap_or(0)))?;
        let delta = match (connection.pvm.isn, connection.svm.isn) {
            (Some(pvm), Some(svm)) if connection.syn_released && pvm_last == svm_last => {
                svm.wrapping_sub(pvm)
            }
            (None, Some(_)) => 0,
            _ => return None,
        };
        Some((connection, delta))
    }

    /// The secondary sends `frame`, to the primary or to the LAN, in place of `said`, which the SVM sent: numbers and times
    /// are those that the client knows.
    pub(crate) fn secondary_sends(&mut self, said: &[u8], frame: &[u8]) {
        assert!(
            Segment::of_guest(said).is_none() || is_whole(frame),
            "a wrong checksum: {}",
            trace::frame(frame)
        );
        let (Some(said), Some(sent)) = (Segment::of_guest(said), Segment::of_guest(frame)) else { return };
        // what waited for the PVM's SYN may come with it
        if said.syn || said.rst || said.payload != sent.payload || said.flow != sent.flow {
            return;
        }
        let Some((connection, delta)) = self.shifted(said.flow) else { return };
        let Connection { pvm, svm, is_copy, echoed, .. } = connection;
        assert_eq!(sent.seq, said.seq.wrapping_sub(delta), "it is {delta} ahead: {}", trace::frame(frame));
        let (Some((said, _)), Some((value, _))) = (said.timestamps, sent.timestamps) else { return };
        let shift = match (pvm.clock, svm.clock) {
            // its SYN was sent again by either: the shift is between two retransmission timers
            _ if *is_copy && svm.syn => return,
            _ if *is_copy => 0,
            (Some(pvm), Some(svm)) => svm.wrapping_sub(pvm),
            (Some(_), None) => return,
            _ => 0,
        };
        let exact = said.wrapping_sub(shift);
        let mut wanted = Some(exact);
        if let (false, Some(echoed), Some(_)) = (*is_copy, *echoed, pvm.clock) {
            raise(&mut wanted, echoed);
        }
        assert_eq!(
            Some(value),
            wanted,
            "a clock that is {shift} ahead, echoed {echoed:?}: {}",
            trace::frame(frame)
        );
    }

    /// The SVM gets `frame` in place of `sent`, which the client sent: numbers of the guest's stream are the SVM's own.
    pub(crate) fn svm_hears(&mut self, sent: &[u8], frame: &[u8]) {
        assert_eq!(is_whole(sent), is_whole(frame), "the rewriter mends or breaks {}", trace::frame(sent));
        let (Some(sent), Some(heard)) = (Segment::of_guest_if_whole(sent), Segment::of_guest_if_whole(frame))
        else {
            return;
        };
        let flow = Flow { guest: sent.flow.remote, remote: sent.flow.guest };
        let Some((connection, delta)) = self.shifted(flow) else { return };
        if let (Some((_, echo)), Some(_)) = (sent.timestamps, sent.ack) {
            raise(&mut connection.echoed, echo);
        }
        let shifted = |number: u32| number.wrapping_add(delta);
        let acks: Vec<_> = sent.sacks.iter().map(|(start, end)| (shifted(*start), shifted(*end))).collect();
        let same =
            (heard.ack, &heard.sacks) == (sent.ack.map(shifted), &acks) && heard.payload == sent.payload;
        assert!(same, "the SVM hears {} in place of {sent:?}, it is {delta} ahead", trace::frame(frame));
    }

    /// What leaves is what the PVM gave, once; or it opens a window that had been narrowed.
    fn account(&mut self, frame: &[u8], segment: Option<&Segment>) {
        let essence = essence(frame, segment);
        match self.outstanding.get_mut(&essence) {
            Some(count) => {
                *count -= 1;
                if *count == 0 {
                    self.outstanding.remove(&essence);
                }
                self.outstanding_frames -= 1;
                self.released += 1;
            }
            None => {
                let opens = segment.is_some_and(|segment| {
                    segment.payload.is_empty() && !segment.syn && !segment.fin && !segment.rst
                });
                assert!(opens, "the PVM did not send {}, or not so often", trace::frame(frame));
                self.reopened += 1;
            }
        }
    }

    /// The primary, which is alone now, sends this frame to the LAN.
    pub(crate) fn survivor_sends(&mut self, frame: &[u8]) {
        self.account(frame, Segment::of_guest(frame).as_ref());
    }

    /// Whether all that the PVM gave has left.
    pub(crate) fn nothing_is_held(&self) -> bool {
        self.outstanding_frames == 0
    }

    /// All that the PVM gave has left: the proxy holds nothing and has lost nothing.
    pub(crate) fn expect_nothing_held(&self, when: &str) {
        assert_eq!(self.outstanding_frames, 0, "packets of the PVM are lost or held for ever {when}");
    }
}
