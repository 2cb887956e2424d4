//! How digests travel. All numbers are big-endian; docs/link-protocol.md has the tables.

use super::key::{Key, PRIME};
use crate::packet::FlowKey;
use crate::wire::{ASK, DIGEST, FLOW_BYTES, KEY, WireError, flow_from_bytes, flow_to_bytes};

/// Flows that have a number at once.
pub(super) const SLOTS_MAX: usize = 4096;
/// A [`DIGEST`] message is no longer, in bytes.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 10;

/// Bytes of a run without its flow and its pieces.
const RUN_BYTES: usize = 16;
/// Bytes of a piece: length and digest.
const PIECE_BYTES: usize = 10;
/// With the number of a flow: its name follows.
const NAMED: u16 = 1 << 15;

/// Bytes of an [`Ask`].
const ASK_BYTES: usize = FLOW_BYTES + 8;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The payload of a [`KEY`] message.
pub(crate) fn key_to_bytes(key: &Key) -> [u8; 8] {
    key.number().to_be_bytes()
}

/// Reads what [`key_to_bytes`] wrote.
pub(crate) fn key_from_bytes(payload: &[u8]) -> Result<Box<Key>, WireError> {
    let bytes = payload.try_into().map_err(|_| WireError::Length { kind: KEY, bytes: payload.len() })?;
    Key::new(u64::from_be_bytes(bytes)).ok_or(WireError::Malformed { kind: KEY })
}

/// A wish for bytes instead of a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whose; a TCP flow.
    pub flow: FlowKey,
    /// Where the range begins, in the PVM's sequence numbers.
    pub seq: u32,
    /// How long it is.
    pub bytes: u32,
}

impl Ask {
    /// Bytes for the wire; `None` when the flow is not a TCP flow.
    pub(crate) fn to_bytes(self) -> Option<[u8; ASK_BYTES]> {
        let mut bytes = [0; ASK_BYTES];
        bytes[..FLOW_BYTES].copy_from_slice(&flow_to_bytes(&self.flow)?);
        bytes[44..48].copy_from_slice(&self.seq.to_be_bytes());
        bytes[48..52].copy_from_slice(&self.bytes.to_be_bytes());
        Some(bytes)
    }

    /// Reads what [`Ask::to_bytes`] wrote.
    pub(crate) fn from_bytes(payload: &[u8]) -> Result<Self, WireError> {
        let Ok(bytes) = <&[u8; ASK_BYTES]>::try_from(payload) else {
            return Err(WireError::Length { kind: ASK, bytes: payload.len() });
        };
        let flow = bytes.first_chunk().and_then(flow_from_bytes).ok_or(WireError::Malformed { kind: ASK })?;
        Ok(Self { flow, seq: be32(bytes, 44), bytes: be32(bytes, 48) })
    }
}

/// Consecutive segments of one flow, of which each is a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// The number that the flow has.
    pub slot: usize,
    /// The flow's name, if it has got the number just now.
    pub flow: Option<FlowKey>,
    /// Where the first piece begins, in the PVM's sequence numbers.
    pub seq: u32,
    /// The acknowledgment number of the last one.
    pub ack: u32,
    /// The window of the last one, unscaled.
    pub window: u16,
    pieces: &'a [[u8; PIECE_BYTES]],
}

impl Run<'_> {
    /// Length and digest of each piece.
    pub fn pieces(&self) -> impl Iterator<Item = (u16, u64)> {
        self.pieces
            .iter()
            .map(|[a, b, digest @ ..]| (u16::from_be_bytes([*a, *b]), u64::from_be_bytes(*digest)))
    }
}

/// The runs of a [`DIGEST`] message.
#[derive(Clone, Debug)]
pub struct Runs<'a>(&'a [u8]);

impl<'a> Runs<'a> {
    /// Of a message's payload.
    ///
    /// # Errors
    /// It is too long, or not made of whole runs with numbers that can be.
    pub fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        if payload.is_empty() || payload.len() > MESSAGE_BYTES_MAX {
            return Err(WireError::Length { kind: DIGEST, bytes: payload.len() });
        }
        let mut left = payload;
        while !left.is_empty() {
            let (run, rest) = split_run(left).ok_or(WireError::Malformed { kind: DIGEST })?;
            if run.pieces.is_empty() || run.pieces().any(|(bytes, digest)| bytes == 0 || digest >= PRIME) {
                return Err(WireError::Malformed { kind: DIGEST });
            }
            left = rest;
        }
        Ok(Self(payload))
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        let (run, rest) = split_run(self.0)?;
        self.0 = rest;
        Some(run)
    }
}

