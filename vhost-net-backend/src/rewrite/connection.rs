//! One connection of the rewriter: how far the SVM's numbers are from the PVM's, and what waits until that is known.

use super::closing::Closing;
use crate::compare::is_refusal;
use crate::offload::FrameHeader;
use crate::packet::checksum::{self, Checksum};
use crate::packet::{Addresses, Flags, Quoted, Segment, be32, edge_positions};

/// Where in a TCP header the numbers and the checksum stand.
const SEQ_AT: usize = 4;
const ACK_AT: usize = 8;
const CHECKSUM_AT: usize = 16;
/// Where in an ICMP message the checksum stands.
const ICMP_CHECKSUM_AT: usize = 2;

/// Edges of as many SACK blocks as 40 bytes of options can hold.
const SACK_EDGES_MAX: usize = 8;

/// How one VM's end of a connection began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    /// Sequence number of its SYN.
    pub(super) isn: u32,
    /// TSval of its SYN.
    pub(super) timestamp: Option<u32>,
}

/// How far the SVM's numbers are ahead of the PVM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shift {
    /// Sequence numbers.
    pub(super) seq: u32,
    /// Timestamps.
    pub(super) timestamp: u32,
}

#[derive(Debug, Default)]
pub(super) struct Connection {
    svm: Option<Beginning>,
    pvm: Option<Beginning>,
    /// The shift of the connection before, which the SVM still has while the PVM is on to the next one.
    previous: Option<Shift>,
    /// Packets of the SVM that wait for the PVM's SYN.
    pub(super) held: Vec<(FrameHeader, Vec<u8>)>,
    pub(super) closing: Closing,
    clocks: Clocks,
    pub(super) last_us: u64,
}

/// How far each end knows the guest's clock. The shift of the timestamps is exact for the first SYN only: later packets
/// of the two VMs are not sent at the same time.
#[derive(Debug, Default)]
struct Clocks {
    /// The last TSval of the SVM. A guest may reject an echo of what it has not sent.
    svm: Option<u32>,
    /// The last TSval of the guest that the client has echoed. A client rejects an older one (RFC 7323 §5.3).
    echoed: Option<u32>,
}

/// Moves `seen` on to `value` if that is ahead, and returns it.
fn raise(seen: &mut Option<u32>, value: u32) -> u32 {
    let seen = seen.get_or_insert(value);
    if value.wrapping_sub(*seen).cast_signed() > 0 {
        *seen = value;
    }
    *seen
}

impl Connection {
    /// What is between the two VMs, once both have begun.
    pub(super) fn shift(&self) -> Option<Shift> {
        let (svm, pvm) = (self.svm?, self.pvm?);
        let timestamp = match (svm.timestamp, pvm.timestamp) {
            (Some(svm), Some(pvm)) => svm.wrapping_sub(pvm),
            _ => 0,
        };
        Some(Shift { seq: svm.isn.wrapping_sub(pvm.isn), timestamp })
    }

    /// What is between the numbers of the client and those of the SVM now.
    pub(super) fn shift_in_use(&self) -> Option<Shift> {
        self.shift().or(self.previous)
    }

    pub(super) fn waits_for_pvm(&self) -> bool {
        self.svm.is_some() && self.pvm.is_none()
    }

    /// Whether this is the SVM's SYN of this connection.
    pub(super) fn is_of(&self, beginning: &Beginning) -> bool {
        self.svm.is_some_and(|svm| svm.isn == beginning.isn)
    }

    /// The SVM has sent a SYN, perhaps again.
    pub(super) fn svm_begins(&mut self, beginning: Beginning) {
        if self.is_of(&beginning) {
            return;
        }
        if self.shift().is_some() {
            *self = Self { last_us: self.last_us, ..Self::default() };
        }
        self.previous = None;
        self.svm = Some(beginning);
    }

    /// The PVM has sent a SYN, perhaps again.
    pub(super) fn pvm_begins(&mut self, beginning: Beginning) {
        if self.pvm.is_some_and(|pvm| pvm.isn == beginning.isn) {
            return;
        }
        if let Some(shift) = self.shift() {
            *self = Self { last_us: self.last_us, previous: Some(shift), ..Self::default() };
        }
        self.pvm = Some(beginning);
    }

    /// Whether nothing will come of it any more.
    pub(super) fn may_go(&self, now_us: u64) -> bool {
        self.held.is_empty() && self.closing.has_ended(now_us.saturating_sub(self.last_us))
    }
}

