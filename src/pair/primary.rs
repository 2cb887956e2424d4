//! Being primary: deciding when a checkpoint is due.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossbeam_channel::Sender;
use serde_json::{Value, json};

use super::connect::Links;
use super::event::Event;
use super::operator::Request;
use super::side::{Side, Turn};
use crate::checkpoint::{CheckpointError, Primary, Reply, read_replies};
use crate::control::Role;
use crate::vm::Vm;

type Answer = Sender<Result<Value, String>>;

/// A checkpoint that is due.
struct Due {
    cause: String,
    answers: Vec<Answer>,
}

/// Protects the VM until the peer is lost or the VM ends.
pub(super) fn run(side: &mut Side, links: Links) -> anyhow::Result<Turn> {
    let Links { checkpoint, heartbeat, network, block } = links;
    side.backends.attach(Role::Primary, 0, network, block)?;
    let _heartbeat = side.start_heartbeat(heartbeat, checkpoint.try_clone()?)?;
    let replies = checkpoint.try_clone()?;
    let sender = side.sender.clone();
    thread::Builder::new().name("replies".into()).spawn(move || {
        // Nobody listens any more when this side is ending.
        read_replies(replies, |reply| drop(sender.send(Event::Reply(reply))));
    })?;
    let mut primary =
        Primary::new(checkpoint, side.vm.pages(), side.verify).context("Checkpoints cannot be sent")?;
    let turn = protect(side, &mut primary)?;
    if let Turn::PeerLost(_) = turn {
        // Before the connection ends, for the secondary may take over as soon as it does.
        side.backends.detach()?;
    }
    Ok(turn)
}

fn protect(side: &mut Side, primary: &mut Primary) -> anyhow::Result<Turn> {
    let interval = Duration::from_millis(side.config.checkpoint.interval_ms);
    let mut due = Some(Due { cause: "start".into(), answers: Vec::new() });
    // Until the secondary runs again it cannot take the next checkpoint.
    let mut secondary_busy = false;
    let mut deadline = Instant::now();
    loop {
        if !secondary_busy && let Some(now) = due.take() {
            if let Some(turn) = checkpoint_once(side, primary, now)? {
                return Ok(turn);
            }
            secondary_busy = true;
            deadline = side.checkpoint_deadline();
        }
        let Some(event) = side.inbox.next(Some(deadline)) else {
            if secondary_busy {
                return Ok(Turn::PeerLost("it took longer than checkpoint.limit_ms to resume".into()));
            }
            due.get_or_insert(Due { cause: "interval".into(), answers: Vec::new() });
            continue;
        };
        if let Some(loss) = event.loss() {
            return Ok(Turn::PeerLost(loss));
        }
        if let Some(fatal) = event.fatal() {
            bail!("This side has failed: {fatal}");
        }
        match event {
            Event::Wanted { cause, detail } | Event::Reply(Reply::Wanted { cause, detail }) => {
                tracing::debug!("Checkpoint wanted, {cause}: {detail}");
                due.get_or_insert(Due { cause, answers: Vec::new() });
            }
            Event::Reply(Reply::Resumed { epoch, steps }) => {
                side.status.lock().checkpoints.complete(epoch, steps);
                secondary_busy = false;
                deadline = Instant::now() + interval;
            }
            Event::Operator(Request::Checkpoint, answer) => {
                due.get_or_insert(Due { cause: "operator".into(), answers: Vec::new() }).answers.push(answer);
            }
            Event::Operator(request, answer) => {
                let reply = match request {
                    Request::Status => Ok(side.full_status()),
                    other => Side::refuse(other, "the primary"),
                };
                // An operator that has gone away needs no answer.
                let _ = answer.send(reply);
            }
            Event::VmEnded => {
                let why = side.vm_ended()?;
                return Ok(leave(primary, &why));
            }
            Event::Terminate => return Ok(leave(primary, "an operator has ended the VM")),
            other => return Ok(Turn::PeerLost(format!("it said something out of order: {other:?}"))),
        }
    }
}

/// Ends the VM on both sides.
fn leave(primary: &mut Primary, why: &str) -> Turn {
    if let Err(error) = primary.goodbye(why) {
        tracing::warn!("The secondary cannot be told that the VM ends: {error}");
    }
    Turn::Ended(why.into())
}

fn checkpoint_once(side: &mut Side, primary: &mut Primary, due: Due) -> anyhow::Result<Option<Turn>> {
    let deadline = side.checkpoint_deadline();
    let mut hearing = side.inbox.hearing(deadline);
    let taken = primary.checkpoint(&mut side.vm, &mut side.backends, &due.cause, &mut hearing);
    drop(hearing);
    match taken {
        Ok(record) => {
            tracing::debug!(
                "Checkpoint {} ({}): {} pages, pause {} us",
                record.epoch,
                record.cause,
                record.pages,
                record.pause_us
            );
            for answer in due.answers {
                // An operator that has gone away needs no answer.
                let _ = answer.send(Ok(json!({"epoch": record.epoch, "pause_us": record.pause_us})));
            }
            if record.epoch == 0 {
                side.status.set("primary", "protected");
            }
            let mut status = side.status.lock();
            status.epoch = primary.epoch();
            status.checkpoints.add(record);
            Ok(None)
        }
        Err(CheckpointError::Peer(reason)) => Ok(Some(Turn::PeerLost(reason))),
        Err(error @ CheckpointError::Verify { .. }) => {
            // The secondary must not be taken for a copy any more: it is told to stop, and this side goes on alone.
            tracing::error!("{error}");
            let _ = primary.goodbye(&error.to_string());
            Ok(Some(Turn::PeerLost(error.to_string())))
        }
        Err(error) => Err(error.into()),
    }
}
