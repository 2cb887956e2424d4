//! Being alone: the VM runs without a peer.

use anyhow::bail;

use super::event::Event;
use super::operator::Request;
use super::side::{End, Side};

/// Serves until the VM ends.
pub(super) fn run(side: &mut Side) -> anyhow::Result<End> {
    while let Some(event) = side.inbox.next(None) {
        if let Some(fatal) = event.fatal() {
            bail!("This side has failed: {fatal}");
        }
        match event {
            Event::Operator(request, answer) => {
                let reply = match request {
                    Request::Status => Ok(side.full_status()),
                    other => Side::refuse(other, "alone"),
                };
                // An operator that has gone away needs no answer.
                let _ = answer.send(reply);
            }
            Event::VmEnded => return Ok(End::Ended(side.vm_ended()?)),
            Event::Terminate => return Ok(End::Ended("an operator has ended the VM".into())),
            // Late words of the lost peer, and of the back ends about it.
            _ => {}
        }
    }
    bail!("The event queue has ended")
}
