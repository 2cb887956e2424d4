//! What a worker does for a pair: a controller's commands, the peer's frames, the proxy's wishes.

use std::os::fd::OwnedFd;

use colo::control::{Command, Event};
use serde_json::{Value, json};

use super::{BATCH_FRAMES, Mode, Worker};
use crate::link::{Link, Received};
use crate::protection::{Half, Phase, Protection};
use crate::proxy::Action;

/// Reads of a link that is given up, so that a peer that never stops sending does not keep us: 256 KiB each.
const LAST_READS_MAX: usize = 64;

impl Worker {
    pub(super) fn command(&mut self, command: &Command, link: Option<OwnedFd>) -> Result<Value, String> {
        match (command, &mut self.mode) {
            (Command::Status, _) => return Ok(self.status()),
            (Command::Resize { .. }, _) => return Err("Only a disk can be resized".into()),
            (Command::Link { .. }, Mode::Plain) => {}
            (Command::Link { .. }, _) => {
                return Err("The network of a protected VM has no cable of its own".into());
            }
            (Command::Attach { .. }, Mode::Protected(_)) => {
                return Err("This back end is or was one half of a pair; start another".into());
            }
            (Command::Attach { .. }, Mode::Plain) => {
                return Err("This back end leaves work to the guest that a pair cannot compare: start it with --protected".into());
            }
            (Command::Attach { role, epoch }, Mode::Closed) => {
                let link = link.ok_or("The connection to the peer is missing")?;
                let protection =
                    Link::new(link).and_then(|link| Protection::new(*role, &self.config, *epoch, link));
                let protection =
                    protection.map_err(|error| format!("The connection to the peer: {error}"))?;
                self.mode = Mode::Protected(Box::new(protection));
            }
            (Command::Silence, mode @ (Mode::Plain | Mode::Closed)) => *mode = Mode::Closed,
            (_, Mode::Plain | Mode::Closed) => return Err("No peer was attached".into()),
            (Command::Marker { .. }, Mode::Protected(_)) if self.rings.iter().any(Option::is_some) => {
                return Err("The VM still runs: pause it before the marker".into());
            }
            (Command::Marker { epoch }, Mode::Protected(protection)) => protection.marker(*epoch)?,
            (Command::Commit { epoch }, Mode::Protected(protection)) => protection.commit(*epoch)?,
            (Command::Detach, Mode::Protected(_)) => self.detach(),
            (Command::TakeOver, Mode::Protected(_)) => {
                self.detach();
                self.take_over()?;
            }
            (Command::Silence, Mode::Protected(protection)) => protection.silence(),
            (Command::DirtyLog { .. }, _) => return Err("The dirty log is not the worker's".into()),
        }
        self.carry_out();
        Ok(json!({}))
    }

    /// Whoever takes checkpoints and decides about this side is gone: fail closed. A side that goes on alone needs nobody.
    pub(super) fn controller_lost(&mut self) {
        if let Mode::Protected(protection) = &mut self.mode
            && protection.phase != Phase::Alone
        {
            tracing::error!("The controller is gone: nothing of this VM gets out any more");
            protection.silence();
        }
    }

    /// Uses the link no more.
    pub(super) fn detach(&mut self) {
        self.hear_the_peer_out();
        if let Mode::Protected(protection) = &mut self.mode {
            protection.detach();
        }
    }

    /// Secondary: takes what the peer has sent so far, since a side that goes on alone should know of all that reached the
    /// PVM. A primary must not: what the SVM said could release output that is the other side's to send by now (rule 3).
    fn hear_the_peer_out(&mut self) {
        for _ in 0..LAST_READS_MAX {
            let Mode::Protected(protection) = &mut self.mode else {
                return;
            };
            let is_secondary = matches!(protection.half, Half::Secondary(_));
            if !is_secondary || protection.awaiting_commit || protection.phase != Phase::Paired {
                break;
            }
            let received = protection.link.as_mut().map(Link::fill);
            while let Mode::Protected(protection) = &mut self.mode
                && !protection.awaiting_commit
                && let Ok(true) = protection.peer_frame()
            {
                self.carry_out();
            }
            if !matches!(received, Some(Ok(Received::Some))) {
                break;
            }
        }
    }

    pub(super) fn take_over(&mut self) -> Result<(), String> {
        let Mode::Protected(protection) = &mut self.mode else {
            return Ok(());
        };
        protection.take_over()?;
        tracing::info!("This side goes on alone");
        Ok(())
    }

    /// The link failed while nobody had said so.
    pub(super) fn link_lost(&mut self, reason: String) {
        if let Mode::Protected(protection) = &mut self.mode
            && protection.phase == Phase::Paired
        {
            tracing::warn!("The link to the peer's net back end is lost: {reason}");
            protection.detach();
            self.events.send(&Event::LinkLost { reason });
        }
    }

    /// Carries out what the proxy wants, in its order.
    pub(super) fn carry_out(&mut self) {
        let Mode::Protected(protection) = &mut self.mode else {
            return;
        };
        let mut actions = std::mem::take(&mut protection.actions);
        for action in actions.iter() {
            match action {
                Action::ToLan(frame) => {
                    // the proxy wants this in no other phase; if it did, the other side may have won (rule 3)
                    if matches!(protection.phase, Phase::Paired | Phase::Alone) {
                        let sent = self.port.write_headed(frame.header(), frame);
                        self.counters.lan_refused += u64::from(!sent);
                    }
                }
                Action::ToGuest(frame) => protection.undelivered.push(frame),
                Action::ToPeer { kind, epoch, payload } => {
                    if let Some(link) = &mut protection.link {
                        link.send(kind, epoch, payload);
                    }
                }
                Action::CheckpointWanted { cause, detail } => {
                    self.events.send(&Event::CheckpointWanted {
                        cause: cause.as_str().into(),
                        detail: detail.into(),
                    });
                }
                Action::MarkerArrived { epoch } => {
                    protection.awaiting_commit = true;
                    self.events.send(&Event::Marker { epoch });
                }
            }
        }
        actions.clear();
        protection.actions = actions;
    }

    pub(super) fn peer_input(&mut self) -> bool {
        let mut any = false;
        for _ in 0..BATCH_FRAMES {
            let Mode::Protected(protection) = &mut self.mode else {
                break;
            };
            if !protection.takes_from_peer() {
                break;
            }
            let lost = match protection.peer_frame() {
                Ok(true) => {
                    any = true;
                    self.carry_out();
                    continue;
                }
                Ok(false) => match protection.link.as_mut().map(Link::fill) {
                    Some(Ok(Received::Some)) => {
                        any = true;
                        continue;
                    }
                    Some(Ok(Received::Nothing)) | None => break,
                    Some(Ok(Received::End)) => "The peer has closed it".into(),
                    Some(Err(error)) => error.to_string(),
                },
                Err(error) => error,
            };
            self.link_lost(lost);
            return true;
        }
        any
    }

    pub(super) fn tick(&mut self) -> bool {
        let Mode::Protected(protection) = &mut self.mode else {
            return false;
        };
        if protection.due_in_us() != Some(0) {
            return false;
        }
        protection.tick();
        let any = !protection.actions.is_empty();
        self.carry_out();
        any
    }

    pub(super) fn flush_link(&mut self) -> bool {
        let Mode::Protected(protection) = &mut self.mode else {
            return false;
        };
        match protection.link.as_mut().map(Link::flush) {
            None => false,
            Some(Ok(any)) => any,
            Some(Err(error)) => {
                // it takes nothing any more, but what came before may not have been read
                self.hear_the_peer_out();
                self.link_lost(error.to_string());
                true
            }
        }
    }
}
