//! The table of flows. An entry that holds packets, or what the SVM said, is never dropped; others age.

use std::collections::{HashMap, VecDeque};

use super::datagrams::Messages;
use super::held::Order;
use super::tcp::TcpFlow;
use crate::packet::FlowKey;

/// RFC 5382 §5: an established connection is remembered for at least 2 hours 4 minutes without a packet.
const TCP_IDLE_US: u64 = 124 * 60 * 1_000_000;
/// RFC 5382 §5: one that has been closed, 4 minutes.
const TCP_CLOSED_US: u64 = 4 * 60 * 1_000_000;
/// Other flows remember nothing over a commit.
const OTHER_IDLE_US: u64 = 60 * 1_000_000;
/// Entries that one visit looks at.
const VISITED_AT_ONCE: usize = 32;

#[derive(Debug)]
pub(super) enum Protocol {
    Tcp(Box<TcpFlow>),
    Messages(Messages),
}

/// One flow.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) protocol: Protocol,
    /// The PVM's packets that wait, in order.
    pub(super) held: VecDeque<Order>,
    /// Those that repeat what is settled and wait for the SVM's acknowledgment only, in order.
    pub(super) repeats: VecDeque<Order>,
    /// A connection of the PVM begins among `held`: what comes later belongs to it.
    pub(super) begins: bool,
    /// The streams differ: nothing leaves before the next commit.
    pub(super) stuck: bool,
    /// It has had a packet in this epoch.
    touched: bool,
    last_us: u64,
}

impl Flow {
    /// Whether nothing is held.
    pub(super) fn is_free(&self) -> bool {
        self.held.is_empty() && self.repeats.is_empty() && !self.stuck
    }

    /// About how much memory the SVM's output takes here.
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
    }
}

#[derive(Debug)]
pub(super) struct Flows {
    table: HashMap<FlowKey, Flow>,
    /// Every key once, those that were looked at longest ago in front.
    visits: VecDeque<FlowKey>,
    /// Flows that have had a packet in this epoch.
    touched: Vec<FlowKey>,
    flows_max: usize,
}

impl Flows {
    pub(super) fn new(flows_max: usize) -> Self {
        Self { table: HashMap::new(), visits: VecDeque::new(), touched: Vec::new(), flows_max }
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The flow, which is made if it is not there. The table may grow beyond its limit, for a flow of the PVM must
    /// have a place to hold packets in.
    pub(super) fn get(&mut self, key: &FlowKey, now_us: u64) -> &mut Flow {
        if !self.table.contains_key(key) {
            self.has_room_for(key);
            self.visits.push_back(*key);
        }
        let flow = self.table.entry(*key).or_insert_with(|| Flow {
            protocol: if key.is_tcp() {
                Protocol::Tcp(Box::default())
            } else {
                Protocol::Messages(Messages::new(key))
            },
            held: VecDeque::new(),
            repeats: VecDeque::new(),
            begins: false,
            stuck: false,
            touched: false,
            last_us: now_us,
        });
        flow.last_us = now_us;
        if !flow.touched {
            flow.touched = true;
            self.touched.push(*key);
        }
        flow
    }

    /// The flow, if it is there, to look at.
    pub(super) fn peek(&self, key: &FlowKey) -> Option<&Flow> {
        self.table.get(key)
    }

    /// The flow, if it is there.
    pub(super) fn find(&mut self, key: &FlowKey) -> Option<&mut Protocol> {
        self.table.get_mut(key).map(|flow| &mut flow.protocol)
    }

    /// Whether the flow is there or there is room for it, which is made by dropping one that holds nothing.
    pub(super) fn has_room_for(&mut self, key: &FlowKey) -> bool {
        if self.table.len() < self.flows_max || self.table.contains_key(key) {
            return true;
        }
        self.visit(|_| true)
    }

    /// Drops flows that have been idle for long; a few are looked at each time.
    pub(super) fn age(&mut self, now_us: u64) {
        self.visit(|flow| now_us.saturating_sub(flow.last_us) > flow.idle_us_max());
    }

    /// Looks at a few entries and drops those that hold nothing and that `may_go`. Whether one was dropped.
    fn visit(&mut self, may_go: impl Fn(&Flow) -> bool) -> bool {
        let mut dropped = false;
        for _ in 0..VISITED_AT_ONCE.min(self.visits.len()) {
            let Some(key) = self.visits.pop_front() else {
                break;
            };
            match self.table.get(&key) {
                Some(flow) if flow.is_free() && flow.cost() == 0 && may_go(flow) => {
                    self.table.remove(&key);
                    dropped = true;
                }
                Some(_) => self.visits.push_back(key),
                None => {}
            }
        }
        dropped
    }

    /// A checkpoint was committed; `look` sees the TCP flows of the epoch afterwards.
    pub(super) fn commit(&mut self, mut look: impl FnMut(&mut TcpFlow)) {
        for key in self.touched.drain(..) {
            if let Some(flow) = self.table.get_mut(&key) {
                flow.commit();
                if let Protocol::Tcp(tcp) = &mut flow.protocol {
                    look(tcp);
                }
            }
        }
    }
}
