//! Being secondary: following the primary's checkpoints.

use std::thread;

use anyhow::{Context, bail};

use super::connect::Links;
use super::event::Event;
use super::operator::Request;
use super::side::{Side, Turn};
use crate::checkpoint::{CheckpointError, Incoming, Record, Secondary, read_checkpoints};
use crate::control::Role;
use crate::vm::Vm;

/// Follows the primary until it is lost or the VM ends.
pub(super) fn run(side: &mut Side, links: Links) -> anyhow::Result<Turn> {
    let Links { checkpoint, heartbeat, network, block } = links;
    side.backends.attach(Role::Secondary, 0, network, block)?;
    let _heartbeat = side.start_heartbeat(heartbeat, checkpoint.try_clone()?)?;
    let incoming = checkpoint.try_clone()?;
    let mut secondary =
        Secondary::new(checkpoint, side.vm.pages()).context("Checkpoints cannot be received")?;
    let cache = secondary.cache();
    let sender = side.sender.clone();
    thread::Builder::new().name("checkpoints".into()).spawn(move || {
        // Nobody listens any more when this side is ending.
        let tell = |message| drop(sender.send(Event::Incoming(message)));
        match crate::checkpoint::UringStream::new(incoming) {
            Ok(stream) => read_checkpoints(stream, &cache, tell),
            Err(error) => tell(Incoming::Lost(error.to_string())),
        }
    })?;
    let mut synchronised = false;
    match follow(side, &mut secondary, &mut synchronised)? {
        Turn::PeerLost(reason) if !synchronised => {
            bail!(
                "The primary was lost before the first checkpoint was complete ({reason}): start this side again"
            )
        }
        Turn::PeerLost(reason) => {
            side.backends.detach()?;
            Ok(Turn::PeerLost(reason))
        }
        turn @ Turn::Ended(_) => Ok(turn),
    }
}

fn follow(side: &mut Side, secondary: &mut Secondary, synchronised: &mut bool) -> anyhow::Result<Turn> {
    loop {
        let Some(event) = side.inbox.next(None) else { bail!("The event queue has ended") };
        if let Some(loss) = event.loss() {
            return Ok(Turn::PeerLost(loss));
        }
        if let Some(fatal) = event.fatal() {
            bail!("This side has failed: {fatal}");
        }
        match event {
            Event::Incoming(Incoming::Begin { epoch, cause }) => {
                match checkpoint_once(side, secondary, epoch, cause) {
                    Ok(()) => *synchronised = true,
                    Err(CheckpointError::Peer(reason)) => return Ok(Turn::PeerLost(reason)),
                    Err(error) => return Err(error.into()),
                }
            }
            Event::Marker { device, epoch } => side.inbox.keep_marker(device, epoch),
            Event::Incoming(Incoming::Goodbye(why)) => return Ok(Turn::Ended(why)),
            Event::Operator(Request::Failover, answer) if *synchronised => {
                // First the claim, then the primary lets go and ends the connection; a primary that cannot is noticed
                // by its silence.
                let reply = side.claim_next().map_err(anyhow::Error::from).and_then(|winner| {
                    anyhow::ensure!(winner == side.node, "Node {winner} has the next generation already");
                    secondary.ask_step_down()?;
                    Ok(serde_json::json!({}))
                });
                // An operator that has gone away needs no answer.
                let _ = answer.send(reply.map_err(|error| format!("{error:#}")));
            }
            Event::Operator(request, answer) => {
                let reply = match request {
                    Request::Status => Ok(side.full_status()),
                    other => Side::refuse(other, "the secondary"),
                };
                let _ = answer.send(reply);
            }
            // The primary's guest will do the same, or goes on alone.
            Event::VmEnded => {
                let why = side.vm_ended()?;
                return Ok(leave(secondary, &why));
            }
            // The buffer is nearly full: only the primary can take a checkpoint.
            Event::Wanted { cause, detail } => secondary.ask_checkpoint(&cause, &detail)?,
            Event::Terminate => {
                return Ok(leave(secondary, "an operator has ended protection"));
            }
            other => return Ok(Turn::PeerLost(format!("it said something out of order: {other:?}"))),
        }
    }
}

/// Ends protection; the primary goes on alone.
fn leave(secondary: &mut Secondary, why: &str) -> Turn {
    if let Err(error) = secondary.goodbye(why) {
        tracing::warn!("The primary cannot be told that protection ends: {error}");
    }
    Turn::Ended(why.into())
}

fn checkpoint_once(
    side: &mut Side,
    secondary: &mut Secondary,
    epoch: u64,
    cause: String,
) -> Result<(), CheckpointError> {
    let deadline = side.checkpoint_deadline();
    let inbox = std::cell::RefCell::new(&mut side.inbox);
    let steps = secondary.checkpoint(
        epoch,
        &mut side.vm,
        &mut side.backends,
        &mut || inbox.borrow_mut().complete(epoch, deadline),
        &mut || inbox.borrow_mut().verified(epoch, deadline),
    )?;
    if epoch == 0 {
        side.status.set("secondary", "follows the primary");
    }
    let mut status = side.status.lock();
    status.epoch = epoch + 1;
    status.checkpoints.add(Record {
        epoch,
        cause,
        pause_us: steps.pause_us,
        pages: steps.pages,
        secondary: Some(steps),
        ..Record::default()
    });
    Ok(())
}
