//! The PVM's packets that may not leave yet. Each is in several lists: of all, in the order in which the PVM sent them;
//! of its flow; and of those whose time will come. Whatever leaves, leaves all of them at once.

use slab::Slab;

use super::flows::FlowId;
use super::output::Output;
use crate::packet::Packet;

/// A packet's place.
pub(super) type HeldId = u32;
const NONE: HeldId = HeldId::MAX;

/// Which of a packet's links a list goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chain {
    /// Of all packets.
    All,
    /// Of its flow's packets.
    Flow,
    /// Of those that have the same patience.
    Due,
}

const CHAINS: usize = 3;

#[derive(Clone, Copy, Debug)]
struct Link {
    before: HeldId,
    behind: HeldId,
}

const UNLINKED: Link = Link { before: NONE, behind: NONE };

/// A packet that waits.
#[derive(Debug)]
pub(super) struct HeldPacket {
    pub(super) flow: FlowId,
    pub(super) packet: Packet,
    /// None when it leaves.
    frame: Option<Output>,
    /// What is compared instead of the frame.
    masked: Option<Box<[u8]>>,
    pub(super) since_us: u64,
    /// When it has waited too long, if it is in a list of those that may.
    pub(super) due_us: u64,
    /// Which of these lists, if any.
    pub(super) due: Option<usize>,
    /// It is in its flow's second list.
    pub(super) aside: bool,
    /// Its place in the order of everything that the PVM sent.
    pub(super) order: u64,
    links: [Link; CHAINS],
}

impl HeldPacket {
    /// What the PVM sent.
    #[inline]
    pub(super) fn frame(&self) -> &[u8] {
        self.frame.as_deref().unwrap_or_default()
    }

    /// The frame, but for what a mask covers.
    #[inline]
    pub(super) fn compared(&self) -> &[u8] {
        self.masked.as_deref().unwrap_or_else(|| self.frame())
    }

    #[inline]
    fn bytes(&self) -> usize {
        self.frame.as_ref().map_or(0, Output::cost) + self.masked.as_ref().map_or(0, |masked| masked.len())
    }
}

/// A doubly linked list of held packets.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    chain: Chain,
    first: HeldId,
    last: HeldId,
}

impl List {
    pub(super) const fn of(chain: Chain) -> Self {
        Self { chain, first: NONE, last: NONE }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first == NONE
    }

    #[inline]
    pub(super) fn first(&self) -> Option<HeldId> {
        (self.first != NONE).then_some(self.first)
    }

    pub(super) fn last(&self) -> Option<HeldId> {
        (self.last != NONE).then_some(self.last)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::of(self.chain);
    }
}

/// All packets that wait.
#[derive(Debug)]
pub(super) struct HeldPackets {
    packets: Slab<HeldPacket>,
    all: List,
    sent: u64,
    bytes: usize,
    bytes_peak: usize,
}

impl HeldPackets {
    pub(super) fn new() -> Self {
        Self { packets: Slab::new(), all: List::of(Chain::All), sent: 0, bytes: 0, bytes_peak: 0 }
    }

    pub(super) fn count(&self) -> usize {
        self.packets.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn bytes_peak(&self) -> usize {
        self.bytes_peak
    }

    /// Adds one behind all others. It is in no other list yet.
    #[inline]
    pub(super) fn push(&mut self, flow: FlowId, packet: Packet, frame: Output, now_us: u64) -> HeldId {
        self.bytes += frame.cost();
        self.bytes_peak = self.bytes_peak.max(self.bytes);
        let id = self.packets.insert(HeldPacket {
            flow,
            packet,
            frame: Some(frame),
            masked: None,
            since_us: now_us,
            due_us: 0,
            due: None,
            aside: false,
            order: self.sent,
            links: [UNLINKED; CHAINS],
        }) as HeldId;
        self.sent += 1;
        let mut all = self.all;
        self.append(&mut all, id);
        self.all = all;
        id
    }

    /// The packet is compared as `masked`.
    pub(super) fn mask(&mut self, id: HeldId, masked: Box<[u8]>) {
        self.bytes += masked.len();
        self.bytes_peak = self.bytes_peak.max(self.bytes);
        self.get_mut(id).masked = Some(masked);
    }

    /// # Panics
    /// When it is not there: a list would be broken.
    #[inline]
    pub(super) fn get(&self, id: HeldId) -> &HeldPacket {
        &self.packets[id as usize]
    }

    #[inline]
    pub(super) fn get_mut(&mut self, id: HeldId) -> &mut HeldPacket {
        &mut self.packets[id as usize]
    }

    pub(super) fn oldest(&self) -> Option<HeldId> {
        self.all.first()
    }

    /// The one behind in the list of the chain.
    #[inline]
    pub(super) fn next(&self, chain: Chain, id: HeldId) -> Option<HeldId> {
        let behind = self.get(id).links[chain as usize].behind;
        (behind != NONE).then_some(behind)
    }

    /// Those behind in the list of the chain, in order.
    pub(super) fn behind(&self, chain: Chain, id: HeldId) -> impl Iterator<Item = &HeldPacket> + Clone {
        std::iter::successors(self.next(chain, id), move |id| self.next(chain, *id)).map(|id| self.get(id))
    }

    /// The one before in the list of the chain.
    pub(super) fn previous(&self, chain: Chain, id: HeldId) -> Option<HeldId> {
        let before = self.get(id).links[chain as usize].before;
        (before != NONE).then_some(before)
    }

    /// Puts a packet that is in no list of this chain at the end of one.
    #[inline]
    pub(super) fn append(&mut self, list: &mut List, id: HeldId) {
        self.insert_behind(list, list.last(), id);
    }

    /// Puts a packet that is in no list of this chain behind another; first, if there is none.
    #[inline]
    pub(super) fn insert_behind(&mut self, list: &mut List, before: Option<HeldId>, id: HeldId) {
        let chain = list.chain as usize;
        let behind = match before {
            Some(before) => std::mem::replace(&mut self.get_mut(before).links[chain].behind, id),
            None => std::mem::replace(&mut list.first, id),
        };
        match behind {
            NONE => list.last = id,
            behind => self.get_mut(behind).links[chain].before = id,
        }
        self.get_mut(id).links[chain] = Link { before: before.unwrap_or(NONE), behind };
    }

    /// Takes a packet out of a list that it is in.
    #[inline]
    pub(super) fn unlink(&mut self, list: &mut List, id: HeldId) {
        let chain = list.chain as usize;
        let Link { before, behind } = std::mem::replace(&mut self.get_mut(id).links[chain], UNLINKED);
        match before {
            NONE => list.first = behind,
            before => self.get_mut(before).links[chain].behind = behind,
        }
        match behind {
            NONE => list.last = before,
            behind => self.get_mut(behind).links[chain].before = before,
        }
    }

    /// The frame of a packet that leaves, which is to be [forgotten](Self::forget) then.
    #[inline]
    pub(super) fn take_frame(&mut self, id: HeldId) -> Option<Output> {
        let held = self.get_mut(id);
        let bytes = held.bytes();
        held.masked = None;
        let frame = held.frame.take();
        self.bytes -= bytes;
        frame
    }

    /// Takes one out whose frame has been taken, and that is in no other list any more.
    #[inline]
    pub(super) fn forget(&mut self, id: HeldId) {
        let mut all = self.all;
        self.unlink(&mut all, id);
        self.all = all;
        self.packets.remove(id as usize);
    }
}
