//! When a connection has ended, as one sees it who stands beside it (RFC 9293 §3.6).
//!
//! Anyone can send a segment for the guest with any numbers. One that the guest does not believe must not count here
//! either: a connection whose numbers are forgotten too early is lost, one that is kept too long costs a place in a table.

use crate::packet::{Flags, Segment};

/// Twice the maximum segment lifetime (RFC 9293 §3.4.2): so long after its end packets of a connection may still come.
const LINGER_US: u64 = 2 * 2 * 60 * 1_000_000;

/// How far the connection is on its way to the end.
#[derive(Debug, Default)]
pub(super) struct Closing {
    /// What acknowledges the guest's FIN, in the SVM's space.
    guest_fin: Option<u32>,
    /// What acknowledges the other end's FIN.
    remote_fin: Option<u32>,
    guest_fin_acked: bool,
    remote_fin_acked: bool,
    /// What the guest expects next of the other end (RCV.NXT), as far as that can be told.
    expected: Option<u32>,
    reset: bool,
}

fn is_ahead(number: u32, of: u32) -> bool {
    number.wrapping_sub(of).cast_signed() > 0
}

impl Closing {
    /// A segment of the SVM, as it sent it.
    pub(super) fn outbound(&mut self, segment: &Segment) {
        // a guest that goes on has not accepted the RST, whoever sent it
        self.reset = segment.flags.has(Flags::RST);
        if segment.flags.has(Flags::FIN) {
            self.guest_fin = Some(segment.seq_end());
        }
        if segment.flags.has(Flags::ACK) {
            // nothing comes behind a FIN, so that what acknowledges it is its end
            self.remote_fin_acked |= self.remote_fin == Some(segment.ack);
            if self.expected.is_none_or(|expected| is_ahead(segment.ack, expected)) {
                self.expected = Some(segment.ack);
            }
        }
    }

    /// A segment of the other end, as it came; the SVM's numbers are `shift` ahead of it.
    pub(super) fn inbound(&mut self, segment: &Segment, shift: u32) {
        if segment.flags.has(Flags::RST) {
            // RFC 5961 §3.2: a guest believes one at the very place that it expects, and answers others
            self.reset |= self.expected.is_none_or(|expected| expected == segment.seq);
            return;
        }
        let end = segment.seq_end();
        if segment.flags.has(Flags::FIN) {
            self.remote_fin = Some(end);
        }
        if let Some(expected) = self.expected
            && !is_ahead(segment.seq, expected)
            && is_ahead(end, expected)
        {
            self.expected = Some(end);
        }
        if segment.flags.has(Flags::ACK) {
            self.guest_fin_acked |= self.guest_fin == Some(segment.ack.wrapping_add(shift));
        }
    }

    /// Whether no packet of the connection will come any more, given how long none has.
    pub(super) fn has_ended(&self, idle_us: u64) -> bool {
        (self.reset || (self.guest_fin_acked && self.remote_fin_acked)) && idle_us > LINGER_US
    }
}
