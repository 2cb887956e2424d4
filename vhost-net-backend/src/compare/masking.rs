//! A masked flow: what of its packets is compared.
//!
//! The masked bytes of both VMs' packets become the same ones in copies, and these are compared instead. Each VM's TCP
//! stream is followed in order. What comes again stays as it is: of each byte the first copy is the one that is
//! compared. What comes too early is taken for a new beginning, and may cost a checkpoint.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::stream::Anchor;
use crate::packet::{Flags, Kind, Packet, Segment};
use crate::policy::{Cursor, Mask};

/// Which VM sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Pvm,
    Svm,
}

/// The masks of one flow.
#[derive(Debug)]
pub(super) struct Masking {
    mask: Arc<Mask>,
    pvm: Stream,
    svm: Stream,
}

/// What is masked of a packet: ranges of the frame.
type Masked = SmallVec<[Range<usize>; 4]>;

/// One VM's stream.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    isn: Option<u32>,
    anchor: Anchor,
    /// Position of the first byte, if the connection has been seen to begin.
    start: Option<u64>,
    /// Up to where it has been followed.
    followed: Option<u64>,
    cursor: Cursor,
}

impl Masking {
    pub(super) fn new(mask: Arc<Mask>) -> Self {
        Self { mask, pvm: Stream::default(), svm: Stream::default() }
    }

    /// What is compared instead of the frame, if that is not the frame itself.
    pub(super) fn masked(&mut self, sender: Sender, packet: &Packet, frame: &[u8]) -> Option<Box<[u8]>> {
        let ranges = match &packet.kind {
            Kind::Tcp { segment, .. } => {
                let stream = match sender {
                    Sender::Pvm => &mut self.pvm,
                    Sender::Svm => &mut self.svm,
                };
                stream.follow(&self.mask, segment, frame)
            }
            Kind::Datagram { content, .. } => {
                let mut ranges = Masked::new();
                self.mask.cover(&mut Cursor::default(), Some(0), &frame[content.clone()], |range| {
                    ranges.push(content.start + range.start..content.start + range.end);
                });
                ranges
            }
            Kind::Arp | Kind::Opaque => return None,
        };
        if ranges.is_empty() {
            return None;
        }
        let mut masked: Box<[u8]> = frame.into();
        ranges.into_iter().for_each(|range| masked[range].fill(self.mask.fill()));
        Some(masked)
    }

    /// A checkpoint was committed: the SVM is what the PVM is.
    pub(super) fn commit(&mut self) {
        self.svm = self.pvm;
    }
}

impl Stream {
    fn follow(&mut self, mask: &Mask, segment: &Segment, frame: &[u8]) -> Masked {
        let mut ranges = Masked::new();
        let syn = segment.flags.has(Flags::SYN);
        if segment.flags.has(Flags::RST) {
            return ranges;
        }
        if syn && self.isn != Some(segment.seq) {
            let mut anchor = Anchor::at(segment.seq);
            let start = anchor.place(segment.seq) + 1;
            let (isn, start) = (Some(segment.seq), Some(start));
            *self = Self { isn, anchor, start, followed: start, ..Self::default() };
        }
        let data = &frame[segment.payload.clone()];
        if data.is_empty() {
            return ranges;
        }
        let from = self.anchor.place(segment.seq) + u64::from(syn);
        let to = from + data.len() as u64;
        let followed = self.followed.unwrap_or(from);
        if to <= followed {
            return ranges;
        }
        if from > followed {
            self.cursor = Cursor::default();
        }
        let next = from.max(followed);
        let known = (next - from) as usize;
        let at = self.start.map(|start| next.saturating_sub(start));
        let first = segment.payload.start + known;
        mask.cover(&mut self.cursor, at, &data[known..], |range| {
            ranges.push(first + range.start..first + range.end);
        });
        self.followed = Some(to);
        self.anchor.advance(to);
        ranges
    }
}
