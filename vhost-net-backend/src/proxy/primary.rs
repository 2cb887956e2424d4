//! The primary's half: what comes from the LAN is mirrored, what the PVM sends is compared.

use std::collections::VecDeque;

use colo::link::HEADER_BYTES;
use serde::Serialize;

use super::{Actions, Buffer, Config, HOUSEKEEPING_US, Mode, OrderError};
use crate::compare::{Compare, CompareStats};
use crate::digest::{Key, Names, Runs, key_to_bytes};
use crate::offload::FrameHeader;
use crate::packet::{Flags, Kind, Packet};
use crate::wire::{
    ANSWER, ASK, DIGEST, EPOCH, HEADED_MIRROR, ISN, Isn, KEY, MARKER, MIRROR, OUTPUT, WireError, frame,
};

/// Bytes that a message of the next epoch costs beside its own.
const EARLY_COST: usize = 64;

/// Figures of the primary's half.
#[derive(Clone, Debug, Serialize)]
pub struct PrimaryStats {
    /// How things stand.
    pub mode: Mode,
    /// The epoch that is running.
    pub epoch: u64,
    /// Packets that were mirrored to the secondary.
    pub mirrored_packets: u64,
    /// Bytes of them.
    pub mirrored_bytes: u64,
    /// Packets of the SVM that came too late for their epoch.
    pub stale_packets: u64,
    /// Bytes of the link's frames that brought the SVM's output, headers included.
    pub svm_link_bytes: u64,
    /// The comparison.
    pub compare: CompareStats,
}

/// The primary's half of the proxy.
#[derive(Debug)]
pub struct Primary {
    mode: Mode,
    epoch: u64,
    /// The end of the running epoch has been marked on the link.
    marked: bool,
    compare: Compare,
    /// What the SVM said in the next epoch: it may hear of a commit first.
    early: VecDeque<(u16, Vec<u8>)>,
    early_bytes: usize,
    early_bytes_max: usize,
    /// Numbers of the flows that the SVM's digests are of, if it may send any.
    names: Option<Names>,
    housekeeping_us: u64,
    mirrored_packets: u64,
    mirrored_bytes: u64,
    stale_packets: u64,
    svm_link_bytes: u64,
}

impl Primary {
    /// Protection begins in `epoch`: from now on the PVM's packets wait for the SVM's.
    pub fn new(config: &Config, epoch: u64, now_us: u64) -> Self {
        Self {
            mode: Mode::Protected,
            epoch,
            marked: false,
            compare: Compare::with_policy(config.compare.clone(), config.policy.clone()),
            early: VecDeque::new(),
            early_bytes: 0,
            early_bytes_max: config.compare.svm_bytes_max,
            names: None,
            housekeeping_us: now_us + HOUSEKEEPING_US,
            mirrored_packets: 0,
            mirrored_bytes: 0,
            stale_packets: 0,
            svm_link_bytes: 0,
        }
    }

    /// Has the secondary send digests made with this key, which nobody else knows. To be called once, first of all.
    pub fn want_digests(&mut self, key: Box<Key>, actions: &mut Actions) {
        actions.push_to_peer(KEY, self.epoch, &key_to_bytes(&key));
        self.compare.expect_digests(key);
        self.names = Some(Names::default());
    }

    /// Asks the secondary for bytes, as the comparison needs them. After the marker a commit does without.
    fn send_asks(&mut self, actions: &mut Actions) {
        for ask in self.compare.take_asks() {
            if let (Mode::Protected, false, Some(bytes)) = (self.mode, self.marked, ask.to_bytes()) {
                actions.push_to_peer(ASK, self.epoch, &bytes);
            }
        }
    }

    /// The PVM has sent this frame.
    pub fn guest_output(&mut self, frame: Buffer, now_us: u64, actions: &mut Actions) {
        match self.mode {
            Mode::Alone => actions.push_to_lan(frame),
            Mode::Silent => actions.pool().give(frame),
            Mode::Detached | Mode::Protected => {
                let packet = Packet::parse(&frame);
                if self.mode == Mode::Protected {
                    self.tell_isn(&frame, &packet, actions);
                }
                self.compare.pvm_says(frame, packet, now_us, actions);
                self.send_asks(actions);
            }
        }
    }

