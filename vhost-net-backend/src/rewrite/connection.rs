//! One connection of the rewriter: how far the SVM's numbers are from the PVM's, and what waits until that is known.

use super::closing::Closing;
use crate::compare::is_refusal;
use crate::packet::{Flags, Segment, checksum, edge_positions};

/// Where in a TCP header the numbers and the checksum stand.
const SEQ_AT: usize = 4;
const ACK_AT: usize = 8;
const CHECKSUM_AT: usize = 16;

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
    pub(super) held: Vec<Vec<u8>>,
    pub(super) closing: Closing,
    pub(super) last_us: u64,
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

fn add(frame: &mut [u8], segment: &Segment, at: usize, number: u32) {
    if let Some(old) = frame.get(at..).and_then(|rest| rest.first_chunk::<4>()) {
        let new = u32::from_be_bytes(*old).wrapping_add(number).to_be_bytes();
        checksum::replace(frame, segment.at + CHECKSUM_AT, segment.at, at, &new);
    }
}

impl Shift {
    /// Puts a packet of the SVM into the PVM's space.
    pub(super) fn outbound(self, segment: &Segment, frame: &mut [u8]) {
        if is_refusal(segment) {
            // its zero is no position of any stream
            return;
        }
        if let (Some(timestamps), true) = (segment.timestamps(frame), self.timestamp != 0) {
            add(frame, segment, timestamps.at, self.timestamp.wrapping_neg());
        }
        if self.seq != 0 {
            add(frame, segment, segment.at + SEQ_AT, self.seq.wrapping_neg());
        }
    }

    /// Puts a packet for the guest into the SVM's space. Without ACK it has nothing to do with what the guest sent.
    pub(super) fn inbound(self, segment: &Segment, frame: &mut [u8]) {
        if !segment.flags.has(Flags::ACK) {
            return;
        }
        if let (Some(timestamps), true) = (segment.timestamps(frame), self.timestamp != 0) {
            add(frame, segment, timestamps.at + 4, self.timestamp);
        }
        if self.seq != 0 {
            add(frame, segment, segment.at + ACK_AT, self.seq);
            for edge in 0.. {
                // one at a time: the iterator reads the frame that is being changed
                let Some(at) = edge_positions(segment, frame).nth(edge) else {
                    break;
                };
                add(frame, segment, at, self.seq);
            }
        }
    }
}
