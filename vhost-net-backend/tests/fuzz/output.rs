//! What may leave a primary, in the plainest words: what the PVM has sent, each as often as that, and of it what the SVM
//! has said too. Where the comparison knows better than this model, the model lets pass.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use vhost_net_backend::digest::{Key, Runs};
use vhost_net_backend::offload::FrameHeader;
use vhost_net_backend::packet::{Flags, FlowKey, Kind, Packet, Segment, Transport};
use vhost_net_backend::policy::Policy;
use vhost_net_backend::proxy::Buffer;

/// What is compared of a frame that is no TCP segment.
type Essence = (FlowKey, u16, Vec<u8>);

/// A byte of a stream: the flow's number, the sequence number, and in the lowest eight bits the byte or nothing.
type Place = u64;

fn place(flow: u64, seq: u32, byte: u8) -> Place {
    flow << 40 | u64::from(seq) << 8 | u64::from(byte)
}

/// Hashes a [`Place`] with few instructions: there is one for every byte.
#[derive(Default)]
struct PlaceHasher(u64);

impl Hasher for PlaceHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("a place is a number")
    }

    fn write_u64(&mut self, place: u64) {
        self.0 =
            place.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type PlaceHash = BuildHasherDefault<PlaceHasher>;

#[derive(Default)]
pub(super) struct Output {
    policy: Policy,
    /// The policy has rules: what they are for a fragment, its datagram says.
    has_rules: bool,
    key: Option<Box<Key>>,
    /// What the PVM sent and has not left.
    sent: HashMap<([u8; FrameHeader::BYTES], Vec<u8>), usize>,
    /// The numbers of flows here.
    flows: HashMap<FlowKey, u64>,
    /// The bytes of the PVM's streams; `None` where it has said two things.
    streams: HashMap<Place, Option<u8>, PlaceHash>,
    /// Bytes of the SVM's streams.
    said: HashSet<Place, PlaceHash>,
    /// Pieces of them by digest: the first number, the length.
    pieces: Vec<(u32, u16, u64)>,
    /// What of the PVM's streams has left.
    left: HashSet<Place, PlaceHash>,
    /// The SVM's other messages, in each epoch.
    messages: HashMap<(u64, Essence), usize>,
    /// Epochs in which the SVM has said anything.
    spoke: HashSet<u64>,
    /// There were fragments: which datagrams they become is not known here.
    fragments: bool,
}

/// The number of each byte of data, and the byte.
fn data<'a>(segment: &Segment, frame: &'a [u8]) -> impl Iterator<Item = (u32, u8)> + use<'a> {
    let first = segment.seq.wrapping_add(u32::from(segment.flags.has(Flags::SYN)));
    let bytes = &frame[segment.payload.clone()];
    bytes.iter().enumerate().map(move |(at, byte)| (first.wrapping_add(at as u32), *byte))
}

fn essence(packet: &Packet, frame: &[u8]) -> Essence {
    let (place, content) = match &packet.kind {
        Kind::Datagram { place, content, .. } => (*place, content.clone()),
        _ => (0, 0..frame.len()),
    };
    (packet.flow_from_guest(frame), place, frame[content].to_vec())
}

/// Whether one word of the SVM serves for any number of the PVM's.
fn is_repeatable(packet: &Packet) -> bool {
    match &packet.kind {
        Kind::Datagram { transport, .. } => {
            matches!(transport, Transport::Icmp { discovery: true, .. } | Transport::Other { protocol: 2 })
        }
        Kind::Arp => true,
        _ => packet.ethertype == 0x0806,
    }
}

/// Whether it is a fragment of what may be a TCP segment: where in it the header is, behind others, is not known here.
fn may_be_of_tcp(packet: &Packet) -> bool {
    let protocol = match packet.kind {
        Kind::Datagram { transport: Transport::Fragment { protocol }, .. } => Some(protocol),
        _ => None,
    };
    protocol.is_some_and(|protocol| matches!(protocol, 0 | 6 | 43 | 44 | 60))
}

/// A frame but for what may be changed in it: the window of a TCP segment, and with it the checksum.
fn sent(frame: &[u8]) -> Vec<u8> {
    const CHANGED: std::ops::Range<usize> = 14..18;
    let packet = Packet::parse(frame);
    let mut frame = frame.to_vec();
    match packet.kind {
        Kind::Tcp { segment, .. } => frame[segment.at..][CHANGED].fill(0),
        // where in it a header begins that is behind others is not known here
        Kind::Datagram {
            transport: Transport::Fragment { protocol: 0 | 6 | 43 | 44 | 60 }, content, ..
        } => {
            frame[content].fill(0);
        }
        _ => {}
    }
    frame
}

impl Output {
    pub(super) fn new(policy: Policy, has_rules: bool, key: Option<Box<Key>>) -> Self {
        Self { policy, has_rules, key, ..Self::default() }
    }

