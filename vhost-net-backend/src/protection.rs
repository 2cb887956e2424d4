//! What a back end may do with its VM's packets: which half of a pair it is, and how the pair fares.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use colo::control::Role;
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};

use crate::digest::{Key, PRIME};
use crate::link::Link;
use crate::offload::FrameHeader;
use crate::proxy::{Actions, Buffer, Config, DigestMode, OrderError, Primary, Secondary};
use crate::wire::WireError;

/// So much may wait for the SVM to take it before the link is left alone.
const UNDELIVERED_BYTES_MAX: usize = 4 << 20;

/// What to do with frames from the LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lan {
    /// Give them to the guest.
    Deliver,
    /// Leave them in the tap: they will be wanted in a moment.
    Leave,
    /// Throw them away: they are the other side's.
    Ignore,
}

/// Where a pair stands, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Both halves run.
    Paired,
    /// The link is gone; who goes on is not decided.
    Undecided,
    /// This side goes on alone.
    Alone,
    /// This side has lost, or has lost its controller.
    Silent,
}

/// The proxy of this side.
#[derive(Debug)]
pub(crate) enum Half {
    /// Of the PVM.
    Primary(Box<Primary>),
    /// Of the SVM.
    Secondary(Box<Secondary>),
}

/// Calls the same method of either half.
macro_rules! both {
    ($half:expr, $proxy:ident => $call:expr) => {
        match $half {
            Half::Primary($proxy) => $call,
            Half::Secondary($proxy) => $call,
        }
    };
}

/// One half of a pair.
#[derive(Debug)]
pub(crate) struct Protection {
    pub(crate) half: Half,
    pub(crate) phase: Phase,
    /// While paired.
    pub(crate) link: Option<Link>,
    /// What the proxy wants done; empty between two turns.
    pub(crate) actions: Actions,
    /// Secondary: the marker is here and the commit is not. Nothing is taken from the link.
    pub(crate) awaiting_commit: bool,
    /// Secondary: what the SVM has had no buffers for.
    pub(crate) undelivered: Undelivered,
    origin: Instant,
}

/// A secret for the digests of one link.
fn random_key() -> io::Result<Box<Key>> {
    loop {
        let mut bytes = [0; 8];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        // all but two of the numbers of 61 bits are keys
        if let Some(key) = Key::new(u64::from_ne_bytes(bytes) & PRIME) {
            return Ok(key);
        }
    }
}

/// Frames that wait for the guest.
#[derive(Debug, Default)]
pub(crate) struct Undelivered {
    frames: VecDeque<Buffer>,
    bytes: usize,
}

impl Undelivered {
    pub(crate) fn push(&mut self, frame: &Buffer) {
        self.bytes += frame.len();
        let mut copy = Buffer::from(&frame[..]);
        copy.set_header(frame.header());
        self.frames.push_back(copy);
    }

    pub(crate) fn front(&self) -> Option<&Buffer> {
        self.frames.front()
    }

    pub(crate) fn pop(&mut self) {
        self.bytes -= self.frames.pop_front().map_or(0, |frame| frame.len());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}

impl Protection {
    /// One half, of which the actions are to be carried out at once.
    ///
    /// # Errors
    /// The link is broken, or the system has no random numbers.
    pub(crate) fn new(role: Role, config: &Config, epoch: u64, link: Link) -> io::Result<Self> {
        let mut actions = Actions::new();
        let half = match role {
            Role::Primary => {
                let mut primary = Primary::new(config, epoch, 0);
                let digests = match config.digest {
                    DigestMode::Auto => !link.is_local()?,
                    DigestMode::On => true,
                    DigestMode::Off => false,
                };
                if digests {
                    primary.want_digests(random_key()?, &mut actions);
                }
                Half::Primary(Box::new(primary))
            }
            Role::Secondary => Half::Secondary(Box::new(Secondary::new(config, epoch, 0))),
        };
        Ok(Self {
            half,
            phase: Phase::Paired,
            link: Some(link),
            actions,
            awaiting_commit: false,
            undelivered: Undelivered::default(),
            origin: Instant::now(),
        })
    }

    /// Whether what the guest sends may be taken.
    pub(crate) fn takes_output(&self) -> bool {
        let accepts = || both!(&self.half, proxy => proxy.accepts_output());
        match self.phase {
            Phase::Paired => self.link.as_ref().is_some_and(|link| !link.congested()) && accepts(),
            Phase::Alone => accepts(),
            Phase::Undecided | Phase::Silent => false,
        }
    }

    pub(crate) fn lan(&self) -> Lan {
        match (self.phase, &self.half) {
            (Phase::Silent, _) | (Phase::Paired, Half::Secondary(_)) => Lan::Ignore,
            (Phase::Undecided, _) => Lan::Leave,
            _ if !self.undelivered.is_empty() => Lan::Leave,
            (Phase::Alone, _) => Lan::Deliver,
            (Phase::Paired, Half::Primary(_)) => match &self.link {
                Some(link) if !link.congested() => Lan::Deliver,
                _ => Lan::Leave,
            },
        }
    }

    /// Whether the peer is listened to.
    pub(crate) fn takes_from_peer(&self) -> bool {
        self.phase == Phase::Paired && !self.awaiting_commit && self.undelivered.bytes < UNDELIVERED_BYTES_MAX
    }

