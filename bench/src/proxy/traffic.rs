//! The packets that a comparison is fed with: what a guest says that serves many clients, each in its turn.

use anyhow::{Context, Result};
use etherparse::{PacketBuilder, TcpOptionElement};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const CLIENT_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const GUEST: [u8; 4] = [10, 0, 0, 2];
/// The clients' addresses are those from here on.
const FIRST_CLIENT: u32 = u32::from_be_bytes([10, 64, 0, 0]);
const GUEST_PORT: u16 = 80;
const CLIENT_PORT: u16 = 40_000;

const ISN: u32 = 1000;
/// What the guest has acknowledged when it begins to speak.
const FIRST_ACK: u32 = 5000;
/// What it acknowledges at a time where that is all that it says: two full segments (RFC 9293 §3.8.6.3).
const ACKED_BYTES: u32 = 2 * 1448;
const WINDOW: u16 = 0x2000;

/// Where the parts of a frame are that differ from one packet to the next.
const DESTINATION_AT: usize = 14 + 16;
const TRANSPORT_AT: usize = 14 + 20;
const SEQ_AT: usize = TRANSPORT_AT + 4;
const ACK_AT: usize = TRANSPORT_AT + 8;

/// What carries the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Established connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// What carries the data.
    pub protocol: Protocol,
    /// Data of a packet; with none each is an acknowledgment.
    pub payload_bytes: usize,
    /// Clients, each with a flow.
    pub flows: u32,
}

impl Traffic {
    /// What it is called in the table.
    pub fn name(&self) -> String {
        let protocol = match self.protocol {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        };
        format!(
            "{protocol} {} B, {} flow{}",
            self.payload_bytes,
            self.flows,
            if self.flows == 1 { "" } else { "s" }
        )
    }
}

/// The packets of one kind of traffic, one after the other. Their checksums are those of no packet in particular: who
/// compares does not look at them.
#[derive(Clone, Debug)]
pub struct Packets {
    traffic: Traffic,
    template: Vec<u8>,
    first_flow: u32,
    flow: u32,
    /// How often each flow has had its turn.
    turn: u32,
}

impl Packets {
    /// From the first packet on.
    ///
    /// # Errors
    /// No packet holds so much data.
    pub fn new(traffic: Traffic) -> Result<Self> {
        let ip = PacketBuilder::ethernet2(GUEST_MAC, CLIENT_MAC).ipv4(GUEST, FIRST_CLIENT.to_be_bytes(), 64);
        let data: Vec<u8> = (0..traffic.payload_bytes).map(|at| (at * 7) as u8).collect();
        let mut template = Vec::new();
        match traffic.protocol {
            Protocol::Tcp => {
                ip.tcp(GUEST_PORT, CLIENT_PORT, ISN, WINDOW).ack(FIRST_ACK).write(&mut template, &data)
            }
            Protocol::Udp => ip.udp(GUEST_PORT, CLIENT_PORT).write(&mut template, &data),
        }
        .context("A packet")?;
        Ok(Self { traffic, template, first_flow: 0, flow: 0, turn: 0 })
    }

    /// The same of other flows: the first of them has this number.
    #[must_use]
    pub fn from_flow(mut self, first: u32) -> Self {
        self.first_flow = first;
        self
    }

    /// Length of each frame.
    pub fn frame_bytes(&self) -> usize {
        self.template.len()
    }

    /// Frames that begin the connections: the guest's SYN with ACK, one for each flow. Datagrams need none.
    ///
    /// # Errors
    /// Such a frame cannot be built.
    pub fn openings(&self) -> Result<Vec<Vec<u8>>> {
        if self.traffic.protocol == Protocol::Udp {
            return Ok(Vec::new());
        }
        let options = [
            TcpOptionElement::MaximumSegmentSize(1460),
            TcpOptionElement::Noop,
            TcpOptionElement::WindowScale(7),
        ];
        let build = |flow: u32| {
            let client = FIRST_CLIENT + self.first_flow + flow;
            let packet = PacketBuilder::ethernet2(GUEST_MAC, CLIENT_MAC)
                .ipv4(GUEST, client.to_be_bytes(), 64)
                .tcp(GUEST_PORT, CLIENT_PORT, ISN - 1, WINDOW)
                .syn()
                .ack(FIRST_ACK)
                .options(&options)
                .context("The options of a SYN")?;
            let mut frame = Vec::new();
            packet.write(&mut frame, &[]).context("A SYN")?;
            Ok(frame)
        };
        (0..self.traffic.flows).map(build).collect()
    }

