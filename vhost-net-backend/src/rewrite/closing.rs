//! When a connection has ended, as one sees it who stands beside it (RFC 9293 §3.6).

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
    reset: bool,
}

fn reaches(ack: u32, end: u32) -> bool {
    ack.wrapping_sub(end).cast_signed() >= 0
}

impl Closing {
    /// A segment of the SVM, as it sent it.
    pub(super) fn outbound(&mut self, segment: &Segment) {
        // a guest that goes on has not accepted the RST, whoever sent it
        self.reset = segment.flags.has(Flags::RST);
        if segment.flags.has(Flags::FIN) {
            self.guest_fin = Some(segment.seq_end());
        }
        if let (Some(end), true) = (self.remote_fin, segment.flags.has(Flags::ACK)) {
            self.remote_fin_acked |= reaches(segment.ack, end);
        }
    }

    /// A segment of the other end, as it came; the SVM's numbers are `shift` ahead of it.
    pub(super) fn inbound(&mut self, segment: &Segment, shift: u32) {
        self.reset |= segment.flags.has(Flags::RST);
        if segment.flags.has(Flags::FIN) {
            self.remote_fin = Some(segment.seq_end());
        }
        if let (Some(end), true) = (self.guest_fin, segment.flags.has(Flags::ACK)) {
            self.guest_fin_acked |= reaches(segment.ack.wrapping_add(shift), end);
        }
    }

    /// Whether no packet of the connection will come any more, given how long none has.
    pub(super) fn has_ended(&self, idle_us: u64) -> bool {
        (self.reset || (self.guest_fin_acked && self.remote_fin_acked)) && idle_us > LINGER_US
    }
}
