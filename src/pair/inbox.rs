//! The one queue of events that a side's loop reads, and what is put aside while it waits for one in particular.

use std::collections::VecDeque;
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::event::{Device, Event};
use crate::checkpoint::{CheckpointError, DeviceError, Hearing, Incoming, Received, Reply};

/// Events in the order of their arrival, except for those that had to wait.
pub(super) struct Inbox {
    events: Receiver<Event>,
    deferred: VecDeque<Event>,
    /// Secondary: markers that have overtaken the beginning of their checkpoint, which comes on another connection.
    markers: Vec<(Device, u64)>,
    /// Those whose marker is a part of a checkpoint.
    devices: Vec<Device>,
}

impl Inbox {
    pub(super) fn new(events: Receiver<Event>, devices: Vec<Device>) -> Self {
        Self { events, deferred: VecDeque::new(), markers: Vec::new(), devices }
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

    /// Primary: what is heard while a checkpoint is taken, up to `deadline`.
    pub(super) fn hearing(&mut self, deadline: Instant) -> impl Hearing {
        PrimaryHearing { inbox: self, deadline }
    }

    /// Secondary: waits until all parts of a checkpoint are here: memory and device state, and the marker of each device.
    pub(super) fn complete(&mut self, epoch: u64, deadline: Instant) -> Result<Received, CheckpointError> {
        let mut markers = std::mem::take(&mut self.markers);
        let mut memory = None;
        loop {
            if let Some(marker) = markers.iter().find(|(_, of)| *of != epoch) {
                return Err(CheckpointError::Peer(format!("{marker:?} in the middle of checkpoint {epoch}")));
            }
            let is_here = |device: &Device| markers.iter().any(|(of, _)| of == device);
            if self.devices.iter().all(is_here)
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

struct PrimaryHearing<'a> {
    inbox: &'a mut Inbox,
    deadline: Instant,
}

/// A wish for a checkpoint that has been met is forgotten, and one of the next epoch is not: it will not come again.
impl Hearing for PrimaryHearing<'_> {
    fn reply(&mut self) -> Result<Reply, CheckpointError> {
        loop {
            match self.inbox.inside(self.deadline, "the secondary's answer")? {
                Event::Reply(reply @ Reply::Committed { .. }) => {
                    // what the secondary wishes from here on is of the next epoch
                    let is_met = |event: &Event| matches!(event, Event::Reply(Reply::Wanted { .. }));
                    self.inbox.deferred.retain(|event| !is_met(event));
                    return Ok(reply);
                }
                Event::Reply(reply) if !matches!(reply, Reply::Wanted { .. }) => return Ok(reply),
                other => self.inbox.deferred.push_back(other),
            }
        }
    }

    /// A wish that a back end sent before it answered `commit` is in the queue already, and it sends no other before the
    /// VM runs.
    fn wishes_are_met(&mut self) {
        self.inbox.deferred.extend(self.inbox.events.try_iter());
        self.inbox.deferred.retain(|event| !matches!(event, Event::Wanted { .. }));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{Sender, unbounded};

    use super::*;
    use crate::failover::LinkLoss;

    fn inbox() -> (Sender<Event>, Inbox) {
        let (sender, events) = unbounded();
        (sender, Inbox::new(events, vec![Device::Net(0), Device::Net(1), Device::Block]))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn send(sender: &Sender<Event>, events: impl IntoIterator<Item = Event>) {
        events.into_iter().for_each(|event| sender.send(event).unwrap());
    }

    fn whole(epoch: u64) -> Event {
        Event::Incoming(Incoming::Complete { epoch, received: Received::default() })
    }

    fn marker(device: Device, epoch: u64) -> Event {
        Event::Marker { device, epoch }
    }

    fn wanted() -> Event {
        Event::Wanted { cause: "mismatch".into(), detail: String::new() }
    }

    #[test]
    fn a_checkpoint_is_complete_when_all_parts_are_here_in_any_order() {
        let devices = [Device::Net(0), Device::Net(1), Device::Block];
        for missing in 0..4 {
            for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
                let (sender, mut inbox) = inbox();
                let parts = [whole(7)].into_iter().chain(devices.map(|device| marker(device, 7)));
                let mut here: Vec<_> = parts.map(Some).collect();
                here.remove(missing);
                send(&sender, order.map(|part| here[part].take().unwrap()));
                assert!(inbox.complete(7, soon()).is_err(), "complete without part {missing}");
            }
        }
        let (sender, mut inbox) = inbox();
        // markers that came before the checkpoint's beginning, on either side of one that came after it
        inbox.keep_marker(Device::Block, 7);
        send(&sender, [wanted(), marker(Device::Net(1), 7), whole(7), marker(Device::Net(0), 7)]);
        inbox.complete(7, soon()).unwrap();
        assert!(matches!(inbox.next(Some(soon())), Some(Event::Wanted { .. })), "what is not a part is kept");
    }

    #[test]
    fn a_marker_of_another_epoch_and_a_lost_peer_end_a_checkpoint() {
        let (sender, mut early) = inbox();
        early.keep_marker(Device::Net(0), 6);
        send(&sender, [whole(7), marker(Device::Block, 7)]);
        assert!(matches!(early.complete(7, soon()), Err(CheckpointError::Peer(_))));
        let (sender, mut lost) = inbox();
        send(&sender, [whole(7), Event::Heartbeat(LinkLoss::Closed), marker(Device::Net(0), 7)]);
        assert!(matches!(lost.complete(7, soon()), Err(CheckpointError::Peer(_))));
        let (sender, mut failed) = inbox();
        send(&sender, [Event::DeviceGone(Device::Net(0))]);
        assert!(matches!(failed.complete(7, soon()), Err(CheckpointError::Device(_))));
    }

    #[test]
    fn a_committed_checkpoint_outlives_its_primary_but_not_its_refutation() {
        let (sender, mut lost) = inbox();
        send(&sender, [Event::Heartbeat(LinkLoss::Closed)]);
        lost.verified(3, soon()).unwrap();
        assert!(matches!(lost.next(Some(soon())), Some(Event::Heartbeat(_))), "the loss is still to be told");
        let (sender, mut refuted) = inbox();
        send(&sender, [Event::Incoming(Incoming::Goodbye("pages differ".into()))]);
        assert!(matches!(refuted.verified(3, soon()), Err(CheckpointError::Device(_))));
    }

    #[test]
    fn wishes_that_a_checkpoint_has_met_are_forgotten_and_nothing_else() {
        let (sender, mut inbox) = inbox();
        let of_secondary = || Event::Reply(Reply::Wanted { cause: "buffer".into(), detail: String::new() });
        let committed = Event::Reply(Reply::Committed { epoch: 3 });
        send(&sender, [wanted(), of_secondary(), Event::Terminate, committed, of_secondary(), wanted()]);
        let mut hearing = inbox.hearing(soon());
        assert_eq!(hearing.reply().unwrap(), Reply::Committed { epoch: 3 });
        hearing.wishes_are_met();
        drop(hearing);
        // the VM runs again
        send(&sender, [wanted()]);
        assert!(matches!(inbox.next(Some(soon())), Some(Event::Terminate)));
        let secondarys = inbox.next(Some(soon()));
        assert!(matches!(secondarys, Some(Event::Reply(Reply::Wanted { .. }))), "it is of the next epoch");
        assert!(matches!(inbox.next(Some(soon())), Some(Event::Wanted { .. })), "so is this");
        assert!(inbox.next(Some(soon())).is_none());
    }
}
