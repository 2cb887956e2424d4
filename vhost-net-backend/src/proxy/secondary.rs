//! The secondary's half: the SVM gets what the primary mirrors, and what it sends goes to the primary's comparison.

use std::collections::VecDeque;

use serde::Serialize;

use super::{Action, Actions, Buffer, Config, GuestAddresses, HOUSEKEEPING_US, Mode, OrderError};
use crate::digest::{Ask, Sender, SenderStats, key_from_bytes};
use crate::offload::FrameHeader;
use crate::policy::Policy;
use crate::rewrite::{Exit, RewriteStats, Rewriter};
use crate::wire::{ASK, EPOCH, HEADED_MIRROR, ISN, Isn, KEY, MARKER, MIRROR, WireError, mirrored};

/// How often the survivor announces itself, and how far apart, in microseconds: switches lose packets too.
const ANNOUNCEMENTS_US: [u64; 4] = [50_000, 150_000, 250_000, 350_000];

/// Figures of the secondary's half.
#[derive(Clone, Debug, Serialize)]
pub struct SecondaryStats {
    /// How things stand.
    pub mode: Mode,
    /// The epoch that is running.
    pub epoch: u64,
    /// Packets that came from the primary for the SVM.
    pub mirrored_packets: u64,
    /// Bytes of them.
    pub mirrored_bytes: u64,
    /// Packets that the SVM sent.
    pub svm_packets: u64,
    /// The rewriter.
    pub rewrite: RewriteStats,
    /// What goes to the primary, if digests may stand for bytes.
    pub digest: Option<SenderStats>,
}

/// The secondary's half of the proxy.
#[derive(Debug)]
pub struct Secondary {
    mode: Mode,
    epoch: u64,
    /// The peer's marker of the running epoch is here.
    marked: bool,
    rewriter: Rewriter,
    /// What the rewriter makes goes through this, since the primary has named a key.
    sender: Option<Sender>,
    policy: Policy,
    /// What the rewriter has made; empty between two calls.
    rewritten: Actions,
    addresses: GuestAddresses,
    /// When to announce the guest again, the next one first.
    announcements: VecDeque<u64>,
    housekeeping_us: u64,
    mirrored_packets: u64,
    mirrored_bytes: u64,
    svm_packets: u64,
}

impl Secondary {
    /// Protection begins in `epoch`. Nothing that the SVM sends gets to the LAN.
    pub fn new(config: &Config, epoch: u64, now_us: u64) -> Self {
        Self {
            mode: Mode::Protected,
            epoch,
            marked: false,
            rewriter: Rewriter::new(config.rewrite.clone()),
            sender: None,
            policy: config.policy.clone(),
            rewritten: Actions::new(),
            addresses: GuestAddresses::default(),
            announcements: VecDeque::new(),
            housekeeping_us: now_us + HOUSEKEEPING_US,
            mirrored_packets: 0,
            mirrored_bytes: 0,
            svm_packets: 0,
        }
    }

    /// The SVM has sent this frame.
    pub fn guest_output(&mut self, frame: Buffer, now_us: u64, actions: &mut Actions) {
        let exit = match self.mode {
            Mode::Protected => Some(Exit::Peer { epoch: self.epoch }),
            Mode::Alone => Some(Exit::Lan),
            // nothing may get out, whatever the caller does
            Mode::Detached | Mode::Silent => None,
        };
        if let Some(exit) = exit {
            self.svm_packets += 1;
            if self.mode == Mode::Protected {
                self.addresses.learn_from_guest(&frame);
            }
            match (exit, &self.sender) {
                (Exit::Peer { .. }, Some(_)) => {
                    self.rewriter.outbound(frame.header(), &frame, now_us, exit, &mut self.rewritten);
                    self.send_rewritten(actions);
                }
                _ => self.rewriter.outbound(frame.header(), &frame, now_us, exit, actions),
            }
        }
        actions.pool().give(frame);
    }

    /// Sends what the rewriter has made for the primary: whole, or as digests.
    fn send_rewritten(&mut self, actions: &mut Actions) {
        if let Some(sender) = &mut self.sender {
            for action in self.rewritten.iter() {
                if let Action::ToPeer { epoch, payload, .. } = action {
                    sender.send(payload, epoch, actions);
                }
            }
        }
        self.rewritten.clear();
    }

    /// Sends what waits for more of its kind. To be called when the guest has nothing more to send for now.
    pub fn flush(&mut self, actions: &mut Actions) {
        if let (Some(sender), Mode::Protected) = (&mut self.sender, self.mode) {
            sender.flush(self.epoch, actions);
        }
    }

    /// Whether another frame may be taken from the guest. When not, its queue must wait: what is taken while nothing is
    /// decided is lost.
    pub fn accepts_output(&self) -> bool {
        self.mode != Mode::Detached
    }

    /// A frame from this host's LAN. As long as the primary lives the guest gets it from there.
    pub fn lan_input(&mut self, frame: &[u8], now_us: u64, actions: &mut Actions) {
        self.headed_lan_input(FrameHeader::default(), frame, now_us, actions);
    }

    /// The same of a frame that leaves something to the guest.
    pub fn headed_lan_input(
        &mut self,
        header: FrameHeader,
        frame: &[u8],
        now_us: u64,
        actions: &mut Actions,
    ) {
        if self.mode == Mode::Alone {
            self.rewriter.inbound(header, frame, now_us, actions);
        }
    }

