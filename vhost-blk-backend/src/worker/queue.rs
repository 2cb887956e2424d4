//! One of a worker's queues.

use std::sync::Arc;

use colo::vhost_user::{Chain, Ring};
use crossbeam_channel::Sender;

use crate::metrics::Metrics;
use crate::request::Extent;
use crate::taken::Taken;

pub(super) struct Queue {
    pub(super) ring: Option<Box<Ring>>,
    /// The request that is being begun, or parked.
    pub(super) chain: Chain,
    /// And what it is to discard or to make zeros.
    pub(super) extents: Vec<Extent>,
    /// And its data, if a primary has copied it already.
    pub(super) copy: Option<Arc<Vec<u8>>>,
    /// A request that has to wait. Nothing behind it is taken, so it can be put back.
    pub(super) parked: Option<Taken>,
    /// Requests whose transfers run.
    pub(super) in_flight: usize,
    /// It is to stop: nothing new is taken, and whoever wants it gets the next request's index when nothing is in flight.
    pub(super) stopping: Option<Sender<u16>>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            ring: None,
            chain: Chain::new(),
            extents: Vec::new(),
            copy: None,
            parked: None,
            in_flight: 0,
            stopping: None,
        }
    }

    pub(super) fn has_again(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.has_again())
    }

    pub(super) fn signal(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.signal_used();
        }
    }

    /// Gives the ring back, with a parked request in it. Returns its next request.
    pub(super) fn give_back(&mut self, metrics: &Metrics) -> u16 {
        assert_eq!(self.in_flight, 0, "a ring is given back when nothing of it is in flight");
        self.copy = None;
        let Some(mut ring) = self.ring.take() else {
            return 0;
        };
        if let Some(parked) = self.parked.take() {
            parked.put_back(&mut ring, &self.chain, metrics);
        }
        // it would keep the guest's memory mapped
        self.chain.clear();
        ring.next_avail()
    }
}
