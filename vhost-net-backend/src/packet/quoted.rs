//! The TCP header that an ICMP error quotes (RFC 792, RFC 4443 §3). By it the receiver finds the connection, and sees by
//! the sequence number whether the error is about something that it has sent (RFC 5927 §4.1).

use std::net::IpAddr;
use std::ops::Range;

use super::ip::{Upper, V4_HEADER_BYTES, V6_HEADER_BYTES, skip_extensions};
use super::{Addresses, FlowKey, Kind, PROTOCOL_TCP, Packet, Transport, be16};

/// Bytes of an ICMP error before what it quotes.
const ICMP_BYTES: usize = 8;
/// Bytes of a TCP header that an IPv4 error quotes at least: ports and sequence number.
const TCP_BYTES_MIN: usize = 8;

const DESTINATION_UNREACHABLE: u8 = 3;
const SOURCE_QUENCH: u8 = 4;
const REDIRECT: u8 = 5;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;
/// ICMPv6: destination unreachable, packet too big, time exceeded, parameter problem.
const V6_ERRORS: std::ops::RangeInclusive<u8> = 1..=4;

/// A TCP segment of the guest that an error on its way to the guest is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// The connection.
    pub flow: FlowKey,
    /// Where the ICMP message begins.
    pub icmp_at: usize,
    /// Where the quoted TCP header is, as far as it is quoted: its sequence number at least.
    pub tcp: Range<usize>,
}

impl Quoted {
    /// What the error in `frame`, which is `packet` and on its way to the guest, quotes. `None` when it is no such error.
    pub fn find(packet: &Packet, frame: &[u8]) -> Option<Self> {
        let Kind::Datagram { addresses, transport: Transport::Icmp { kind: [kind, _], .. }, content, .. } =
            &packet.kind
        else {
            return None;
        };
        let is_v4 = addresses.source.is_ipv4();
        let is_error = if is_v4 {
            let all = [DESTINATION_UNREACHABLE, SOURCE_QUENCH, REDIRECT, TIME_EXCEEDED, PARAMETER_PROBLEM];
            all.contains(kind)
        } else {
            V6_ERRORS.contains(kind)
        };
        if !is_error {
            return None;
        }
        let quoted = content.start + ICMP_BYTES..content.end;
        let (addresses, at) = if is_v4 { tcp_of_v4(frame, &quoted)? } else { tcp_of_v6(frame, &quoted)? };
        let tcp = at..quoted.end;
        let bytes = frame.get(tcp.clone())?;
        if bytes.len() < TCP_BYTES_MIN {
            return None;
        }
        let transport = Transport::Tcp { guest_port: be16(bytes, 0)?, remote_port: be16(bytes, 2)? };
        let flow = FlowKey::Ip {
            vlan: packet.vlan,
            guest: addresses.source,
            remote: addresses.destination,
            transport,
        };
        Some(Self { flow, icmp_at: content.start, tcp })
    }
}

fn tcp_of_v4(frame: &[u8], quoted: &Range<usize>) -> Option<(Addresses, usize)> {
    let header = frame.get(quoted.clone())?.first_chunk::<V4_HEADER_BYTES>()?;
    let source: [u8; 4] = *header[12..].first_chunk()?;
    let destination: [u8; 4] = *header[16..].first_chunk()?;
    let offset = be16(header, 6)? & 0x1fff;
    let is_tcp = header[0] >> 4 == 4 && header[9] == PROTOCOL_TCP && offset == 0;
    let addresses = Addresses { source: IpAddr::from(source), destination: IpAddr::from(destination) };
    is_tcp.then_some((addresses, quoted.start + usize::from(header[0] & 0x0f) * 4))
}

fn tcp_of_v6(frame: &[u8], quoted: &Range<usize>) -> Option<(Addresses, usize)> {
    let header = frame.get(quoted.clone())?.first_chunk::<V6_HEADER_BYTES>()?;
    let source: [u8; 16] = *header[8..].first_chunk()?;
    let destination: [u8; 16] = *header[24..].first_chunk()?;
    let mut destination = IpAddr::from(destination);
    let extensions = quoted.start + V6_HEADER_BYTES..quoted.end;
    match skip_extensions(frame, header[6], extensions, &mut destination)? {
        Upper::Whole { protocol: PROTOCOL_TCP, at } if header[0] >> 4 == 6 => {
            Some((Addresses { source: IpAddr::from(source), destination }, at))
        }
        _ => None,
    }
}
