//! TCP segments as the oracle reads them: with smoltcp's parser, not with the one that is under test.

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpEndpoint, IpProtocol, Ipv4Packet, Ipv6Packet, TcpOption,
    TcpPacket,
};

/// A connection, from the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) guest: (IpAddress, u16),
    pub(crate) remote: (IpAddress, u16),
}

#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) flow: Flow,
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) window: u32,
    pub(crate) window_scale: Option<u8>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    /// TSval and TSecr.
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) sacks: Vec<(u32, u32)>,
    /// Where the TCP header begins.
    pub(crate) at: usize,
    pub(crate) payload: Vec<u8>,
}

/// Where the TCP header of an Ethernet frame begins, and both addresses.
fn tcp_at(frame: &[u8]) -> Option<(usize, IpAddress, IpAddress, usize)> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
            (ip.next_header() == IpProtocol::Tcp && ip.verify_checksum()).then(|| {
                let end = 14 + usize::from(ip.total_len());
                (14 + usize::from(ip.header_len()), ip.src_addr().into(), ip.dst_addr().into(), end)
            })
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            (ip.next_header() == IpProtocol::Tcp)
                .then(|| (54, ip.src_addr().into(), ip.dst_addr().into(), 14 + ip.total_len()))
        }
        _ => None,
    }
}

impl Segment {
    /// Of a frame that the guest sent and the LAN did not damage.
    pub(crate) fn of_guest_if_whole(frame: &[u8]) -> Option<Self> {
        let (at, source, destination, end) = tcp_at(frame)?;
        let whole = TcpPacket::new_checked(frame.get(at..end)?).ok()?.verify_checksum(&source, &destination);
        whole.then(|| Self::of_guest(frame))?
    }

    /// Of a frame that the guest sent.
    pub(crate) fn of_guest(frame: &[u8]) -> Option<Self> {
        let (at, source, destination, end) = tcp_at(frame)?;
        let tcp = TcpPacket::new_checked(frame.get(at..end)?).ok()?;
        let mut timestamps = None;
        let mut window_scale = None;
        let mut sacks = Vec::new();
        let mut options = tcp.options();
        while !options.is_empty() {
            let (rest, option) = TcpOption::parse(options).ok()?;
            match option {
                TcpOption::TimeStamp { tsval, tsecr } => timestamps = Some((tsval, tsecr)),
                TcpOption::WindowScale(scale) => window_scale = Some(scale),
                TcpOption::SackRange(ranges) => sacks.extend(ranges.into_iter().flatten()),
                TcpOption::EndOfList => break,
                _ => {}
            }
            options = rest;
        }
        Some(Self {
            flow: Flow { guest: (source, tcp.src_port()), remote: (destination, tcp.dst_port()) },
            seq: tcp.seq_number().0.cast_unsigned(),
            ack: tcp.ack().then(|| tcp.ack_number().0.cast_unsigned()),
            window: u32::from(tcp.window_len()),
            window_scale,
            syn: tcp.syn(),
            fin: tcp.fin(),
            rst: tcp.rst(),
            timestamps,
            sacks,
            at,
            payload: tcp.payload().to_vec(),
        })
    }
}

/// Whether a frame has TCP in it whose checksum is right.
pub(crate) fn is_whole(frame: &[u8]) -> bool {
    Segment::of_guest_if_whole(frame).is_some()
}

/// Who opens a connection with this frame from the LAN, if it is whole, and with which sequence number.
pub(crate) fn opener(frame: &[u8]) -> Option<(IpEndpoint, i32)> {
    let (at, source, destination, end) = tcp_at(frame)?;
    let tcp = TcpPacket::new_checked(frame.get(at..end)?).ok()?;
    let opens = tcp.syn() && !tcp.ack() && tcp.verify_checksum(&source, &destination);
    opens.then(|| (IpEndpoint::new(source, tcp.src_port()), tcp.seq_number().0))
}

/// Whether a frame from the LAN is the answer to a SYN of the guest: the connection, and whether it scales windows.
pub(crate) fn syn_answer(frame: &[u8]) -> Option<(Flow, bool)> {
    let segment = Segment::of_guest(frame)?;
    let flow = Flow { guest: segment.flow.remote, remote: segment.flow.guest };
    (segment.syn && segment.ack.is_some()).then_some((flow, segment.window_scale.is_some()))
}