    /// The secondary's rewriter must know where a connection of the PVM begins before anyone else does.
    fn tell_isn(&self, frame: &[u8], packet: &Packet, actions: &mut Actions) {
        let Kind::Tcp { segment, .. } = &packet.kind else {
            return;
        };
        if !segment.flags.has(Flags::SYN) || segment.flags.has(Flags::RST) {
            return;
        }
        let flow = packet.flow_from_guest(frame);
        if self.compare.has_seen_begin(&flow, segment.seq) {
            // sent again: the secondary knows, or a checkpoint has made the SVM's number the same
            return;
        }
        let timestamp = segment.timestamps(frame).map(|timestamps| timestamps.value);
        if let Some(bytes) = (Isn { flow, isn: segment.seq, timestamp }).to_bytes() {
            actions.push_to_peer(ISN, self.epoch, &bytes);
        }
    }

    /// Whether another frame may be taken from the guest. When not, its queue must wait.
    pub fn accepts_output(&self) -> bool {
        matches!(self.mode, Mode::Alone | Mode::Silent) || self.compare.has_room()
    }

    /// A frame from the LAN, which the PVM can take right now: what is mirrored before a marker must be part of the
    /// PVM's state at the checkpoint.
    pub fn lan_input(&mut self, frame: &[u8], now_us: u64, actions: &mut Actions) {
        self.headed_lan_input(FrameHeader::default(), frame, now_us, actions);
    }

    /// The same of a frame that leaves something to the guest.
    pub fn headed_lan_input(
        &mut self,
        header: FrameHeader,
        frame: &[u8],
        _now_us: u64,
        actions: &mut Actions,
    ) {
        match self.mode {
            Mode::Silent => {}
            Mode::Detached | Mode::Alone => {
                actions.push_to_guest(header, frame);
            }
            Mode::Protected => {
                let packet = Packet::parse(frame);
                if let (Kind::Tcp { segment, .. }, Some(flow)) = (&packet.kind, packet.tcp_flow_to_guest())
                    && segment.flags.has(Flags::SYN | Flags::ACK)
                {
                    let scales = segment.syn_options(frame).window_scale.is_some();
                    self.compare.remote_answers(&flow, scales);
                }
                let epoch = self.epoch + u64::from(self.marked);
                if header.is_empty() {
                    actions.push_to_peer(MIRROR, epoch, frame);
                } else {
                    actions.push_headed_to_peer(HEADED_MIRROR, epoch, header, frame);
                }
                actions.push_to_guest(header, frame);
                self.mirrored_packets += 1;
                self.mirrored_bytes += frame.len() as u64;
            }
        }
    }

