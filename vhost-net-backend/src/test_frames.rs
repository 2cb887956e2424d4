//! Frames for tests, built and checked by etherparse, so that our own parser is not its own judge.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};

use crate::proxy::{Action, Actions, Cause};

pub(crate) const GUEST: [u8; 4] = [10, 0, 0, 9];
pub(crate) const CLIENT: [u8; 4] = [10, 0, 0, 1];
pub(crate) const GUEST_PORT: u16 = 6379;
pub(crate) const CLIENT_PORT: u16 = 40_000;
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A TCP segment to be built.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tcp<'a> {
    pub(crate) from_client: bool,
    pub(crate) v6: bool,
    pub(crate) client_port_offset: u16,
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) window: u16,
    pub(crate) options: &'a [TcpOptionElement],
    pub(crate) data: &'a [u8],
}

impl Tcp<'_> {
    pub(crate) fn frame(&self) -> Vec<u8> {
        let client_port = CLIENT_PORT + self.client_port_offset;
        let (macs, addresses, ports) = if self.from_client {
            ((CLIENT_MAC, GUEST_MAC), (CLIENT, GUEST), (client_port, GUEST_PORT))
        } else {
            ((GUEST_MAC, CLIENT_MAC), (GUEST, CLIENT), (GUEST_PORT, client_port))
        };
        let ethernet = PacketBuilder::ethernet2(macs.0, macs.1);
        let ip = if self.v6 {
            let wide = |short: [u8; 4]| {
                let mut long = [0; 16];
                long[0] = 0xfd;
                long[12..].copy_from_slice(&short);
                long
            };
            ethernet.ipv6(wide(addresses.0), wide(addresses.1), 64)
        } else {
            ethernet.ipv4(addresses.0, addresses.1, 64)
        };
        let mut tcp = ip.tcp(ports.0, ports.1, self.seq, self.window);
        if let Some(ack) = self.ack {
            tcp = tcp.ack(ack);
        }
        if self.syn {
            tcp = tcp.syn();
        }
        if self.fin {
            tcp = tcp.fin();
        }
        if self.rst {
            tcp = tcp.rst();
        }
        let mut frame = Vec::new();
        tcp.options(self.options).unwrap().write(&mut frame, self.data).unwrap();
        frame
    }
}

/// A datagram of the guest to a port of the client.
pub(crate) fn udp(port: u16, data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, CLIENT_MAC)
        .ipv4(GUEST, CLIENT, 64)
        .udp(53, port)
        .write(&mut frame, data)
        .unwrap();
    frame
}

/// The frame as fragments of at most so many bytes of payload each, a multiple of 8, for the same IP header.
pub(crate) fn fragments(frame: &[u8], id: u16, bytes: usize) -> Vec<Vec<u8>> {
    let ip_at = crate::packet::Packet::parse(frame).network_at;
    let is_v4 = frame[ip_at] >> 4 == 4;
    let payload_at = ip_at + if is_v4 { 20 } else { 40 };
    let (header, payload) = frame.split_at(payload_at);
    let last = payload.len().div_ceil(bytes) - 1;
    let pieces = payload.chunks(bytes).enumerate();
    pieces
        .map(|(number, piece)| {
            let (mut fragment, at) = (header.to_vec(), (number * bytes) as u16);
            let ip = &mut fragment[ip_at..];
            if is_v4 {
                ip[2..4].copy_from_slice(&(20 + piece.len() as u16).to_be_bytes());
                ip[4..6].copy_from_slice(&id.to_be_bytes());
                let place = (at / 8) | (u16::from(number < last) << 13);
                ip[6..8].copy_from_slice(&place.to_be_bytes());
                let (parsed, _) = etherparse::Ipv4Header::from_slice(ip).unwrap();
                ip[10..12].copy_from_slice(&parsed.calc_header_checksum().to_be_bytes());
            } else {
                ip[4..6].copy_from_slice(&(8 + piece.len() as u16).to_be_bytes());
                let place = at | u16::from(number < last);
                let protocol = std::mem::replace(&mut ip[6], 44);
                fragment.extend([protocol, 0]);
                fragment.extend(place.to_be_bytes());
                fragment.extend(u32::from(id).to_be_bytes());
            }
            fragment.extend(piece);
            fragment
        })
        .collect()
}

