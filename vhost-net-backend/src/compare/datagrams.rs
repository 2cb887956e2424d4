//! Comparison of what comes in messages: UDP, ICMP, other protocols over IP, fragments, and frames as a whole.

use std::collections::VecDeque;

use super::mismatches::Differing;
use crate::packet::{ETHERTYPE_ARP, FlowKey, Kind, PROTOCOL_IGMP, Packet, Transport};

/// What the SVM said, as far as it is compared.
#[derive(Debug)]
struct Message {
    place: u16,
    content: Vec<u8>,
}

/// Distinct messages of the SVM that are remembered where one serves for any number of the PVM's.
const REPEATABLE_MAX: usize = 64;

/// Bytes that a message costs beside its own.
const MESSAGE_COST: usize = 64;

/// What the SVM said on one flow and the PVM has not.
#[derive(Debug)]
pub(super) struct Messages {
    said: VecDeque<Message>,
    bytes: usize,
    /// ARP, group reports and neighbour discovery are repeated by timers and mean the same each time: what the SVM has said once in
    /// an epoch it has said, however often the PVM does.
    repeatable: bool,
    /// Whether packets leave in the order in which the PVM sent them. Frames that belong to no flow need not wait
    /// for each other.
    pub(super) ordered: bool,
}

/// What is compared of a packet.
pub(super) fn essence<'a>(packet: &Packet, frame: &'a [u8]) -> (u16, &'a [u8]) {
    match &packet.kind {
        Kind::Datagram { place, content, .. } => (*place, &frame[content.clone()]),
        _ => (0, frame),
    }
}

impl Messages {
    pub(super) fn new(flow: &FlowKey) -> Self {
        let (repeatable, ordered) = match flow {
            FlowKey::Ip { transport: Transport::Icmp { discovery, .. }, .. } => (*discovery, !*discovery),
            FlowKey::Ip { transport: Transport::Other { protocol: PROTOCOL_IGMP }, .. } => (true, false),
            FlowKey::Ip { .. } => (false, true),
            FlowKey::Frame { ethertype, .. } => (*ethertype == ETHERTYPE_ARP, false),
        };
        Self { said: VecDeque::new(), bytes: 0, repeatable, ordered }
    }

    /// Whether one message of the SVM serves for any number of the PVM's.
    pub(super) fn repeatable(&self) -> bool {
        self.repeatable
    }

    /// About how much memory it takes.
    pub(super) fn cost(&self) -> usize {
        self.bytes + self.said.len() * MESSAGE_COST
    }

    /// Whether the SVM has said this; then it is used up.
    pub(super) fn take(&mut self, (place, content): (u16, &[u8])) -> bool {
        let Some(index) =
            self.said.iter().position(|message| message.place == place && message.content == content)
        else {
            return false;
        };
        if !self.repeatable {
            self.said.remove(index);
            self.bytes -= content.len();
        }
        true
    }

    /// Keeps what the SVM said.
    pub(super) fn keep(&mut self, (place, content): (u16, &[u8])) {
        if self.repeatable {
            if self.said.iter().any(|message| message.place == place && message.content == content) {
                return;
            }
            if self.said.len() == REPEATABLE_MAX {
                self.forget_oldest();
            }
        }
        self.bytes += content.len();
        self.said.push_back(Message { place, content: content.to_vec() });
    }

    fn forget_oldest(&mut self) {
        if let Some(message) = self.said.pop_front() {
            self.bytes -= message.content.len();
        }
    }

    pub(super) fn clear(&mut self) {
        self.said.clear();
        self.bytes = 0;
    }

    /// How the PVM's message differs from the oldest that the SVM said and the PVM did not.
    pub(super) fn difference(&self, (_, content): (u16, &[u8])) -> Option<Differing> {
        let theirs = &self.said.front()?.content;
        let same = content.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        Some(Differing::at(same as u64, same, content, &theirs[same..]))
    }
}