    /// A frame from the secondary's net back end.
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
        match kind {
            OUTPUT | EPOCH => {}
            DIGEST | ANSWER if self.names.is_some() => {}
            _ => return Err(WireError::Kind(kind)),
        }
        if epoch > self.epoch + 1 {
            return Err(WireError::Epoch { kind, epoch, running: self.epoch });
        }
        match kind {
            EPOCH if payload.is_empty() => return Ok(()),
            EPOCH => return Err(WireError::Length { kind, bytes: payload.len() }),
            // what is malformed ends the link at once, not when its epoch comes
            DIGEST => _ = Runs::parse(payload)?,
            _ => _ = frame(kind, payload)?,
        }
        if self.mode != Mode::Protected {
            return Ok(());
        }
        self.svm_link_bytes += (payload.len() + HEADER_BYTES) as u64;
        if epoch == self.epoch {
            self.svm_says(kind, payload, now_us, actions);
            self.send_asks(actions);
        } else if epoch < self.epoch || self.early_bytes > self.early_bytes_max {
            // what is lost of the next epoch makes the PVM's packets wait for a checkpoint, nothing worse
            self.stale_packets += 1;
        } else {
            self.early_bytes += payload.len() + EARLY_COST;
            self.early.push_back((kind, payload.to_vec()));
        }
        Ok(())
    }

    /// What the SVM has said in this epoch, well formed.
    fn svm_says(&mut self, kind: u16, payload: &[u8], now_us: u64, actions: &mut Actions) {
        if kind != DIGEST {
            self.svm_output(payload, now_us, actions);
            return;
        }
        let (Some(names), Ok(runs)) = (&mut self.names, Runs::parse(payload)) else {
            return;
        };
        for run in runs {
            match names.flow_of(&run) {
                Some(flow) => self.compare.svm_digests(&flow, &run, now_us, actions),
                None => self.stale_packets += 1,
            }
        }
    }

    /// The SVM has sent this frame in the running epoch.
    pub fn svm_output(&mut self, frame: &[u8], now_us: u64, actions: &mut Actions) {
        if self.mode == Mode::Protected {
            self.compare.svm_says(frame, now_us, actions);
        }
    }

    /// The epoch that is running.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The PVM is paused, and everything that it sent or was given has been here: marks the end of the epoch.
    ///
    /// # Errors
    /// It is not the epoch that is running, or the peer is lost.
    pub fn marker(&mut self, epoch: u64, actions: &mut Actions) -> Result<(), OrderError> {
        self.check("marker", epoch)?;
        self.marked = true;
        self.compare.checkpoint_begins();
        actions.push_to_peer(MARKER, epoch, &[]);
        Ok(())
    }

    /// The secondary has committed the epoch's checkpoint: all that is held leaves, and the next epoch runs. If the link
    /// has broken meanwhile it stays held, for the secondary may have taken over.
    ///
    /// # Errors
    /// It is not the epoch that is running, or this side goes on alone already.
    pub fn commit(&mut self, epoch: u64, now_us: u64, actions: &mut Actions) -> Result<(), OrderError> {
        if self.mode == Mode::Detached && epoch == self.epoch {
            self.epoch += 1;
            return Ok(());
        }
        self.check("commit", epoch)?;
        self.compare.commit(actions);
        self.epoch += 1;
        self.marked = false;
        let lost = self.early_bytes > self.early_bytes_max;
        self.early_bytes = 0;
        self.names.iter_mut().for_each(Names::clear);
        for (kind, payload) in std::mem::take(&mut self.early) {
            self.svm_says(kind, &payload, now_us, actions);
        }
        if lost {
            // a number may have become another flow's in what was not kept
            self.names.iter_mut().for_each(Names::clear);
        }
        self.send_asks(actions);
        Ok(())
    }

    fn check(&self, order: &'static str, epoch: u64) -> Result<(), OrderError> {
        if self.mode != Mode::Protected {
            return Err(OrderError::Mode { order, mode: self.mode });
        }
        if epoch != self.epoch {
            return Err(OrderError::Epoch { order, epoch, running: self.epoch });
        }
        Ok(())
    }

    /// When [`Primary::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.mode != Mode::Protected {
            return None;
        }
        let deadline = self.compare.next_deadline().unwrap_or(u64::MAX);
        Some(deadline.min(self.housekeeping_us))
    }

    /// Looks whether something has waited too long.
    pub fn tick(&mut self, now_us: u64, actions: &mut Actions) {
        if self.mode == Mode::Protected {
            self.compare.tick(now_us, actions);
            self.send_asks(actions);
            if now_us >= self.housekeeping_us {
                self.housekeeping_us = now_us + HOUSEKEEPING_US;
            }
        }
    }

    /// The peer is lost, and nothing is decided: from now on nothing leaves.
    pub fn detach(&mut self) {
        if self.mode == Mode::Protected {
            self.mode = Mode::Detached;
            self.early.clear();
            self.compare.suspend();
        }
    }

    /// This side has won: all that is held leaves, in order, and from now on everything leaves.
    pub fn take_over(&mut self, _now_us: u64, actions: &mut Actions) {
        if self.mode != Mode::Silent {
            self.mode = Mode::Alone;
            self.early.clear();
            self.compare.commit(actions);
        }
    }

    /// This side has lost: nothing leaves any more.
    pub fn silence(&mut self) {
        self.mode = Mode::Silent;
        self.early.clear();
        self.compare.discard_all();
    }

    /// The figures.
    pub fn stats(&self) -> PrimaryStats {
        PrimaryStats {
            mode: self.mode,
            epoch: self.epoch,
            mirrored_packets: self.mirrored_packets,
            mirrored_bytes: self.mirrored_bytes,
            stale_packets: self.stale_packets,
            svm_link_bytes: self.svm_link_bytes,
            compare: self.compare.stats(),
        }
    }
}