    pub(super) fn pvm_sends(&mut self, header: FrameHeader, frame: &[u8]) {
        *self.sent.entry((*header.bytes(), sent(frame))).or_default() += 1;
        let packet = Packet::parse(frame);
        self.fragments |= packet.is_fragment();
        if let Kind::Tcp { segment, .. } = &packet.kind {
            let flow = self.number(packet.flow_from_guest(frame));
            for (seq, byte) in data(segment, frame) {
                let known = self.streams.entry(place(flow, seq, 0)).or_insert(Some(byte));
                *known = known.filter(|known| *known == byte);
            }
        }
    }

    /// The SVM says a frame in an epoch.
    pub(super) fn svm_says(&mut self, epoch: u64, frame: &[u8]) {
        self.spoke.insert(epoch);
        let packet = Packet::parse(frame);
        self.fragments |= packet.is_fragment();
        if let Kind::Tcp { segment, .. } = &packet.kind {
            let flow = self.number(packet.flow_from_guest(frame));
            self.said.extend(data(segment, frame).map(|(seq, byte)| place(flow, seq, byte)));
        } else {
            *self.messages.entry((epoch, essence(&packet, frame))).or_default() += 1;
        }
    }

    /// The SVM says something by digests.
    pub(super) fn svm_digests(&mut self, epoch: u64, payload: &[u8]) {
        for run in Runs::parse(payload).into_iter().flatten() {
            self.spoke.insert(epoch);
            let mut seq = run.seq;
            for (bytes, digest) in run.pieces() {
                self.pieces.push((seq, bytes, digest));
                seq = seq.wrapping_add(bytes.into());
            }
        }
    }

    fn number(&mut self, flow: FlowKey) -> u64 {
        let next = self.flows.len() as u64;
        *self.flows.entry(flow).or_insert(next)
    }

    /// Whether digests say what the PVM says there. What a digest says has been said from then on.
    fn is_digested(&mut self, flow: u64, seq: u32) -> bool {
        let Some(key) = &self.key else {
            return false;
        };
        for &(first, bytes, digest) in &self.pieces {
            if seq.wrapping_sub(first) >= u32::from(bytes) {
                continue;
            }
            let numbers = (0..u32::from(bytes)).map(|at| first.wrapping_add(at));
            let streams: Vec<_> =
                numbers.clone().map_while(|seq| self.streams.get(&place(flow, seq, 0))).copied().collect();
            if streams.contains(&None) {
                return true;
            }
            let pvm: Vec<u8> = streams.into_iter().flatten().collect();
            if pvm.len() == usize::from(bytes) && key.digest(first, &pvm) == digest {
                self.said.extend(numbers.zip(pvm).map(|(seq, byte)| place(flow, seq, byte)));
                return true;
            }
        }
        false
    }

    /// A frame leaves the primary, by a commit or by what the SVM has said in this epoch.
    pub(super) fn leaves(&mut self, frame: &Buffer, epoch: u64, by_commit: bool) {
        let packet = Packet::parse(frame);
        let flow = packet.flow_from_guest(frame);
        match self.sent.get_mut(&(*frame.header().bytes(), sent(frame))) {
            Some(count) if *count > 0 => *count -= 1,
            // made to open a window again
            _ => {
                let is_made = matches!(&packet.kind, Kind::Tcp { segment, .. } if segment.is_pure_ack());
                assert!(is_made, "Nobody has sent {:02x?}", &frame[..]);
            }
        }
        let is_free = by_commit || !self.policy.compares(&flow) || self.fragments;
        if let Kind::Tcp { segment, .. } = &packet.kind {
            let flow = self.number(flow);
            for (seq, byte) in data(segment, frame) {
                let is_said = is_free
                    || segment.flags.has(Flags::RST)
                    || self.left.contains(&place(flow, seq, 0))
                    || self.said.contains(&place(flow, seq, byte))
                    || self.is_digested(flow, seq);
                assert!(is_said, "The SVM has not said {byte:#x} at {seq}: {:02x?}", &frame[..]);
                self.left.insert(place(flow, seq, 0));
            }
        } else if !is_free {
            match self.messages.get_mut(&(epoch, essence(&packet, frame))) {
                Some(count) if *count > 0 => *count -= usize::from(!is_repeatable(&packet)),
                _ => panic!("The SVM has not said {:02x?}", &frame[..]),
            }
        } else if !by_commit && !self.has_rules && !may_be_of_tcp(&packet) {
            assert!(self.spoke.contains(&epoch), "The PVM's word was enough: {:02x?}", &frame[..]);
        }
    }

    /// Frames of the PVM that have not left.
    pub(super) fn waiting(&self) -> usize {
        self.sent.values().sum()
    }
}
