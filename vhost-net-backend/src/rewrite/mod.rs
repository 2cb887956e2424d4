//! The secondary's rewriter: the client and the SVM each see the sequence numbers and timestamps that they expect.
//!
//! A connection that was opened since the last checkpoint has one initial sequence number at the PVM and another at the
//! SVM. What the SVM sends is put into the PVM's space, what comes for it into its own. Nothing that the SVM sends on
//! such a connection goes to the primary before the PVM's number is known here: so when the primary releases the PVM's
//! SYN, because it has the SVM's, this side is able to go on with the connection alone.
//!
//! Of a segment in fragments the first one has the numbers, and the checksum, which is corrected by what changes (RFC
//! 1624). When a fragment cuts the header itself it passes as it is: the receiver drops it, and the sender sends it again.

mod closing;
mod connection;

use std::collections::{HashMap, VecDeque};

use serde::Serialize;

use crate::offload::FrameHeader;
use crate::packet::{Flags, FlowKey, Kind, Packet, Quoted, Segment};
use crate::proxy::Actions;
use crate::wire::{Isn, OUTPUT};
use connection::{Beginning, Change, Connection};

/// What the rewriter keeps within.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections that are known at once. One more is not rewritten, which costs a checkpoint.
    pub connections_max: usize,
    /// Bytes of packets of the SVM that wait for the PVM's SYN. What comes beyond is dropped: it belongs to connections that
    /// the client has not seen yet.
    pub held_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections_max: 65_536, held_bytes_max: 4 << 20 }
    }
}

/// Where the SVM's packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// To the primary's comparison.
    Peer {
        /// The epoch that the SVM is in.
        epoch: u64,
    },
    /// To the LAN: this side is alone.
    Lan,
}

impl Exit {
    fn send<'a>(self, header: FrameHeader, frame: &[u8], actions: &'a mut Actions) -> &'a mut [u8] {
        match self {
            Self::Peer { epoch } => actions.push_to_peer(OUTPUT, epoch, frame),
            Self::Lan => actions.push_copy_to_lan(header, frame),
        }
    }
}

/// Figures of the rewriter.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RewriteStats {
    /// Connections that it knows.
    pub connections: usize,
    /// Packets that were changed on their way to the SVM.
    pub rewritten_in: u64,
    /// Packets that were changed on their way from the SVM.
    pub rewritten_out: u64,
    /// Bytes of packets of the SVM that wait for the PVM's SYN.
    pub held_bytes: usize,
    /// Packets that were dropped for want of room to wait.
    pub dropped: u64,
}

/// Entries that one visit looks at.
const VISITED_AT_ONCE: usize = 32;

/// The rewriter of one VM.
#[derive(Debug)]
pub struct Rewriter {
    limits: Limits,
    connections: HashMap<FlowKey, Connection>,
    /// Every key once, those that were looked at longest ago in front.
    visits: VecDeque<FlowKey>,
    /// This side is alone: no new connection needs anything.
    alone: bool,
    stats: RewriteStats,
}