/// The first run, and what is behind it.
fn split_run(bytes: &[u8]) -> Option<(Run<'_>, &[u8])> {
    let (head, mut rest) = bytes.split_first_chunk::<RUN_BYTES>()?;
    let slot = usize::from(be16(head, 0) & !NAMED);
    if slot >= SLOTS_MAX || be16(head, 14) != 0 {
        return None;
    }
    let mut flow = None;
    if be16(head, 0) & NAMED != 0 {
        let (name, behind) = rest.split_first_chunk()?;
        flow = Some(flow_from_bytes(name)?);
        rest = behind;
    }
    let (pieces, rest) = rest.split_at_checked(usize::from(be16(head, 2)) * PIECE_BYTES)?;
    let (pieces, _) = pieces.as_chunks();
    let (seq, ack, window) = (be32(head, 4), be32(head, 8), be16(head, 12));
    Some((Run { slot, flow, seq, ack, window, pieces }, rest))
}

/// A [`DIGEST`] message that grows.
#[derive(Debug, Default)]
pub(super) struct Message {
    bytes: Vec<u8>,
    /// Where the last run begins, and what it is.
    last: Option<(usize, Open)>,
}

/// A run that may grow.
#[derive(Clone, Copy, Debug)]
struct Open {
    slot: usize,
    next: u32,
    ack: u32,
}

/// What a message tells of a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) seq: u32,
    pub(super) bytes: u16,
    pub(super) digest: u64,
    pub(super) ack: u32,
    pub(super) window: u16,
}