    /// Writes the next frame to the end of `to`.
    #[inline]
    pub fn push_next(&mut self, to: &mut Vec<u8>) {
        let start = to.len();
        to.extend_from_slice(&self.template);
        self.write_numbers(&mut to[start..]);
    }

    #[inline]
    fn write_numbers(&mut self, frame: &mut [u8]) {
        let Self { first_flow, flow, turn, .. } = *self;
        let mut write = |at: usize, value: u32| frame[at..at + 4].copy_from_slice(&value.to_be_bytes());
        write(DESTINATION_AT, FIRST_CLIENT + first_flow + flow);
        let bytes = self.traffic.payload_bytes;
        match self.traffic.protocol {
            Protocol::Tcp if bytes == 0 => {
                // the SYN has acknowledged nothing of that yet
                write(ACK_AT, FIRST_ACK.wrapping_add(turn.wrapping_add(1).wrapping_mul(ACKED_BYTES)));
            }
            Protocol::Tcp => write(SEQ_AT, ISN.wrapping_add(turn.wrapping_mul(bytes as u32))),
            Protocol::Udp => {}
        }
        if bytes >= 4 {
            // no two packets of a flow say the same
            write(self.template.len() - bytes, turn);
        }
        self.flow += 1;
        if self.flow == self.traffic.flows {
            (self.flow, self.turn) = (0, turn.wrapping_add(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use vhost_net_backend::packet::{Kind, Packet};

    use super::*;

    fn frames(protocol: Protocol, payload_bytes: usize, flows: u32, count: usize) -> Vec<Vec<u8>> {
        let mut packets = Packets::new(Traffic { protocol, payload_bytes, flows }).unwrap();
        let mut next = || {
            let mut frame = Vec::new();
            packets.push_next(&mut frame);
            frame
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn flows_take_turns_and_streams_go_on_after_their_syn() {
        let frames = frames(Protocol::Tcp, 64, 3, 6);
        let parsed: Vec<Packet> = frames.iter().map(|frame| Packet::parse(frame)).collect();
        let flow = |at: usize| parsed[at].flow_from_guest(&frames[at]);
        assert!(flow(0) == flow(3) && flow(2) == flow(5) && flow(0) != flow(1) && flow(1) != flow(2));
        let segment = |packet: &Packet| match &packet.kind {
            Kind::Tcp { segment, .. } => (segment.seq, segment.payload.len()),
            other => panic!("{other:?}"),
        };
        assert_eq!(segment(&parsed[0]), (ISN, 64));
        assert_eq!(segment(&parsed[3]), (ISN + 64, 64));
        let traffic = Traffic { protocol: Protocol::Tcp, payload_bytes: 64, flows: 3 };
        let openings = Packets::new(traffic).unwrap().openings().unwrap();
        assert_eq!(openings.len(), 3);
        let opening = Packet::parse(&openings[1]);
        assert_eq!(opening.flow_from_guest(&openings[1]), flow(1));
        assert_eq!(segment(&opening), (ISN - 1, 0));
    }

    #[test]
    fn acknowledgments_advance_and_datagrams_differ() {
        let acks = frames(Protocol::Tcp, 0, 1, 2);
        let ack = |frame: &[u8]| match Packet::parse(frame).kind {
            Kind::Tcp { segment, .. } => segment.ack,
            other => panic!("{other:?}"),
        };
        assert_eq!(ack(&acks[0]), FIRST_ACK + ACKED_BYTES);
        assert_eq!(ack(&acks[1]) - ack(&acks[0]), ACKED_BYTES);
        let datagrams = frames(Protocol::Udp, 64, 1, 2);
        assert_ne!(datagrams[0], datagrams[1]);
        assert!(matches!(Packet::parse(&datagrams[0]).kind, Kind::Datagram { .. }));
    }
}
