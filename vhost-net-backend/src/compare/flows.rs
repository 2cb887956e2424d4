//! The table of flows. An entry that holds packets, or what the SVM said, is never dropped; others age.

use std::ops::{Index, IndexMut};

use hashbrown::HashTable;
use slab::Slab;

use super::datagrams::Messages;
use super::held::{Chain, List};
use super::masking::Masking;
use super::tcp::TcpFlow;
use crate::packet::{FlowKey, FlowName, PackedKey};
use crate::policy::{Policy, Treatment};

/// RFC 5382 §5: an established connection is remembered for at least 2 hours 4 minutes without a packet.
const TCP_IDLE_US: u64 = 124 * 60 * 1_000_000;
/// RFC 5382 §5: one that has been closed, 4 minutes.
const TCP_CLOSED_US: u64 = 4 * 60 * 1_000_000;
/// Other flows remember nothing over a commit.
const OTHER_IDLE_US: u64 = 60 * 1_000_000;
/// Entries that one visit looks at.
const VISITED_AT_ONCE: usize = 32;
/// Flows of an epoch that are remembered before those that are there twice are looked for.
const TOUCHED_MIN: usize = 1024;
/// The table has places for as many flows from the beginning, since to grow takes long when it is large.
const PLACES_MAX: usize = 1 << 16;

/// A flow's place in the table. It is another flow's when the flow has been dropped.
pub(super) type FlowId = u32;

#[derive(Debug)]
pub(super) enum Protocol {
    Tcp(TcpFlow),
    Messages(Messages),
}

/// How a flow is treated, and what is needed for it.
#[derive(Debug)]
pub(super) enum Treated {
    Compare,
    Bypass,
    Checkpoint,
    Mask(Box<Masking>),
}

impl From<Treatment> for Treated {
    fn from(treatment: Treatment) -> Self {
        match treatment {
            Treatment::Compare => Self::Compare,
            Treatment::Bypass => Self::Bypass,
            Treatment::Checkpoint => Self::Checkpoint,
            Treatment::Mask(mask) => Self::Mask(Box::new(Masking::new(mask))),
        }
    }
}

/// One flow.
#[derive(Debug)]
pub(super) struct Flow {
    packed: PackedKey,
    pub(super) key: FlowKey,
    pub(super) protocol: Protocol,
    pub(super) treated: Treated,
    /// The PVM's packets that wait, in order.
    pub(super) held: List,
    /// TCP: those that repeat what is settled and wait for the SVM's acknowledgment only, in order. Messages: those that
    /// the SVM has said and that wait only for their turn, in order.
    pub(super) aside: List,
    /// A connection of the PVM begins among `held`: what comes later belongs to it.
    pub(super) begins: bool,
    /// The streams differ: nothing leaves before the next commit.
    pub(super) stuck: bool,
    /// How often that was so, or a packet waited too long.
    pub(super) mismatches: u32,
    /// It has had a packet in this epoch.
    touched: bool,
    last_us: u64,
}

impl Flow {
    fn new(key: FlowKey, treatment: Treatment, now_us: u64) -> Self {
        Self {
            packed: PackedKey::from(&key),
            key,
            protocol: if key.is_tcp() {
                Protocol::Tcp(TcpFlow::default())
            } else {
                Protocol::Messages(Messages::new(&key))
            },
            treated: treatment.into(),
            held: List::of(Chain::Flow),
            aside: List::of(Chain::Flow),
            begins: false,
            stuck: false,
            mismatches: 0,
            touched: false,
            last_us: now_us,
        }
    }

    /// Whether nothing is held.
    #[inline]
    pub(super) fn is_free(&self) -> bool {
        self.held.is_empty() && self.aside.is_empty() && !self.stuck
    }

    /// About how much memory the SVM's output takes here.
    #[inline]
    pub(super) fn cost(&self) -> usize {
        match &self.protocol {
            Protocol::Tcp(tcp) => tcp.cost(),
            Protocol::Messages(messages) => messages.cost(),
        }
    }

