//! The secondary's end: what the SVM sends goes to the primary whole, or as a digest.
//!
//! Long TCP segments with new data are told by their digests, several in a message. Everything else goes whole, and
//! never before a digest of the same flow that came first. What was told by a digest is kept until the client has
//! acknowledged it, and sent when the primary asks: where the PVM cuts its stream otherwise, or says something else.

use colo::link::HEADER_BYTES;
use serde::Serialize;

use super::key::Key;
use super::message::{Ask, Message, Piece};
use super::sent::{Sent, Slots, is_behind};
use crate::packet::{Flags, FlowKey, Kind, Packet, Segment};
use crate::policy::Policy;
use crate::proxy::Actions;
use crate::wire::{ANSWER, DIGEST, FLOW_BYTES, OUTPUT, flow_to_bytes};

/// Shorter segments go whole: they are answers that somebody waits for, and little is gained.
const DIGESTED_BYTES_MIN: usize = 256;
/// Figures of the secondary's end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SenderStats {
    /// Bytes of the frames that the SVM sent.
    pub output_bytes: u64,
    /// Bytes on the link for them, headers of its frames included.
    pub link_bytes: u64,
    /// Segments of which a digest was sent.
    pub digests: u64,
    /// Messages that the primary asked with.
    pub asked: u64,
    /// Frames that were sent for that.
    pub answered: u64,
    /// Bytes of frames that are kept because they may be asked for.
    pub kept_bytes: usize,
}

/// The secondary's end.
#[derive(Debug)]
pub struct Sender {
    key: Box<Key>,
    policy: Policy,
    slots: Slots,
    message: Message,
    /// Counts messages, from 1.
    number: u64,
    stats: SenderStats,
}

impl Sender {
    /// With the key that the primary has named. Flows that are not compared byte for byte go whole.
    pub fn new(key: Box<Key>, policy: Policy) -> Self {
        Self {
            key,
            policy,
            slots: Slots::default(),
            message: Message::default(),
            number: 1,
            stats: SenderStats::default(),
        }
    }

    /// Sends a frame of the SVM, in the PVM's sequence numbers. [`Sender::flush`] sends what waits for more of its kind.
    pub fn send(&mut self, frame: &[u8], epoch: u64, actions: &mut Actions) {
        self.stats.output_bytes += frame.len() as u64;
        let packet = Packet::parse(frame);
        if let Kind::Tcp { segment, .. } = &packet.kind {
            let flow = packet.flow_from_guest(frame);
            let slot = self.slots.find(&flow);
            if is_digested(segment)
                && let Some(slot) = slot.or_else(|| self.slot_for(&flow))
                && self.send_digest(slot, &flow, segment, frame, actions)
            {
                if self.message.is_full() {
                    self.flush(epoch, actions);
                }
                return;
            }
            if let Some(slot) = slot {
                if self.slots.get(slot).message == self.number {
                    self.flush(epoch, actions);
                }
                if segment.flags.0 & (Flags::SYN | Flags::RST) != 0 {
                    self.slots.forget(slot, actions.pool());
                } else {
                    self.slots.get(slot).reaches(segment.seq_end());
                }
            }
        }
        self.push(OUTPUT, epoch, frame, actions);
    }

    fn slot_for(&mut self, flow: &FlowKey) -> Option<usize> {
        if self.policy.compares(flow) { self.slots.give(flow) } else { None }
    }

    /// Tells a segment by its digest, if it is new and can be kept.
    fn send_digest(
        &mut self,
        number: usize,
        flow: &FlowKey,
        segment: &Segment,
        frame: &[u8],
        actions: &mut Actions,
    ) -> bool {
        let (data, has_room) = (&frame[segment.payload.clone()], self.slots.has_room(frame.len()));
        let Ok(bytes) = u16::try_from(data.len()) else {
            return false;
        };
        let end = segment.seq_end();
        let slot = self.slots.get(number);
        // what is sent again has been lost: the client, and so the PVM, waits for it
        let again = slot.next.is_some_and(|next| is_behind(next, segment.seq));
        slot.reaches(end);
        if slot.goes_whole(data.len()) || again || !has_room {
            return false;
        }
        let name: Option<[u8; FLOW_BYTES]> = if slot.named { None } else { flow_to_bytes(flow) };
        (slot.named, slot.message) = (true, self.number);
        let digest = self.key.digest(segment.seq, data);
        let piece = Piece { seq: segment.seq, bytes, digest, ack: segment.ack, window: segment.window };
        self.message.push(number, name.as_ref(), &piece);
        self.slots.keep(number, Sent { seq: segment.seq, end, frame: actions.pool().copy_of(frame) });
        self.stats.digests += 1;
        true
    }

    /// Sends the digests that wait for more. For the end of a batch.
    pub fn flush(&mut self, epoch: u64, actions: &mut Actions) {
        if self.message.bytes().is_empty() {
            return;
        }
        let mut message = std::mem::take(&mut self.message);
        self.push(DIGEST, epoch, message.bytes(), actions);
        message.clear();
        self.message = message;
        self.number += 1;
    }

    fn push(&mut self, kind: u16, epoch: u64, payload: &[u8], actions: &mut Actions) {
        self.stats.link_bytes += (payload.len() + HEADER_BYTES) as u64;
        actions.push_to_peer(kind, epoch, payload);
    }

    /// A client has sent this frame, which is in the PVM's sequence numbers: what it acknowledges nobody asks for.
    pub fn client_says(&mut self, frame: &[u8], actions: &mut Actions) {
        if self.slots.sent_bytes() == 0 {
            return;
        }
        let packet = Packet::parse(frame);
        if let (Kind::Tcp { segment, .. }, Some(flow)) = (&packet.kind, packet.tcp_flow_to_guest())
            && segment.flags.has(Flags::ACK)
            && let Some(slot) = self.slots.find(&flow)
        {
            self.slots.acknowledged(slot, segment.ack, actions.pool());
        }
    }

    /// The primary needs the bytes of a range. Each frame is sent once.
    pub fn answer(&mut self, ask: &Ask, epoch: u64, actions: &mut Actions) {
        self.stats.asked += 1;
        let Some(number) = self.slots.find(&ask.flow) else {
            return;
        };
        self.slots.get(number).was_asked_for();
        let stats = &mut self.stats;
        self.slots.take_range(number, ask.seq, ask.bytes, |sent| {
            stats.answered += 1;
            stats.link_bytes += (sent.frame.len() + HEADER_BYTES) as u64;
            actions.push_to_peer(ANSWER, epoch, &sent.frame);
            actions.pool().give(sent.frame);
        });
    }

    /// Forgets all that was sent: another epoch begins, or this side goes on alone.
    pub fn forget(&mut self, actions: &mut Actions) {
        self.message.clear();
        self.slots.clear(actions.pool());
    }

    /// The figures.
    pub fn stats(&self) -> SenderStats {
        SenderStats { kept_bytes: self.slots.sent_bytes(), ..self.stats.clone() }
    }
}

/// Whether a segment says nothing but data and an acknowledgment, and enough of it.
fn is_digested(segment: &Segment) -> bool {
    let events = Flags::SYN | Flags::FIN | Flags::RST | Flags::URG;
    segment.payload.len() >= DIGESTED_BYTES_MIN
        && segment.flags.has(Flags::ACK)
        && segment.flags.0 & events == 0
}
