//! Keeps the windows that a client sees within what the SVM has offered too.
//!
//! Otherwise a client would send data that the PVM has room for and the SVM has not; the SVM would drop it, and get it
//! only when the client's retransmission timer fires.

use crate::packet::checksum::{self, Checksum};
use crate::packet::{Addresses, Flags, Kind, Packet, Segment};

use super::tcp::{at_least, raise};

/// Where in a TCP header the numbers, the window and the checksum stand.
const SEQ_AT: usize = 4;
const ACK_AT: usize = 8;
const WINDOW_AT: usize = 14;
const CHECKSUM_AT: usize = 16;

/// A window that was narrowed is opened again in steps no smaller than this, against silly windows (RFC 9293
/// §3.8.6.2.2): two full segments.
const STEP_BYTES: u32 = 2 * 1460;

/// The windows of one connection of the PVM.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// The shift that the guest named in its SYN.
    named: u8,
    /// The shift of all its later windows, once both ends' SYNs are known.
    scale: Option<u8>,
    /// Right edge that the PVM has offered.
    pvm_edge: Option<u32>,
    /// Right edge that the client has seen.
    released_edge: Option<u32>,
    /// The last segment that was released, if its window was narrowed.
    narrowed: Option<Box<Narrowed>>,
}

/// What is needed to send an acknowledgment that the PVM has not sent so.
#[derive(Debug)]
struct Narrowed {
    /// The frame without data.
    head: Vec<u8>,
    network_at: usize,
    addresses: Addresses,
    segment: Segment,
}

/// The right edge of the window that a segment offers.
fn edge(ack: u32, window: u16, scale: u8) -> u32 {
    ack.wrapping_add(u32::from(window) << scale)
}

impl Window {
    /// The windows of a connection that begins with this segment of the guest.
    pub(super) fn of_syn(segment: &Segment, frame: &[u8]) -> Self {
        let named = segment.syn_options(frame).window_scale;
        // a guest that answers a SYN names a shift only if the client did; of its own SYN it cannot know yet
        let answers = segment.flags.has(Flags::ACK);
        let edge = answers.then(|| edge(segment.ack, segment.window, 0));
        Self {
            named: named.unwrap_or(0),
            scale: answers.then(|| named.unwrap_or(0)),
            pvm_edge: edge,
            released_edge: edge,
            narrowed: None,
        }
    }

    /// The other end answers the guest's SYN, and scales windows or does not (RFC 7323 §2.2: only if both do).
    pub(super) fn answered(&mut self, scales: bool) {
        self.scale.get_or_insert(if scales { self.named } else { 0 });
    }

    /// The right edge that a segment offers, if it can be known.
    pub(super) fn edge_of(&self, segment: &Segment) -> Option<u32> {
        self.edge_at(segment.ack, segment.window)
    }

    /// The right edge that an acknowledgment with this window offers, if it can be known.
    pub(super) fn edge_at(&self, ack: u32, window: u16) -> Option<u32> {
        Some(edge(ack, window, self.scale?))
    }

    pub(super) fn pvm_edge(&self) -> Option<u32> {
        self.pvm_edge
    }

    /// The segment leaves as it is.
    pub(super) fn passed(&mut self, segment: &Segment) {
        if let (Some(edge), true) = (self.edge_of(segment), segment.flags.has(Flags::ACK)) {
            raise(&mut self.pvm_edge, edge);
            raise(&mut self.released_edge, edge);
            self.narrowed = None;
        }
    }

    /// The segment leaves as `frame`, whose window is narrowed as far as needed. A window never shrinks for that.
    pub(super) fn narrow(
        &mut self,
        svm_edge: Option<u32>,
        packet: &Packet,
        segment: &Segment,
        checksum: Checksum,
        frame: &mut [u8],
    ) {
        let (Some(scale), Some(mut limit), Some(pvm_edge), true) =
            (self.scale, svm_edge, self.edge_of(segment), segment.flags.has(Flags::ACK))
        else {
            return;
        };
        raise(&mut self.pvm_edge, pvm_edge);
        if let Some(released) = self.released_edge
            && !at_least(Some(limit), released)
        {
            limit = released;
        }
        self.narrowed = None;
        if at_least(Some(limit), pvm_edge) {
            raise(&mut self.released_edge, pvm_edge);
            return;
        }
        let window = window(limit, segment.ack, scale);
        segment.change(frame, checksum, segment.at + WINDOW_AT, &window.to_be_bytes());
        raise(&mut self.released_edge, segment.ack.wrapping_add(u32::from(window) << scale));
        if let Kind::Tcp { addresses, .. } = packet.kind {
            self.narrowed = Some(Box::new(Narrowed::of(packet, addresses, segment, frame)));
        }
    }