    fn idle_us_max(&self) -> u64 {
        match &self.protocol {
            Protocol::Tcp(tcp) if tcp.is_closed() => TCP_CLOSED_US,
            Protocol::Tcp(_) => TCP_IDLE_US,
            Protocol::Messages(_) => OTHER_IDLE_US,
        }
    }

    fn commit(&mut self) {
        self.touched = false;
        self.stuck = false;
        match &mut self.protocol {
            Protocol::Tcp(tcp) => tcp.commit(),
            Protocol::Messages(messages) => messages.clear(),
        }
        if let Treated::Mask(masking) = &mut self.treated {
            masking.commit();
        }
    }
}

#[derive(Debug)]
pub(super) struct Flows {
    /// Only places, so that it is small; a flow's name stands beside what else is looked at.
    places: HashTable<FlowId>,
    hasher: ahash::RandomState,
    flows: Slab<Flow>,
    policy: Policy,
    /// The flow of the last packet: the next one is often of the same.
    last: Option<(PackedKey, FlowId)>,
    /// Flows that have had a packet in this epoch.
    touched: Vec<FlowId>,
    /// Entries that were ever in use at once.
    entries: usize,
    /// The entry to be looked at next for its age.
    hand: usize,
    flows_max: usize,
}

impl Index<FlowId> for Flows {
    type Output = Flow;

    #[inline]
    fn index(&self, id: FlowId) -> &Flow {
        &self.flows[id as usize]
    }
}

impl IndexMut<FlowId> for Flows {
    #[inline]
    fn index_mut(&mut self, id: FlowId) -> &mut Flow {
        &mut self.flows[id as usize]
    }
}

impl Flows {
    pub(super) fn new(flows_max: usize, policy: Policy) -> Self {
        Self {
            places: HashTable::with_capacity(flows_max.min(PLACES_MAX)),
            hasher: ahash::RandomState::new(),
            flows: Slab::new(),
            policy,
            last: None,
            touched: Vec::new(),
            entries: 0,
            hand: 0,
            flows_max,
        }
    }

