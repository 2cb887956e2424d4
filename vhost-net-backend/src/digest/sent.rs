//! The secondary's flows that have a number, and what was told of them by digest only: it may be asked for.

use std::collections::{HashMap, VecDeque};

use super::message::SLOTS_MAX;
use crate::packet::{FlowKey, PackedKey};
use crate::proxy::{Buffer, Pool};

/// Frames that are kept, in bytes. What finds no room goes whole.
const SENT_BYTES_MAX: usize = 16 << 20;
/// Bytes that a frame costs beside its own.
const SENT_COST: usize = 64;
/// A flow that had to be asked for goes whole for so many bytes, since it is cut differently, or differs: the first
/// time, and at most. It is twice as many each time.
const WHOLE_BYTES_MIN: usize = 8 << 10;
const WHOLE_BYTES_MAX: usize = 256 << 10;
/// Numbers that are looked at for one that may be given to another flow.
const VISITED_AT_ONCE: usize = 32;

/// A frame of which only the digest was sent.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) seq: u32,
    pub(super) end: u32,
    pub(super) frame: Buffer,
}

/// One flow.
#[derive(Debug)]
pub(super) struct Slot {
    packed: PackedKey,
    /// The primary knows whose number it is.
    pub(super) named: bool,
    /// Behind the highest byte so far, once there was one.
    pub(super) next: Option<u32>,
    /// So much goes whole before digests are tried again.
    whole_bytes: usize,
    /// The same when it is asked for next.
    next_whole_bytes: usize,
    /// The last message that tells of it.
    pub(super) message: u64,
    sent: VecDeque<Sent>,
}

impl Slot {
    /// The primary could do nothing with a digest.
    pub(super) fn was_asked_for(&mut self) {
        if self.whole_bytes == 0 {
            self.whole_bytes = self.next_whole_bytes;
            self.next_whole_bytes = WHOLE_BYTES_MAX.min(2 * self.next_whole_bytes);
        }
    }

    /// Whether so many bytes go whole for that.
    pub(super) fn goes_whole(&mut self, bytes: usize) -> bool {
        let whole = self.whole_bytes > 0;
        self.whole_bytes = self.whole_bytes.saturating_sub(bytes);
        whole
    }

    /// The SVM has sent all before `end`.
    pub(super) fn reaches(&mut self, end: u32) {
        if self.next.is_none_or(|next| is_behind(end, next)) {
            self.next = Some(end);
        }
    }
}

/// All flows.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    numbers: HashMap<PackedKey, u16, ahash::RandomState>,
    hand: usize,
    sent_bytes: usize,
}

impl Slots {
    /// The number of a flow, if it has one.
    pub(super) fn find(&self, flow: &FlowKey) -> Option<usize> {
        self.numbers.get(&PackedKey::from(flow)).map(|number| usize::from(*number))
    }

    /// A number for a flow that has none: one that is free, or that of a flow of which nothing is kept.
    pub(super) fn give(&mut self, flow: &FlowKey) -> Option<usize> {
        let packed = PackedKey::from(flow);
        let slot = Slot {
            packed,
            named: false,
            next: None,
            whole_bytes: 0,
            next_whole_bytes: WHOLE_BYTES_MIN,
            message: 0,
            sent: VecDeque::new(),
        };
        let number = if self.slots.len() < SLOTS_MAX {
            self.slots.push(slot);
            self.slots.len() - 1
        } else {
            let number = (0..VISITED_AT_ONCE)
                .map(|step| (self.hand + step) % SLOTS_MAX)
                .find(|number| self.slots[*number].sent.is_empty());
            self.hand = number.map_or(self.hand + VISITED_AT_ONCE, |number| number + 1) % SLOTS_MAX;
            let number = number?;
            self.numbers.remove(&self.slots[number].packed);
            self.slots[number] = slot;
            number
        };
        self.numbers.insert(packed, number as u16);
        Some(number)
    }

    pub(super) fn get(&mut self, number: usize) -> &mut Slot {
        &mut self.slots[number]
    }

    /// Bytes that are kept.
    pub(super) fn sent_bytes(&self) -> usize {
        self.sent_bytes
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.sent_bytes + bytes + SENT_COST <= SENT_BYTES_MAX
    }

    /// Keeps a frame.
    pub(super) fn keep(&mut self, number: usize, sent: Sent) {
        self.sent_bytes += sent.frame.len() + SENT_COST;
        self.slots[number].sent.push_back(sent);
    }

    /// Takes out the frames of a flow that `wanted` names.
    fn take(&mut self, number: usize, wanted: impl Fn(&Sent) -> bool, mut to: impl FnMut(Sent)) {
        let sent = &mut self.slots[number].sent;
        for _ in 0..sent.len() {
            match sent.pop_front() {
                Some(frame) if wanted(&frame) => {
                    self.sent_bytes -= frame.frame.len() + SENT_COST;
                    to(frame);
                }
                other => sent.extend(other),
            }
        }
    }

