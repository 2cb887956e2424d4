//! The PVM's packets that may not leave yet, in the order in which it sent them.

use std::collections::VecDeque;

use crate::packet::{FlowKey, Packet};

/// A packet that waits.
#[derive(Debug)]
pub(super) struct HeldPacket {
    pub(super) flow: FlowKey,
    pub(super) packet: Packet,
    pub(super) frame: Vec<u8>,
    pub(super) since_us: u64,
    /// The SVM has said the same, and it waits only for its turn.
    pub(super) matched: bool,
}

/// Its place in the order of everything that the PVM sent.
pub(super) type Order = u64;

#[derive(Debug, Default)]
pub(super) struct HeldQueue {
    /// Sorted by order; the first one is always there.
    packets: VecDeque<(Order, Option<HeldPacket>)>,
    next: Order,
    count: usize,
    bytes: usize,
    bytes_peak: usize,
    /// Memory of packets that have gone, for those that come.
    spare: Vec<Vec<u8>>,
}

/// Buffers kept for reuse.
const SPARE_MAX: usize = 256;

impl HeldQueue {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn bytes_peak(&self) -> usize {
        self.bytes_peak
    }

    /// A buffer with a copy of `frame`.
    pub(super) fn copy_of(&mut self, frame: &[u8]) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(frame);
        buffer
    }

    pub(super) fn push(&mut self, packet: HeldPacket) -> Order {
        let order = self.next;
        self.next += 1;
        self.count += 1;
        self.bytes += packet.frame.len();
        self.bytes_peak = self.bytes_peak.max(self.bytes);
        self.packets.push_back((order, Some(packet)));
        order
    }

    fn index(&self, order: Order) -> Option<usize> {
        self.packets.binary_search_by_key(&order, |entry| entry.0).ok()
    }

    pub(super) fn get(&self, order: Order) -> Option<&HeldPacket> {
        self.packets[self.index(order)?].1.as_ref()
    }

    pub(super) fn get_mut(&mut self, order: Order) -> Option<&mut HeldPacket> {
        let index = self.index(order)?;
        self.packets[index].1.as_mut()
    }

    pub(super) fn remove(&mut self, order: Order) -> Option<HeldPacket> {
        let index = self.index(order)?;
        let packet = self.packets[index].1.take()?;
        self.count -= 1;
        self.bytes -= packet.frame.len();
        while matches!(self.packets.front(), Some((_, None))) {
            self.packets.pop_front();
        }
        // one packet that waits long must not keep the places of all that have gone since
        if self.packets.len() > 2 * self.count + 1024 {
            self.packets.retain(|entry| entry.1.is_some());
        }
        Some(packet)
    }

    /// Takes the oldest one.
    pub(super) fn pop(&mut self) -> Option<HeldPacket> {
        let order = self.packets.front()?.0;
        self.remove(order)
    }

    /// Gives a packet's memory back.
    pub(super) fn recycle(&mut self, packet: HeldPacket) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(packet.frame);
        }
    }
}
