//! What the proxy wants done: a list that the caller owns, so that one allocation serves for ever.

use std::ops::Range;

use serde::Serialize;

use super::buffer::{Buffer, Pool};
use crate::offload::FrameHeader;

/// One thing to do, in the order in which the list gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Send this frame to the LAN.
    ToLan(&'a Buffer),
    /// Give this frame to the guest.
    ToGuest(&'a Buffer),
    /// Send a frame to the peer's net back end.
    ToPeer {
        /// Its kind, of [`crate::wire`].
        kind: u16,
        /// The epoch that it belongs to.
        epoch: u64,
        /// What it carries.
        payload: &'a [u8],
    },
    /// Ask the controller for a checkpoint.
    CheckpointWanted {
        /// Why.
        cause: Cause,
        /// Which flow, and what it waits for.
        detail: &'a str,
    },
    /// Tell the controller that the peer's marker is here. Take nothing more from the link until the commit.
    MarkerArrived {
        /// The epoch that ends there.
        epoch: u64,
    },
}

/// Why a checkpoint is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The two VMs said different things.
    Mismatch,
    /// A packet of the PVM waited too long for the SVM to say the same.
    HeldTooLong,
    /// More packets of the PVM are held than may be.
    HeldBytes,
    /// More of the SVM's output waits for the PVM than may be kept.
    Buffer,
}

impl Cause {
    /// The word for it on the control socket.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mismatch => "mismatch",
            Self::HeldTooLong => "held-too-long",
            Self::HeldBytes => "held-bytes",
            Self::Buffer => "buffer",
        }
    }
}

#[derive(Debug)]
enum Entry {
    ToLan(Buffer),
    ToGuest(Buffer),
    ToPeer { kind: u16, epoch: u64, payload: Range<usize> },
    CheckpointWanted { cause: Cause, detail: String },
    MarkerArrived { epoch: u64 },
}

/// A list of [`Action`]s. The proxy appends, the caller carries out and clears.
#[derive(Debug, Default)]
pub struct Actions {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    pool: Pool,
}

impl Actions {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the list and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        for entry in self.entries.drain(..) {
            if let Entry::ToLan(frame) | Entry::ToGuest(frame) = entry {
                self.pool.give(frame);
            }
        }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The actions in order.
    pub fn iter(&self) -> impl Iterator<Item = Action<'_>> {
        self.entries.iter().map(|entry| match entry {
            Entry::ToLan(frame) => Action::ToLan(frame),
            Entry::ToGuest(frame) => Action::ToGuest(frame),
            Entry::ToPeer { kind, epoch, payload } => {
                Action::ToPeer { kind: *kind, epoch: *epoch, payload: &self.bytes[payload.clone()] }
            }
            Entry::CheckpointWanted { cause, detail } => Action::CheckpointWanted { cause: *cause, detail },
            Entry::MarkerArrived { epoch } => Action::MarkerArrived { epoch: *epoch },
        })
    }

    /// Only the frames for the LAN, in order, with what travels with them.
    pub fn to_lan(&self) -> impl Iterator<Item = &Buffer> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::ToLan(frame) => Some(frame),
            _ => None,
        })
    }

    fn keep(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    /// Memory for frames; what goes to the LAN or the guest comes back here.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Adds a frame for the LAN.
    pub fn push_to_lan(&mut self, frame: Buffer) {
        self.entries.push(Entry::ToLan(frame));
    }

    /// Adds a copy of a frame for the LAN; what is returned may still be changed.
    pub fn push_copy_to_lan(&mut self, header: FrameHeader, frame: &[u8]) -> &mut [u8] {
        let frame = self.copy_of(header, frame);
        self.push(Entry::ToLan(frame))
    }

    fn copy_of(&mut self, header: FrameHeader, frame: &[u8]) -> Buffer {
        let mut frame = self.pool.copy_of(frame);
        frame.set_header(header);
        frame
    }

    fn push(&mut self, entry: Entry) -> &mut [u8] {
        self.entries.push(entry);
        match self.entries.last_mut() {
            Some(Entry::ToLan(frame) | Entry::ToGuest(frame)) => frame,
            _ => &mut [],
        }
    }

    /// Adds a frame for the guest; what is returned may still be changed.
    pub fn push_to_guest(&mut self, header: FrameHeader, frame: &[u8]) -> &mut [u8] {
        let frame = self.copy_of(header, frame);
        self.push(Entry::ToGuest(frame))
    }

    /// Adds a frame for the peer; what is returned may still be changed.
    pub fn push_to_peer(&mut self, kind: u16, epoch: u64, payload: &[u8]) -> &mut [u8] {
        let range = self.keep(payload);
        self.entries.push(Entry::ToPeer { kind, epoch, payload: range.clone() });
        &mut self.bytes[range]
    }

    /// Adds a frame for the peer, behind its header, of a kind that says so.
    pub fn push_headed_to_peer(&mut self, kind: u16, epoch: u64, header: FrameHeader, frame: &[u8]) {
        let start = self.keep(header.bytes()).start;
        let payload = start..self.keep(frame).end;
        self.entries.push(Entry::ToPeer { kind, epoch, payload });
    }

    /// Adds a wish for a checkpoint.
    pub fn push_checkpoint_wanted(&mut self, cause: Cause, detail: String) {
        self.entries.push(Entry::CheckpointWanted { cause, detail });
    }

    /// Adds the news that a marker is here.
    pub fn push_marker_arrived(&mut self, epoch: u64) {
        self.entries.push(Entry::MarkerArrived { epoch });
    }
}
