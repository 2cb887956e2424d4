//! IPv4 and IPv6 headers (RFC 791, RFC 8200), and what of UDP and ICMP tells flows apart.

use std::net::IpAddr;
use std::ops::Range;

use super::tcp::Segment;
use super::{Addresses, Kind, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Transport, be16};

const V4_HEADER_BYTES: usize = 20;
const V6_HEADER_BYTES: usize = 40;
const UDP_HEADER_BYTES: usize = 8;
/// More extension headers than this are not looked behind.
const EXTENSIONS_MAX: usize = 8;

const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
const ICMPV6_ECHO: u8 = 128;
const ICMPV6_ECHO_REPLY: u8 = 129;
const ICMPV6_ROUTER_SOLICITATION: u8 = 133;
const ICMPV6_REDIRECT: u8 = 137;

const EXTENSION_HOP_BY_HOP: u8 = 0;
const EXTENSION_ROUTING: u8 = 43;
const EXTENSION_FRAGMENT: u8 = 44;
const EXTENSION_DESTINATION: u8 = 60;

pub(super) fn parse_v4(frame: &[u8], at: usize) -> Option<Kind> {
    let header = frame.get(at..)?.first_chunk::<V4_HEADER_BYTES>()?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    let total_bytes = usize::from(be16(header, 2)?);
    if header[0] >> 4 != 4 || header_bytes < V4_HEADER_BYTES || total_bytes < header_bytes {
        return None;
    }
    // what stands behind the total length is padding of the Ethernet frame
    let payload = at + header_bytes..at + total_bytes;
    if payload.end > frame.len() {
        return None;
    }
    let source: [u8; 4] = *header[12..].first_chunk()?;
    let destination: [u8; 4] = *header[16..].first_chunk()?;
    let addresses = Addresses { source: IpAddr::from(source), destination: IpAddr::from(destination) };
    let protocol = header[9];
    // the offset and "more fragments"; "don't fragment" says nothing about the content
    let place = be16(header, 6)? & 0x3fff;
    if place != 0 {
        return Some(fragment(addresses, protocol, place, payload));
    }
    parse_transport(frame, addresses, protocol, payload)
}

pub(super) fn parse_v6(frame: &[u8], at: usize) -> Option<Kind> {
    let header = frame.get(at..)?.first_chunk::<V6_HEADER_BYTES>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let end = at + V6_HEADER_BYTES + usize::from(be16(header, 4)?);
    if end > frame.len() {
        return None;
    }
    let source: [u8; 16] = *header[8..].first_chunk()?;
    let destination: [u8; 16] = *header[24..].first_chunk()?;
    let addresses = Addresses { source: IpAddr::from(source), destination: IpAddr::from(destination) };
    let mut next = header[6];
    let mut at = at + V6_HEADER_BYTES;
    for _ in 0..EXTENSIONS_MAX {
        match next {
            EXTENSION_HOP_BY_HOP | EXTENSION_ROUTING | EXTENSION_DESTINATION => {
                let extension = frame.get(at..end)?.first_chunk::<8>()?;
                next = extension[0];
                at += 8 + usize::from(extension[1]) * 8;
            }
            EXTENSION_FRAGMENT => {
                let extension = frame.get(at..end)?.first_chunk::<8>()?;
                let place = be16(extension, 2)? & 0xfff9;
                return Some(fragment(addresses, extension[0], place, at + 8..end));
            }
            _ => break,
        }
    }
    if at > end {
        return None;
    }
    parse_transport(frame, addresses, next, at..end)
}

fn fragment(addresses: Addresses, protocol: u8, place: u16, content: Range<usize>) -> Kind {
    Kind::Datagram { addresses, transport: Transport::Fragment { protocol }, place, content }
}

fn parse_transport(frame: &[u8], addresses: Addresses, protocol: u8, payload: Range<usize>) -> Option<Kind> {
    let bytes = &frame[payload.clone()];
    let (transport, content) = match protocol {
        PROTOCOL_TCP => {
            return Segment::parse(frame, payload).map(|segment| Kind::Tcp { addresses, segment });
        }
        PROTOCOL_UDP => {
            let udp_bytes = usize::from(be16(bytes, 4)?);
            if udp_bytes < UDP_HEADER_BYTES || udp_bytes > bytes.len() {
                return None;
            }
            let transport = Transport::Udp { guest_port: be16(bytes, 0)?, remote_port: be16(bytes, 2)? };
            (transport, payload.start + UDP_HEADER_BYTES..payload.start + udp_bytes)
        }
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => {
            let [kind, code] = *bytes.first_chunk::<8>()?.first_chunk()?;
            let (echo, discovery) = if protocol == PROTOCOL_ICMP {
                (matches!(kind, ICMP_ECHO | ICMP_ECHO_REPLY), false)
            } else {
                (
                    matches!(kind, ICMPV6_ECHO | ICMPV6_ECHO_REPLY),
                    (ICMPV6_ROUTER_SOLICITATION..=ICMPV6_REDIRECT).contains(&kind),
                )
            };
            let identifier = if echo { be16(bytes, 4)? } else { 0 };
            (Transport::Icmp { kind: [kind, code], identifier, discovery }, payload)
        }
        protocol => (Transport::Other { protocol }, payload),
    };
    Some(Kind::Datagram { addresses, transport, place: 0, content })
}