    /// A frame from the primary's net back end. Not to be called between a marker and its commit.
    ///
    /// # Errors
    /// The peer sent what makes no sense: close the link.
    pub fn peer_frame(
        &mut self,
        kind: u16,
        epoch: u64,
        payload: &[u8],
        now_us: u64,
        actions: &mut Actions,
    ) -> Result<(), WireError> {
        if !matches!(kind, MIRROR | HEADED_MIRROR | ISN | MARKER | KEY | ASK) {
            return Err(WireError::Kind(kind));
        }
        if self.mode != Mode::Protected {
            return Ok(());
        }
        if epoch != self.epoch || self.marked {
            return Err(WireError::Epoch { kind, epoch, running: self.epoch });
        }
        match kind {
            MIRROR | HEADED_MIRROR => {
                let (header, frame) = mirrored(kind, payload)?;
                self.mirrored_packets += 1;
                self.mirrored_bytes += frame.len() as u64;
                self.addresses.learn_from_lan(frame);
                if let Some(sender) = &mut self.sender {
                    sender.client_says(frame, actions);
                }
                self.rewriter.inbound(header, frame, now_us, actions);
            }
            ISN => {
                let isn = Isn::from_bytes(payload)?;
                let exit = Exit::Peer { epoch: self.epoch };
                if self.sender.is_some() {
                    self.rewriter.pvm_begins(&isn, now_us, exit, &mut self.rewritten);
                    self.send_rewritten(actions);
                    self.flush(actions);
                } else {
                    self.rewriter.pvm_begins(&isn, now_us, exit, actions);
                }
            }
            KEY if self.sender.is_some() => return Err(WireError::Malformed { kind }),
            KEY => self.sender = Some(Sender::new(key_from_bytes(payload)?, self.policy.clone())),
            ASK => {
                let ask = Ask::from_bytes(payload)?;
                match &mut self.sender {
                    Some(sender) => sender.answer(&ask, self.epoch, actions),
                    None => return Err(WireError::Kind(kind)),
                }
            }
            _ if payload.is_empty() => {
                self.marked = true;
                actions.push_marker_arrived(epoch);
            }
            _ => return Err(WireError::Length { kind, bytes: payload.len() }),
        }
        Ok(())
    }

    /// The epoch's checkpoint is committed: the SVM becomes what the PVM was at the marker, and the next epoch runs.
    /// What has not reached the SVM yet of the epoch's packets must be dropped by the caller.
    ///
    /// The link may have broken between the checkpoint's last message and this order.
    ///
    /// # Errors
    /// It is not the epoch that is running, or this side goes on alone already.
    pub fn commit(&mut self, epoch: u64, actions: &mut Actions) -> Result<(), OrderError> {
        if !matches!(self.mode, Mode::Protected | Mode::Detached) {
            return Err(OrderError::Mode { order: "commit", mode: self.mode });
        }
        if epoch != self.epoch {
            return Err(OrderError::Epoch { order: "commit", epoch, running: self.epoch });
        }
        self.rewriter.commit();
        if let Some(sender) = &mut self.sender {
            sender.forget(actions);
        }
        self.epoch += 1;
        self.marked = false;
        if self.mode == Mode::Protected {
            actions.push_to_peer(EPOCH, self.epoch, &[]);
        }
        Ok(())
    }

    /// When [`Secondary::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.mode == Mode::Silent {
            return None;
        }
        let announcement = self.announcements.front().copied().unwrap_or(u64::MAX);
        Some(announcement.min(self.housekeeping_us))
    }

    /// Announces the guest again, and forgets connections that have ended.
    pub fn tick(&mut self, now_us: u64, actions: &mut Actions) {
        while self.announcements.front().is_some_and(|due_us| *due_us <= now_us) {
            self.announcements.pop_front();
            self.addresses.announce(actions);
        }
        if now_us >= self.housekeeping_us {
            self.housekeeping_us = now_us + HOUSEKEEPING_US;
            self.rewriter.tick(now_us);
        }
    }

    /// The peer is lost, and nothing is decided.
    pub fn detach(&mut self) {
        if self.mode == Mode::Protected {
            self.mode = Mode::Detached;
        }
    }

    /// This side has won: the LAN learns where the guest is, and everything that it sends goes there.
    pub fn take_over(&mut self, now_us: u64, actions: &mut Actions) {
        if matches!(self.mode, Mode::Silent | Mode::Alone) {
            return;
        }
        self.mode = Mode::Alone;
        self.sender = None;
        self.addresses.announce(actions);
        self.announcements = ANNOUNCEMENTS_US.iter().map(|delay_us| now_us + delay_us).collect();
        self.rewriter.take_over(actions);
    }

    /// This side has lost: nothing leaves any more.
    pub fn silence(&mut self) {
        self.mode = Mode::Silent;
        self.sender = None;
        self.announcements.clear();
    }

    /// The addresses that the guest has shown.
    pub fn addresses(&self) -> &GuestAddresses {
        &self.addresses
    }

    /// The figures.
    pub fn stats(&self) -> SecondaryStats {
        SecondaryStats {
            mode: self.mode,
            epoch: self.epoch,
            mirrored_packets: self.mirrored_packets,
            mirrored_bytes: self.mirrored_bytes,
            svm_packets: self.svm_packets,
            rewrite: self.rewriter.stats(),
            digest: self.sender.as_ref().map(Sender::stats),
        }
    }
}
