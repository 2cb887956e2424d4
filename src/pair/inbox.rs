//! The one queue of events that a side's loop reads, and what is put aside while it waits for one in particular.

use std::collections::VecDeque;
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::event::{Device, Event};
use crate::checkpoint::{CheckpointError, DeviceError, Incoming, Received, Reply};

/// Events in the order of their arrival, except for those that had to wait.
pub(super) struct Inbox {
    events: Receiver<Event>,
    deferred: VecDeque<Event>,
    /// Secondary: markers that have overtaken the beginning of their checkpoint, which comes on another connection.
    markers: Vec<(Device, u64)>,
}

impl Inbox {
    pub(super) fn new(events: Receiver<Event>) -> Self {
        Self { events, deferred: VecDeque::new(), markers: Vec::new() }
    }

    /// The next event; `None` when the deadline has passed.
    pub(super) fn next(&mut self, deadline: Option<Instant>) -> Option<Event> {
        if let Some(event) = self.deferred.pop_front() {
            return Some(event);
        }
        match deadline {
            Some(deadline) => self.events.recv_deadline(deadline).ok(),
            None => self.events.recv().ok(),
        }
    }

    /// Forgets requests for a checkpoint that have just been met. A request that a back end sent before it answered
    /// `commit` is already in the queue, so this finds every one of them.
    pub(super) fn drop_wanted(&mut self) {
        self.deferred.extend(self.events.try_iter());
        self.deferred
            .retain(|event| !matches!(event, Event::Wanted { .. } | Event::Reply(Reply::Wanted { .. })));
    }

    /// Secondary: keeps a marker for the checkpoint that is about to begin.
    pub(super) fn keep_marker(&mut self, device: Device, epoch: u64) {
        self.markers.push((device, epoch));
    }

    /// The next event inside a checkpoint, where some things end it.
    fn inside(&mut self, deadline: Instant, waiting_for: &str) -> Result<Event, CheckpointError> {
        let Ok(event) = self.events.recv_deadline(deadline) else {
            return Err(CheckpointError::Peer(format!("{waiting_for} took longer than checkpoint.limit_ms")));
        };
        if let Some(loss) = event.loss() {
            return Err(CheckpointError::Peer(loss));
        }
        if let Some(fatal) = event.fatal() {
            return Err(DeviceError(fatal).into());
        }
        match event {
            Event::Incoming(Incoming::Goodbye(why)) => {
                Err(CheckpointError::Peer(format!("it leaves: {why}")))
            }
            event => Ok(event),
        }
    }

    /// Primary: the secondary's next word on the checkpoint.
    pub(super) fn reply(&mut self, deadline: Instant) -> Result<Reply, CheckpointError> {
        loop {
            match self.inside(deadline, "the secondary's answer")? {
                Event::Wanted { .. } | Event::Reply(Reply::Wanted { .. }) => {}
                Event::Reply(reply) => return Ok(reply),
                other => self.deferred.push_back(other),
            }
        }
    }

    /// Secondary: waits until all four parts of a checkpoint are here.
    pub(super) fn complete(&mut self, epoch: u64, deadline: Instant) -> Result<Received, CheckpointError> {
        let mut markers = std::mem::take(&mut self.markers);
        let mut memory = None;
        loop {
            if let Some(marker) = markers.iter().find(|(_, of)| *of != epoch) {
                return Err(CheckpointError::Peer(format!("{marker:?} in the middle of checkpoint {epoch}")));
            }
            let is_here = |device| markers.iter().any(|(of, _)| *of == device);
            if is_here(Device::Net)
                && is_here(Device::Block)
                && let Some(received) = memory.take()
            {
                return Ok(received);
            }
            match self.inside(deadline, "the rest of a checkpoint")? {
                Event::Marker { device, epoch: of } => markers.push((device, of)),
                Event::Incoming(Incoming::Complete { epoch: of, received }) if of == epoch => {
                    memory = Some(received);
                }
                event @ Event::Incoming(_) => {
                    return Err(CheckpointError::Peer(format!(
                        "{event:?} in the middle of checkpoint {epoch}"
                    )));
                }
                other => self.deferred.push_back(other),
            }
        }
    }

    /// Secondary, with `--verify`: waits for the primary's verdict. If the primary is lost instead, that is put aside:
    /// the checkpoint is committed all the same.
    pub(super) fn verified(&mut self, epoch: u64, deadline: Instant) -> Result<(), CheckpointError> {
        loop {
            let Ok(event) = self.events.recv_deadline(deadline) else { return Ok(()) };
            if let Some(fatal) = event.fatal() {
                return Err(DeviceError(fatal).into());
            }
            match event {
                Event::Incoming(Incoming::Verified { epoch: of }) if of == epoch => return Ok(()),
                // Not a lost peer that one could take over from: what is here is known to be unequal.
                Event::Incoming(Incoming::Goodbye(why)) => return Err(DeviceError(why).into()),
                event => {
                    let lost = event.loss().is_some();
                    self.deferred.push_back(event);
                    if lost {
                        return Ok(());
                    }
                }
            }
        }
    }
}
