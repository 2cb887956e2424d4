//! Makes the SVM's answer to a client's SYN comparable with the PVM's.
//!
//! QEMU's filter-rewriter learns how far the two guests' sequence numbers are apart only from the client's next segment,
//! so the SVM's SYN-ACK comes with the SVM's own initial sequence number, and everything after it in the PVM's space. Here
//! that number is replaced by the PVM's, which the PVM's SYN-ACK tells; whichever of the two comes first waits for the
//! other. Both answer the same SYN, so they acknowledge the same number.
//!
//! A SYN of a connection that the guest opens is left alone: the rewriter does not translate such a connection, so the two
//! guests can go on with it only after a checkpoint.

use std::collections::VecDeque;

use hashbrown::HashMap;

use crate::packet::{Flags, FlowKey, Kind, Packet};

/// Where in a TCP header the sequence number stands.
const SEQ_AT: usize = 4;

/// Connections that are remembered. When more are opened at once the oldest is forgotten, and if its SYN-ACK of the SVM
/// comes later than that, it costs a checkpoint.
const CONNECTIONS_MAX: usize = 65_536;

/// A SYN-ACK of the SVM longer than this (of a whole packet) is not kept: it carries data, which nobody does.
const FRAME_BYTES_MAX: usize = 512;

/// What is known of a connection's beginning.
#[derive(Debug)]
enum Seen {
    /// The PVM has answered, with this initial sequence number.
    Pvm { isn: u32 },
    /// The SVM has answered, and the PVM has not.
    Svm { frame: Box<[u8]> },
}

/// A client's SYN that is answered: its flow, and what the answer acknowledges.
type Opening = (FlowKey, u32);

/// The connections that clients have opened of late.
#[derive(Debug, Default)]
pub(super) struct Openings {
    seen: HashMap<Opening, Seen, ahash::RandomState>,
    /// In the order in which they were entered.
    order: VecDeque<Opening>,
}

/// The opening that a frame of the guest answers, with its sequence number and that number's place in the frame.
fn answered(frame: &[u8]) -> Option<(Opening, u32, usize)> {
    let packet = Packet::parse(frame);
    let Kind::Tcp { segment, .. } = &packet.kind else {
        return None;
    };
    let answers = segment.flags.has(Flags::SYN | Flags::ACK) && !segment.flags.has(Flags::RST);
    answers.then(|| ((packet.flow_from_guest(frame), segment.ack), segment.seq, segment.at + SEQ_AT))
}

/// Gives a frame's segment another sequence number. The checksum is not corrected: nobody looks at it.
fn renumber(frame: &mut [u8], at: usize, seq: u32) {
    frame[at..at + 4].copy_from_slice(&seq.to_be_bytes());
}

impl Openings {
    /// The PVM has sent this frame. Returns the SVM's SYN-ACK that has waited for it, as if it had the same initial sequence
    /// number.
    pub(super) fn pvm_says(&mut self, frame: &[u8]) -> Option<Box<[u8]>> {
        let (opening, isn, _) = answered(frame)?;
        match self.enter(opening, Seen::Pvm { isn }) {
            Some(Seen::Svm { mut frame }) => {
                let (_, _, at) = answered(&frame)?;
                renumber(&mut frame, at, isn);
                Some(frame)
            }
            _ => None,
        }
    }

    /// The SVM has sent this frame. Returns what is to be compared: the frame itself, or one with the PVM's initial
    /// sequence number, or nothing as long as that is not known.
    pub(super) fn svm_says<'a>(&mut self, frame: &'a [u8], scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let Some((opening, _, at)) = answered(frame) else {
            return Some(frame);
        };
        if let Some(Seen::Pvm { isn }) = self.seen.get(&opening) {
            scratch.clear();
            scratch.extend_from_slice(frame);
            renumber(scratch, at, *isn);
            return Some(scratch);
        }
        if frame.len() <= FRAME_BYTES_MAX {
            self.enter(opening, Seen::Svm { frame: frame.into() });
        }
        None
    }

    fn enter(&mut self, opening: Opening, seen: Seen) -> Option<Seen> {
        let before = self.seen.insert(opening, seen);
        if before.is_none() {
            self.order.push_back(opening);
            if self.order.len() > CONNECTIONS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.seen.remove(&oldest);
            }
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_frames::Tcp;

    fn syn_ack(seq: u32, ack: u32) -> Vec<u8> {
        Tcp { seq, ack: Some(ack), syn: true, window: 1000, ..Tcp::default() }.frame()
    }

    fn seq(frame: &[u8]) -> u32 {
        answered(frame).unwrap().1
    }

    #[test]
    fn the_svms_syn_ack_gets_the_pvms_number_whichever_comes_first() {
        let (mut openings, mut scratch) = (Openings::default(), Vec::new());
        assert!(openings.pvm_says(&syn_ack(1000, 7)).is_none());
        assert_eq!(seq(openings.svm_says(&syn_ack(5000, 7), &mut scratch).unwrap()), 1000);
        // sent again
        assert_eq!(seq(openings.svm_says(&syn_ack(5000, 7), &mut scratch).unwrap()), 1000);
        assert!(openings.pvm_says(&syn_ack(1000, 7)).is_none());
        // the next connection on the same ports
        assert!(openings.svm_says(&syn_ack(9000, 8), &mut scratch).is_none());
        assert_eq!(seq(&openings.pvm_says(&syn_ack(3000, 8)).unwrap()), 3000);
    }

    #[test]
    fn everything_else_passes_as_it_is() {
        let (mut openings, mut scratch) = (Openings::default(), Vec::new());
        let syn = Tcp { seq: 1, syn: true, ..Tcp::default() }.frame();
        let data = Tcp { seq: 1, ack: Some(2), data: b"x", ..Tcp::default() }.frame();
        for frame in [&syn[..], &data, b"", &[0; 60]] {
            assert!(openings.pvm_says(frame).is_none());
            assert_eq!(openings.svm_says(frame, &mut scratch), Some(frame));
        }
    }

    #[test]
    fn a_flood_of_openings_takes_no_more_memory_than_is_set() {
        let (mut openings, mut scratch) = (Openings::default(), Vec::new());
        for ack in 0..CONNECTIONS_MAX as u32 + 1000 {
            assert!(openings.svm_says(&syn_ack(1, ack), &mut scratch).is_none());
        }
        assert_eq!((openings.seen.len(), openings.order.len()), (CONNECTIONS_MAX, CONNECTIONS_MAX));
        // the oldest is forgotten, the youngest is not
        assert!(openings.pvm_says(&syn_ack(2, 0)).is_none());
        assert!(openings.pvm_says(&syn_ack(2, CONNECTIONS_MAX as u32 + 999)).is_some());
    }
}