    /// The rules by which flows are treated.
    pub(super) fn policy(&self) -> &Policy {
        &self.policy
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// The place of a flow, if it is there.
    #[inline]
    fn place(&self, key: &PackedKey) -> Option<FlowId> {
        match &self.last {
            Some((last, id)) if last == key => Some(*id),
            _ => {
                let same = |id: &FlowId| self[*id].packed == *key;
                self.places.find(self.hasher.hash_one(key), same).copied()
            }
        }
    }

    /// The place of the flow, which is made if it is not there. The table may grow beyond its limit, for a flow of the PVM
    /// must have a place to hold packets in.
    #[inline]
    pub(super) fn get(&mut self, name: &impl FlowName, now_us: u64) -> FlowId {
        let packed = name.packed();
        let place = self.place(&packed);
        self.get_at(place, packed, name, now_us)
    }

    #[inline]
    fn get_at(
        &mut self,
        place: Option<FlowId>,
        packed: PackedKey,
        name: &impl FlowName,
        now_us: u64,
    ) -> FlowId {
        let id = match place {
            Some(id) => id,
            None => self.add(packed, &name.key(), now_us),
        };
        self.last = Some((packed, id));
        let flow = &mut self.flows[id as usize];
        flow.last_us = now_us;
        if !flow.touched {
            flow.touched = true;
            self.touch(id);
        }
        id
    }

    #[cold]
    fn add(&mut self, packed: PackedKey, key: &FlowKey, now_us: u64) -> FlowId {
        self.make_room();
        let id = self.flows.insert(Flow::new(*key, self.policy.of(key), now_us)) as FlowId;
        self.entries = self.entries.max(id as usize + 1);
        let (flows, hasher) = (&self.flows, &self.hasher);
        let hash = |id: &FlowId| hasher.hash_one(flows[*id as usize].packed);
        self.places.insert_unique(hasher.hash_one(packed), id, hash);
        id
    }

    fn touch(&mut self, id: FlowId) {
        if self.touched.len() >= TOUCHED_MIN.max(2 * self.flows.capacity()) {
            // of places that many flows have had in this epoch, one after the other
            self.touched.sort_unstable();
            self.touched.dedup();
        }
        self.touched.push(id);
    }

    /// The same for a packet of the SVM: not beyond the limit.
    #[inline]
    pub(super) fn get_if_room(&mut self, name: &impl FlowName, now_us: u64) -> Option<FlowId> {
        let packed = name.packed();
        let place = self.place(&packed);
        (place.is_some() || self.make_room()).then(|| self.get_at(place, packed, name, now_us))
    }

    /// The flow, if it is there, to look at.
    pub(super) fn peek(&self, key: &FlowKey) -> Option<&Flow> {
        Some(&self[self.place(&key.into())?])
    }

    /// The flow, if it is there.
    pub(super) fn find(&mut self, key: &FlowKey) -> Option<&mut Flow> {
        let id = self.place(&key.into())?;
        Some(&mut self[id])
    }

    /// Whether there is room for another flow, which is made by dropping one that holds nothing.
    fn make_room(&mut self) -> bool {
        self.flows.len() < self.flows_max || self.visit(|_| true)
    }

    /// Drops flows that have been idle for long; a few are looked at each time.
    pub(super) fn age(&mut self, now_us: u64) {
        self.visit(|flow| now_us.saturating_sub(flow.last_us) > flow.idle_us_max());
    }

    /// Looks at a few entries and drops those that hold nothing and that `may_go`. Whether one was dropped.
    fn visit(&mut self, may_go: impl Fn(&Flow) -> bool) -> bool {
        let mut dropped = false;
        for _ in 0..VISITED_AT_ONCE.min(self.entries) {
            self.hand = if self.hand + 1 < self.entries { self.hand + 1 } else { 0 };
            let Some(flow) = self.flows.get(self.hand) else {
                continue;
            };
            if flow.is_free() && flow.cost() == 0 && may_go(flow) {
                let hash = self.hasher.hash_one(flow.packed);
                if let Ok(place) = self.places.find_entry(hash, |id| *id as usize == self.hand) {
                    place.remove();
                }
                self.flows.remove(self.hand);
                self.last = None;
                dropped = true;
            }
        }
        dropped
    }

    /// A checkpoint was committed; `look` sees the TCP flows of the epoch afterwards.
    pub(super) fn commit(&mut self, mut look: impl FnMut(&mut TcpFlow)) {
        for id in self.touched.drain(..) {
            // a place may have become another flow's, which then is here twice
            if let Some(flow) = self.flows.get_mut(id as usize)
                && flow.touched
            {
                flow.commit();
                if let Protocol::Tcp(tcp) = &mut flow.protocol {
                    look(tcp);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Transport, Vlan};

    fn flow(number: u16) -> FlowKey {
        FlowKey::Ip {
            vlan: Vlan::default(),
            guest: [10, 0, 0, 1].into(),
            remote: [10, 0, 0, 2].into(),
            transport: Transport::Udp { guest_port: 53, remote_port: number },
        }
    }

    #[test]
    fn no_more_flows_than_the_limit_if_they_hold_nothing() {
        // the slab has room for twice as many then
        const FLOWS_MAX: usize = 1025;
        let mut flows = Flows::new(FLOWS_MAX, Policy::default());
        for number in 0..10_000 {
            flows.get(&flow(number), 0);
            assert!(flows.len() <= FLOWS_MAX, "{} flows", flows.len());
        }
        assert!(flows.peek(&flow(9_999)).is_some());
    }

    #[test]
    fn flows_that_come_and_go_in_one_epoch_take_no_memory() {
        let mut flows = Flows::new(2, Policy::default());
        for number in 0..100_000u32 {
            flows.get(&flow(number as u16), 0);
        }
        assert!(flows.len() <= 2 && flows.touched.len() <= TOUCHED_MIN);
        flows.commit(|_| {});
        assert!(flows.touched.is_empty() && flows.flows.iter().all(|(_, flow)| !flow.touched));
    }
}