    /// The SVM offers more now, and the PVM has nothing to say: an acknowledgment that tells the client, if it is worth
    /// one.
    pub(super) fn reopen(&mut self, svm_edge: Option<u32>) -> Option<Vec<u8>> {
        let (narrowed, scale) = (self.narrowed.as_ref()?, self.scale?);
        let (mut limit, pvm_edge, released) = (svm_edge?, self.pvm_edge?, self.released_edge?);
        if at_least(Some(limit), pvm_edge) {
            limit = pvm_edge;
        }
        let gain = limit.wrapping_sub(released).cast_signed();
        if gain <= 0 || (gain.cast_unsigned() < STEP_BYTES && limit != pvm_edge) {
            return None;
        }
        let window = window(limit, narrowed.segment.ack, scale);
        let opened = narrowed.segment.ack.wrapping_add(u32::from(window) << scale);
        if at_least(Some(released), opened) {
            return None;
        }
        let Segment { ack, .. } = narrowed.segment;
        let frame = narrowed.acknowledgment(narrowed.segment.seq_end(), ack, window);
        self.released_edge = Some(opened);
        if limit == pvm_edge {
            self.narrowed = None;
        }
        Some(frame)
    }

    /// An acknowledgment of less than the segment acknowledges, which waits: of what the SVM has too.
    pub(super) fn lowered(
        &mut self,
        ack: u32,
        svm_edge: Option<u32>,
        packet: &Packet,
        frame: &[u8],
    ) -> Option<Vec<u8>> {
        let Kind::Tcp { addresses, segment } = &packet.kind else {
            return None;
        };
        let (scale, mut limit) = (self.scale?, self.edge_of(segment)?);
        if let Some(svm_edge) = svm_edge
            && at_least(Some(limit), svm_edge)
        {
            limit = svm_edge;
        }
        if let Some(released) = self.released_edge
            && !at_least(Some(limit), released)
        {
            limit = released;
        }
        let window = window(limit, ack, scale);
        raise(&mut self.released_edge, edge(ack, window, scale));
        let waiting = Narrowed::of(packet, *addresses, segment, frame);
        Some(waiting.acknowledgment(segment.seq, ack, window))
    }
}

fn window(edge: u32, ack: u32, scale: u8) -> u16 {
    let bytes = edge.wrapping_sub(ack).cast_signed().max(0).cast_unsigned();
    u16::try_from(bytes >> scale).unwrap_or(u16::MAX)
}

impl Narrowed {
    fn of(packet: &Packet, addresses: Addresses, segment: &Segment, frame: &[u8]) -> Self {
        Self {
            head: frame[..segment.payload.start].to_vec(),
            network_at: packet.network_at,
            addresses,
            segment: segment.clone(),
        }
    }

    /// The same segment with other numbers and without its data.
    fn acknowledgment(&self, seq: u32, ack: u32, window: u16) -> Vec<u8> {
        let mut frame = self.head.clone();
        let (ip, tcp) = (self.network_at, self.segment.at);
        let data_bytes = self.segment.payload.len() as u16;
        if frame[ip] >> 4 == 4 {
            let total = u16::from_be_bytes([frame[ip + 2], frame[ip + 3]]) - data_bytes;
            checksum::replace(&mut frame, ip + 10, ip, ip + 2, &total.to_be_bytes());
        } else {
            let payload = u16::from_be_bytes([frame[ip + 4], frame[ip + 5]]) - data_bytes;
            frame[ip + 4..ip + 6].copy_from_slice(&payload.to_be_bytes());
        }
        frame[tcp + SEQ_AT..tcp + SEQ_AT + 4].copy_from_slice(&seq.to_be_bytes());
        frame[tcp + ACK_AT..tcp + ACK_AT + 4].copy_from_slice(&ack.to_be_bytes());
        frame[tcp + 13] = Flags::ACK as u8;
        frame[tcp + WINDOW_AT..tcp + WINDOW_AT + 2].copy_from_slice(&window.to_be_bytes());
        frame[tcp + CHECKSUM_AT..tcp + CHECKSUM_AT + 2].fill(0);
        let sum = checksum::of_tcp(&self.addresses, &frame[tcp..]);
        frame[tcp + CHECKSUM_AT..tcp + CHECKSUM_AT + 2].copy_from_slice(&sum.to_be_bytes());
        frame
    }
}