    /// Takes out what has a byte of a range.
    pub(super) fn take_range(&mut self, number: usize, seq: u32, bytes: u32, to: impl FnMut(Sent)) {
        let end = seq.wrapping_add(bytes);
        self.take(number, |sent| is_behind(end, sent.seq) && is_behind(sent.end, seq), to);
    }

    /// Drops what a client has: up to `ack`.
    pub(super) fn acknowledged(&mut self, number: usize, ack: u32, pool: &mut Pool) {
        let sent = &mut self.slots[number].sent;
        while sent.front().is_some_and(|first| !is_behind(first.end, ack))
            && let Some(first) = sent.pop_front()
        {
            self.sent_bytes -= first.frame.len() + SENT_COST;
            pool.give(first.frame);
        }
    }

    /// Drops all of a flow: its connection has ended, or another one begins.
    pub(super) fn forget(&mut self, number: usize, pool: &mut Pool) {
        self.take(number, |_| true, |sent| pool.give(sent.frame));
        self.slots[number].next = None;
    }

    /// Drops everything, and all numbers.
    pub(super) fn clear(&mut self, pool: &mut Pool) {
        for sent in self.slots.drain(..).flat_map(|slot| slot.sent) {
            pool.give(sent.frame);
        }
        self.numbers.clear();
        (self.hand, self.sent_bytes) = (0, 0);
    }
}

/// Whether sequence number `a` is behind `b` in the stream.
pub(super) fn is_behind(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Transport, Vlan};

    fn flow(port: u16) -> FlowKey {
        let transport = Transport::Tcp { guest_port: 1, remote_port: port };
        let (guest, remote) = ([10, 0, 0, 9].into(), [10, 0, 0, 1].into());
        FlowKey::Ip { vlan: Vlan::default(), guest, remote, transport }
    }

    fn sent(seq: u32) -> Sent {
        Sent { seq, end: seq.wrapping_add(100), frame: Buffer::from(&[0; 150][..]) }
    }

    #[test]
    fn a_number_is_given_again_when_nothing_is_kept_of_its_flow() {
        let (mut slots, mut pool) = (Slots::default(), Pool::default());
        for port in 0..SLOTS_MAX as u16 {
            let number = slots.give(&flow(port)).unwrap();
            slots.get(number).named = true;
            slots.keep(number, sent(0));
        }
        // a few are looked at each time
        for port in 5000..5000 + (SLOTS_MAX / VISITED_AT_ONCE) as u16 {
            assert_eq!(slots.give(&flow(port)), None);
        }
        slots.acknowledged(3, 100, &mut pool);
        assert_eq!(slots.give(&flow(9999)), Some(3));
        assert!(!slots.get(3).named);
        assert_eq!((slots.find(&flow(3)), slots.find(&flow(9999))), (None, Some(3)));
        slots.clear(&mut pool);
        assert_eq!((slots.sent_bytes(), slots.find(&flow(9999))), (0, None));
        assert_eq!(slots.give(&flow(1)), Some(0));
    }

    #[test]
    fn what_is_kept_is_bounded_and_goes_with_the_clients_acknowledgment() {
        let (mut slots, mut pool) = (Slots::default(), Pool::default());
        let number = slots.give(&flow(1)).unwrap();
        let mut seq = u32::MAX - 250;
        while slots.has_room(150) {
            slots.keep(number, sent(seq));
            seq = seq.wrapping_add(100);
        }
        assert!(slots.sent_bytes() <= SENT_BYTES_MAX && slots.sent_bytes() > SENT_BYTES_MAX - 300);
        let mut taken = Vec::new();
        // the first byte of one, the last of another, and what lies between, over the wrap
        slots.take_range(number, u32::MAX - 51, 102, |sent| taken.push(sent.seq));
        assert_eq!(taken, [u32::MAX - 150, u32::MAX - 50, 49]);
        slots.take_range(number, 149, 0, |_| panic!("no byte"));
        slots.acknowledged(number, 248, &mut pool);
        slots.take_range(number, 0, 300, |sent| taken.push(sent.seq));
        assert_eq!(taken[3..], [149, 249]);
        slots.forget(number, &mut pool);
        assert_eq!(slots.sent_bytes(), 0);
    }

    #[test]
    fn a_flow_that_is_asked_for_again_and_again_goes_whole_for_longer() {
        let mut slots = Slots::default();
        let number = slots.give(&flow(1)).unwrap();
        let slot = slots.get(number);
        assert!(!slot.goes_whole(1000));
        let mut whole = Vec::new();
        for _ in 0..7 {
            slot.was_asked_for();
            slot.was_asked_for();
            whole.push((0..).take_while(|_| slot.goes_whole(1024)).count());
        }
        assert_eq!(whole, [8, 16, 32, 64, 128, 256, 256]);
    }
}