    /// The guest has sent `frame`, which is of the pool of [`Protection::actions`].
    pub(crate) fn guest_output(&mut self, frame: Buffer) {
        let now_us = self.now_us();
        both!(&mut self.half, proxy => proxy.guest_output(frame, now_us, &mut self.actions));
    }

    /// The guest has nothing more to send for now.
    pub(crate) fn guest_pauses(&mut self) {
        if let Half::Secondary(secondary) = &mut self.half {
            secondary.flush(&mut self.actions);
        }
    }

    pub(crate) fn lan_input(&mut self, header: FrameHeader, frame: &[u8]) {
        let now_us = self.now_us();
        both!(&mut self.half, proxy => proxy.headed_lan_input(header, frame, now_us, &mut self.actions));
    }

    /// Hands the next frame of the peer to the proxy. False when there is none.
    ///
    /// # Errors
    /// What came is worthless, and so is the link.
    pub(crate) fn peer_frame(&mut self) -> Result<bool, String> {
        let now_us = self.now_us();
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        let Some((header, payload)) = link.next_frame().map_err(|error| error.to_string())? else {
            return Ok(false);
        };
        let (kind, epoch) = (header.kind, header.epoch);
        both!(&mut self.half, proxy => proxy.peer_frame(kind, epoch, payload, now_us, &mut self.actions))
            .map_err(|error: WireError| error.to_string())?;
        Ok(true)
    }

    /// When the proxy wants to be looked at again, in µs from now.
    pub(crate) fn due_in_us(&self) -> Option<u64> {
        if !matches!(self.phase, Phase::Paired | Phase::Alone) {
            return None;
        }
        let deadline = both!(&self.half, proxy => proxy.next_deadline())?;
        Some(deadline.saturating_sub(self.now_us()))
    }

    pub(crate) fn tick(&mut self) {
        let now_us = self.now_us();
        both!(&mut self.half, proxy => proxy.tick(now_us, &mut self.actions));
    }

    /// The VM is paused: marks the end of the epoch on the link. A controller that has not heard yet that the link is gone
    /// is told so by the event; its marker goes the way of all that is sent on a dead link.
    pub(crate) fn marker(&mut self, epoch: u64) -> Result<(), String> {
        match self.phase {
            Phase::Paired => {}
            Phase::Undecided => return Ok(()),
            Phase::Alone | Phase::Silent => return Err("This side is not protected any more".into()),
        }
        match &mut self.half {
            Half::Primary(proxy) => {
                proxy.marker(epoch, &mut self.actions).map_err(|error: OrderError| error.to_string())
            }
            Half::Secondary(_) => Err("Only the primary is told to send a marker".into()),
        }
    }

    /// The epoch is committed. That may be told after the link is gone: the commit came first.
    pub(crate) fn commit(&mut self, epoch: u64) -> Result<(), String> {
        if !matches!(self.phase, Phase::Paired | Phase::Undecided) {
            return Err("This side is not protected any more".into());
        }
        let now_us = self.now_us();
        let committed: Result<(), OrderError> = match &mut self.half {
            Half::Primary(proxy) => proxy.commit(epoch, now_us, &mut self.actions),
            Half::Secondary(proxy) => proxy.commit(epoch, &mut self.actions),
        };
        committed.map_err(|error| error.to_string())?;
        // the PVM's state, which the SVM has now, contains them
        self.undelivered.clear();
        self.awaiting_commit = false;
        Ok(())
    }

    /// The link is gone.
    pub(crate) fn detach(&mut self) {
        if self.phase == Phase::Paired {
            self.phase = Phase::Undecided;
            both!(&mut self.half, proxy => proxy.detach());
        }
        self.link = None;
    }

    pub(crate) fn take_over(&mut self) -> Result<(), String> {
        match self.phase {
            Phase::Silent => return Err("This side has lost already".into()),
            Phase::Alone => return Ok(()),
            Phase::Paired | Phase::Undecided => {}
        }
        self.detach();
        self.phase = Phase::Alone;
        self.awaiting_commit = false;
        let now_us = self.now_us();
        both!(&mut self.half, proxy => proxy.take_over(now_us, &mut self.actions));
        Ok(())
    }

    pub(crate) fn silence(&mut self) {
        self.phase = Phase::Silent;
        self.link = None;
        self.actions.clear();
        self.undelivered.clear();
        both!(&mut self.half, proxy => proxy.silence());
    }

    pub(crate) fn status(&self) -> Value {
        json!({
            "role": match self.half { Half::Primary(_) => "primary", Half::Secondary(_) => "secondary" },
            "phase": match self.phase {
                Phase::Paired => "paired",
                Phase::Undecided => "undecided",
                Phase::Alone => "alone",
                Phase::Silent => "silent",
            },
            "awaiting_commit": self.awaiting_commit,
            "link_outgoing_bytes": self.link.as_ref().map_or(0, Link::outgoing_bytes),
            "undelivered_bytes": self.undelivered.bytes,
            "clock_us": self.now_us(),
            "proxy": both!(&self.half, proxy => json!(proxy.stats())),
        })
    }

    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }
}