/// A TCP segment that is changed, in its frame.
pub(super) struct Change<'a> {
    pub(super) segment: &'a Segment,
    pub(super) checksum: Checksum,
    pub(super) frame: &'a mut [u8],
}

impl Change<'_> {
    fn set(&mut self, at: usize, number: u32) {
        self.segment.change(self.frame, self.checksum, at, &number.to_be_bytes());
    }

    /// Whether the segment has come undamaged. One whose checksum is left to this host has crossed no wire.
    fn is_whole(&self, addresses: &Addresses) -> bool {
        let bytes = self.segment.at..self.segment.payload.end;
        self.checksum == Checksum::Partial || checksum::of_tcp(addresses, &self.frame[bytes]) == 0
    }
}

impl Connection {
    /// Puts a packet of the SVM into the PVM's space.
    pub(super) fn outbound(&mut self, shift: Shift, mut change: Change<'_>) {
        let segment = change.segment;
        self.closing.outbound(segment);
        if is_refusal(segment) {
            // its zero is no position of any stream
            return;
        }
        if let Some(timestamps) = segment.timestamps(change.frame) {
            raise(&mut self.clocks.svm, timestamps.value);
            let mut value = timestamps.value.wrapping_sub(shift.timestamp);
            if let Some(echoed) = self.clocks.echoed {
                value = raise(&mut Some(echoed), value);
            }
            change.set(timestamps.at, value);
        }
        change.set(segment.at + SEQ_AT, segment.seq.wrapping_sub(shift.seq));
    }

    /// Puts a packet for the guest into the SVM's space. Without ACK it has nothing to do with what the guest sent.
    pub(super) fn inbound(&mut self, shift: Shift, mut change: Change<'_>, addresses: &Addresses) {
        let segment = change.segment;
        self.closing.inbound(segment, shift.seq);
        if !segment.flags.has(Flags::ACK) {
            return;
        }
        if let Some(timestamps) = segment.timestamps(change.frame) {
            // What the SVM's clock has not reached the PVM's may have, or a bit is wrong: that would move the clock for days.
            let reached = self.clocks.svm.map(|svm| svm.wrapping_sub(shift.timestamp));
            let is_reached =
                reached.is_some_and(|reached| raise(&mut Some(reached), timestamps.echo) == reached);
            if is_reached || change.is_whole(addresses) {
                raise(&mut self.clocks.echoed, timestamps.echo);
            }
            let mut echo = timestamps.echo.wrapping_add(shift.timestamp);
            if let Some(last) = self.clocks.svm
                && raise(&mut Some(last), echo) == echo
            {
                echo = last;
            }
            change.set(timestamps.at + 4, echo);
        }
        change.set(segment.at + ACK_AT, segment.ack.wrapping_add(shift.seq));
        let mut edges = [0; SACK_EDGES_MAX];
        let mut count = 0;
        for (place, at) in edges.iter_mut().zip(edge_positions(segment, change.frame)) {
            *place = at;
            count += 1;
        }
        for at in &edges[..count] {
            if let Some(edge) = be32(change.frame, *at) {
                change.set(*at, edge.wrapping_add(shift.seq));
            }
        }
    }
}

impl Shift {
    /// Puts the sequence number that an error for the guest quotes into the SVM's space.
    pub(super) fn requote(self, quoted: &Quoted, frame: &mut [u8]) {
        let at = quoted.tcp.start;
        let Some(seq) = be32(frame, at + SEQ_AT) else {
            return;
        };
        let seq = seq.wrapping_add(self.seq).to_be_bytes();
        let (mut header, mut bytes) = ([0; CHECKSUM_AT + 2], SEQ_AT + seq.len());
        if quoted.tcp.len() >= header.len() {
            // its own checksum is quoted too
            bytes = header.len();
            header.copy_from_slice(&frame[at..at + bytes]);
            checksum::replace(&mut header, CHECKSUM_AT, 0, SEQ_AT, &seq);
        } else {
            header[..SEQ_AT].copy_from_slice(&frame[at..at + SEQ_AT]);
            header[SEQ_AT..bytes].copy_from_slice(&seq);
        }
        let icmp_at = quoted.icmp_at;
        checksum::replace(frame, icmp_at + ICMP_CHECKSUM_AT, icmp_at, at, &header[..bytes]);
    }
}