/// The protocol and the payload of the datagrams that the frames have in fragments, as etherparse puts them together.
pub(crate) fn put_together(frames: &[Vec<u8>]) -> Vec<(u8, Vec<u8>)> {
    let mut pool = etherparse::defrag::IpDefragPool::<(), ()>::new();
    let whole = |frame: &Vec<u8>| {
        pool.process_sliced_packet(&SlicedPacket::from_ethernet(frame).unwrap(), (), ()).unwrap()
    };
    frames.iter().filter_map(whole).map(|whole| (whole.ip_number.0, whole.payload)).collect()
}

/// A frame of the guest that is no IP.
pub(crate) fn other(ethertype: u16, data: &[u8]) -> Vec<u8> {
    let mut frame = [CLIENT_MAC, GUEST_MAC].concat();
    frame.extend(ethertype.to_be_bytes());
    frame.extend(data);
    frame
}

/// An ARP request of the guest.
pub(crate) fn arp(target: u8) -> Vec<u8> {
    let mut data = vec![0, 1, 8, 0, 6, 4, 0, 1];
    data.extend(GUEST_MAC);
    data.extend(GUEST);
    data.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, target]);
    other(0x0806, &data)
}

/// What a TCP frame says, as etherparse reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) window: u16,
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) sack: Vec<(u32, u32)>,
    pub(crate) data: Vec<u8>,
}

/// Reads a TCP frame; its checksums must be right.
pub(crate) fn read(frame: &[u8]) -> Seen {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else {
        panic!("no TCP: {sliced:?}");
    };
    let sum = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
            tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap()
        }
        NetSlice::Ipv6(ip) => {
            tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap()
        }
        NetSlice::Arp(_) => unreachable!(),
    };
    assert_eq!(tcp.checksum(), sum, "checksum of {frame:02x?}");
    let mut seen = Seen {
        seq: tcp.sequence_number(),
        ack: tcp.ack().then(|| tcp.acknowledgment_number()),
        syn: tcp.syn(),
        fin: tcp.fin(),
        rst: tcp.rst(),
        window: tcp.window_size(),
        timestamps: None,
        sack: Vec::new(),
        data: tcp.payload().to_vec(),
    };
    for option in tcp.options_iterator() {
        match option.unwrap() {
            TcpOptionElement::Timestamp(value, echo) => seen.timestamps = Some((value, echo)),
            TcpOptionElement::SelectiveAcknowledgement(first, more) => {
                seen.sack = std::iter::once(first).chain(more.into_iter().flatten()).collect();
            }
            _ => {}
        }
    }
    seen
}

/// What a list of actions comes to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) to_lan: Vec<Vec<u8>>,
    pub(crate) to_guest: Vec<Vec<u8>>,
    pub(crate) to_peer: Vec<(u16, u64, Vec<u8>)>,
    pub(crate) wanted: Vec<(Cause, String)>,
    pub(crate) markers: Vec<u64>,
}

/// Takes the actions out of the list.
pub(crate) fn carry_out(actions: &mut Actions) -> Done {
    let mut done = Done::default();
    for action in actions.iter() {
        match action {
            Action::ToLan(frame) => done.to_lan.push(frame.to_vec()),
            Action::ToGuest(frame) => done.to_guest.push(frame.to_vec()),
            Action::ToPeer { kind, epoch, payload } => done.to_peer.push((kind, epoch, payload.to_vec())),
            Action::CheckpointWanted { cause, detail } => done.wanted.push((cause, detail.to_owned())),
            Action::MarkerArrived { epoch } => done.markers.push(epoch),
        }
    }
    actions.clear();
    done
}