impl Message {
    /// The payload.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.last = None;
    }

    /// Whether there may be no room for another piece.
    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() + RUN_BYTES + FLOW_BYTES + PIECE_BYTES > MESSAGE_BYTES_MAX
    }

    /// Adds a piece of the flow with this number. `name` is for the first one only.
    pub(super) fn push(&mut self, slot: usize, name: Option<&[u8; FLOW_BYTES]>, piece: &Piece) {
        let follows = |open: &Open| {
            // an acknowledgment that goes back must not take the place of the higher one
            open.slot == slot && open.next == piece.seq && piece.ack.wrapping_sub(open.ack).cast_signed() >= 0
        };
        let at = match &self.last {
            Some((at, open)) if name.is_none() && follows(open) => *at,
            _ => {
                let at = self.bytes.len();
                let named = if name.is_some() { NAMED } else { 0 };
                self.bytes.extend((slot as u16 | named).to_be_bytes());
                self.bytes.extend(0u16.to_be_bytes());
                self.bytes.extend(piece.seq.to_be_bytes());
                self.bytes.extend([0; RUN_BYTES - 8]);
                self.bytes.extend(name.into_iter().flatten());
                at
            }
        };
        self.bytes.extend(piece.bytes.to_be_bytes());
        self.bytes.extend(piece.digest.to_be_bytes());
        let head = &mut self.bytes[at..at + RUN_BYTES];
        let count = be16(head, 2) + 1;
        head[2..4].copy_from_slice(&count.to_be_bytes());
        head[8..12].copy_from_slice(&piece.ack.to_be_bytes());
        head[12..14].copy_from_slice(&piece.window.to_be_bytes());
        let next = piece.seq.wrapping_add(piece.bytes.into());
        self.last = Some((at, Open { slot, next, ack: piece.ack }));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Packet, Vlan};
    use crate::test_frames::Tcp;

    fn flow() -> FlowKey {
        let frame = Tcp { v6: true, ..Tcp::default() }.frame();
        Packet::parse(&frame).flow_from_guest(&frame)
    }

    fn piece(seq: u32, ack: u32) -> Piece {
        Piece { seq, bytes: 100, digest: 1 << 60 | u64::from(seq), ack, window: ack as u16 }
    }

    #[test]
    fn segments_that_follow_on_each_other_are_one_run() {
        let name = flow_to_bytes(&flow()).unwrap();
        let mut message = Message::default();
        for (slot, name, piece) in [
            (7, Some(&name), piece(u32::MAX - 99, 5)),
            (7, None, piece(0, 5)),
            (7, None, piece(100, 8)),
            // an acknowledgment that goes back, a gap, another flow, and a flow that has the number now
            (7, None, piece(200, 7)),
            (7, None, piece(1000, 7)),
            (8, None, piece(1100, 7)),
            (8, Some(&name), piece(1200, 7)),
        ] {
            message.push(slot, name, &piece);
        }
        let runs: Vec<_> = Runs::parse(message.bytes()).unwrap().collect();
        let told: Vec<_> = runs
            .iter()
            .map(|run| (run.slot, run.flow.is_some(), run.seq, run.ack, run.window, run.pieces().count()))
            .collect();
        assert_eq!(
            told,
            [
                (7, true, u32::MAX - 99, 8, 8, 3),
                (7, false, 200, 7, 7, 1),
                (7, false, 1000, 7, 7, 1),
                (8, false, 1100, 7, 7, 1),
                (8, true, 1200, 7, 7, 1),
            ]
        );
        assert_eq!(runs[0].flow, Some(flow()));
        assert_eq!(runs[0].pieces().nth(2), Some((100, 1 << 60 | 100)));
    }

    #[test]
    fn what_cannot_be_is_malformed() {
        let name = flow_to_bytes(&flow()).unwrap();
        let mut message = Message::default();
        message.push(4095, Some(&name), &piece(1, 2));
        let good = message.bytes();
        assert!(Runs::parse(good).is_ok());
        let with = |at: usize, byte: u8| {
            let mut bad = good.to_vec();
            bad[at] = byte;
            Runs::parse(&bad).is_err()
        };
        // the number, the pieces, the reserved bytes, the name, the length, the digest
        for (at, byte) in [(0, 0x9f), (3, 0), (3, 2), (15, 1), (16, 4), (61, 0), (62, 0xff)] {
            assert!(with(at, byte), "{at}");
        }
        assert!(Runs::parse(&[]).is_err());
        assert!(Runs::parse(&good[..good.len() - 1]).is_err());
        assert!(Runs::parse(&good.repeat(MESSAGE_BYTES_MAX / good.len() + 1)).is_err());
        assert_eq!(key_from_bytes(&7u64.to_be_bytes()).unwrap().number(), 7);
        assert!(key_from_bytes(&[0; 8]).is_err() && key_from_bytes(&[1; 9]).is_err());
        let other = FlowKey::Frame { vlan: Vlan::default(), ethertype: 1, source: [0; 6] };
        assert_eq!(Ask { flow: other, seq: 0, bytes: 0 }.to_bytes(), None);
    }

    #[test]
    fn a_full_message_is_not_too_long() {
        let name = flow_to_bytes(&flow()).unwrap();
        let mut message = Message::default();
        while !message.is_full() {
            message.push(1, Some(&name), &piece(1, 2));
        }
        assert!(Runs::parse(message.bytes()).is_ok());
        message.clear();
        while !message.is_full() {
            let follows = message.last.map_or(1, |(_, open)| open.next);
            message.push(1, None, &piece(follows, 2));
        }
        assert_eq!(Runs::parse(message.bytes()).unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn an_ask_survives_the_wire(seq in any::<u32>(), bytes in any::<u32>()) {
            let ask = Ask { flow: flow(), seq, bytes };
            prop_assert_eq!(Ask::from_bytes(&ask.to_bytes().unwrap()), Ok(ask));
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..200),
        ) {
            let _ = key_from_bytes(&bytes);
            let _ = key_from_bytes(&bytes[..bytes.len().min(8)]);
            let _ = Ask::from_bytes(&bytes);
            let _ = Ask::from_bytes(&bytes[..bytes.len().min(ASK_BYTES)]);
            if let Ok(runs) = Runs::parse(&bytes) {
                prop_assert!(runs.flat_map(|run| run.pieces().collect::<Vec<_>>()).count() > 0);
            }
        }
    }
}