impl Rewriter {
    /// No connection is known: the SVM is what the PVM is.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            connections: HashMap::new(),
            visits: VecDeque::new(),
            alone: false,
            stats: RewriteStats::default(),
        }
    }

    /// The PVM has opened or accepted a connection. What waited for that goes on.
    pub fn pvm_begins(&mut self, isn: &Isn, now_us: u64, exit: Exit, actions: &mut Actions) {
        if let Some(connection) = self.entry(&isn.flow, now_us) {
            connection.pvm_begins(Beginning { isn: isn.isn, timestamp: isn.timestamp });
            self.flush(&isn.flow, exit, actions);
        }
    }

    /// A frame that is on its way to the SVM. An error about a segment of the guest (ICMP) quotes its number.
    ///
    /// It never has to wait for the SVM's SYN: the client learns of the PVM's only when the SVM's has been here.
    pub fn inbound(&mut self, header: FrameHeader, frame: &[u8], now_us: u64, actions: &mut Actions) {
        let checksum = header.checksum();
        let packet = Packet::parse_first_fragment(frame);
        let frame = actions.push_to_guest(header, frame);
        if let (Kind::Tcp { segment, addresses }, Some(key)) = (&packet.kind, packet.tcp_flow_to_guest()) {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.last_us = now_us;
                if let Some(shift) = connection.shift_in_use() {
                    connection.inbound(shift, Change { segment, checksum, frame }, addresses);
                    self.stats.rewritten_in += 1;
                }
            }
        } else if let Some(quoted) = Quoted::find(&packet, frame)
            && let Some(connection) = self.connections.get(&quoted.flow)
            && let Some(shift) = connection.shift_in_use()
        {
            shift.requote(&quoted, frame);
            self.stats.rewritten_in += 1;
        }
    }

    /// A frame that the SVM sent.
    pub fn outbound(
        &mut self,
        header: FrameHeader,
        frame: &[u8],
        now_us: u64,
        exit: Exit,
        actions: &mut Actions,
    ) {
        let packet = Packet::parse_first_fragment(frame);
        let Kind::Tcp { segment, .. } = &packet.kind else {
            exit.send(header, frame, actions);
            return;
        };
        let key = packet.flow_from_guest(frame);
        if segment.flags.has(Flags::SYN) && !segment.flags.has(Flags::RST) {
            self.svm_begins(&key, segment, frame, now_us, exit, actions);
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            exit.send(header, frame, actions);
            return;
        };
        connection.last_us = now_us;
        if let Some(shift) = connection.shift_in_use() {
            let frame = exit.send(header, frame, actions);
            connection.outbound(shift, Change { segment, checksum: header.checksum(), frame });
            self.stats.rewritten_out += 1;
        } else if connection.waits_for_pvm() {
            if self.stats.held_bytes + frame.len() <= self.limits.held_bytes_max {
                self.stats.held_bytes += frame.len();
                connection.held.push((header, frame.to_vec()));
            } else {
                self.stats.dropped += 1;
            }
        } else {
            exit.send(header, frame, actions);
        }
    }

    fn svm_begins(
        &mut self,
        key: &FlowKey,
        segment: &Segment,
        frame: &[u8],
        now_us: u64,
        exit: Exit,
        actions: &mut Actions,
    ) {
        let beginning = Beginning {
            isn: segment.seq,
            timestamp: segment.timestamps(frame).map(|timestamps| timestamps.value),
        };
        if self.alone {
            // a new connection on the ports of an old one: nobody but the SVM has ever numbered it
            if self.connections.get(key).is_some_and(|connection| !connection.is_of(&beginning)) {
                self.connections.remove(key);
            }
        } else if let Some(connection) = self.entry(key, now_us) {
            connection.svm_begins(beginning);
            self.flush(key, exit, actions);
        }
    }

    /// The connection, which is made if there is room.
    fn entry(&mut self, key: &FlowKey, now_us: u64) -> Option<&mut Connection> {
        if !self.connections.contains_key(key) {
            if self.connections.len() >= self.limits.connections_max && !self.visit(now_us) {
                return None;
            }
            self.visits.push_back(*key);
        }
        let connection = self.connections.entry(*key).or_default();
        connection.last_us = now_us;
        Some(connection)
    }

    /// Lets go what waited, if both ends of the connection are known now.
    fn flush(&mut self, key: &FlowKey, exit: Exit, actions: &mut Actions) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let Some(shift) = connection.shift() else {
            return;
        };
        for (header, frame) in std::mem::take(&mut connection.held) {
            self.stats.held_bytes -= frame.len();
            self.stats.rewritten_out += 1;
            let packet = Packet::parse_first_fragment(&frame);
            let frame = exit.send(header, &frame, actions);
            if let Kind::Tcp { segment, .. } = &packet.kind {
                connection.outbound(shift, Change { segment, checksum: header.checksum(), frame });
            }
        }
    }

    /// A checkpoint was committed: the SVM is what the PVM is, and what waited is part of that or never was.
    pub fn commit(&mut self) {
        self.connections.clear();
        self.visits.clear();
        self.stats.held_bytes = 0;
    }

    /// This side goes on alone. Connections whose two ends are known stay as they are until they are closed; the client
    /// has seen none of the others.
    pub fn take_over(&mut self, actions: &mut Actions) {
        self.alone = true;
        self.stats.held_bytes = 0;
        self.connections.retain(|_, connection| {
            for (header, frame) in connection.held.drain(..) {
                actions.push_copy_to_lan(header, &frame);
            }
            connection.shift().is_some()
        });
    }

    /// Forgets connections that ended long ago; a few are looked at each time.
    pub fn tick(&mut self, now_us: u64) {
        self.visit(now_us);
    }

    fn visit(&mut self, now_us: u64) -> bool {
        let mut dropped = false;
        for _ in 0..VISITED_AT_ONCE.min(self.visits.len()) {
            let Some(key) = self.visits.pop_front() else {
                break;
            };
            match self.connections.get(&key) {
                Some(connection) if connection.may_go(now_us) => {
                    self.connections.remove(&key);
                    dropped = true;
                }
                Some(_) => self.visits.push_back(key),
                None => {}
            }
        }
        dropped
    }

    /// The figures.
    pub fn stats(&self) -> RewriteStats {
        RewriteStats { connections: self.connections.len(), ..self.stats.clone() }
    }
}

#[cfg(test)]
mod tests;
