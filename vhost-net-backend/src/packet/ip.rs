//! IPv4 and IPv6 headers (RFC 791, RFC 8200), and what of UDP and ICMP tells flows apart.

use std::net::IpAddr;
use std::ops::Range;

use super::tcp::Segment;
use super::{
    Addresses, Kind, PROTOCOL_AH, PROTOCOL_ESP, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP,
    Transport, be16, be32,
};

pub(super) const V4_HEADER_BYTES: usize = 20;
pub(super) const V6_HEADER_BYTES: usize = 40;
const UDP_HEADER_BYTES: usize = 8;
/// More extension headers than this are not looked behind.
const EXTENSIONS_MAX: usize = 8;

const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
const ICMPV6_ECHO: u8 = 128;
const ICMPV6_ECHO_REPLY: u8 = 129;
/// Multicast listener discovery (RFC 3810 §5) and right behind it neighbour discovery (RFC 4861 §4).
const ICMPV6_LISTENER_QUERY: u8 = 130;
const ICMPV6_REDIRECT: u8 = 137;
const ICMPV6_LISTENER_REPORT_V2: u8 = 143;

const EXTENSION_HOP_BY_HOP: u8 = 0;
const EXTENSION_ROUTING: u8 = 43;
const EXTENSION_FRAGMENT: u8 = 44;
const EXTENSION_DESTINATION: u8 = 60;

/// Routing headers whose first address is the last of the route (RFC 6275 §6.4, RFC 8754 §2).
const ROUTING_MOBILE: u8 = 2;
const ROUTING_SEGMENTS: u8 = 4;

#[inline(always)]
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
    let mut addresses = Addresses { source: IpAddr::from(source), destination: IpAddr::from(destination) };
    match skip_extensions(frame, header[6], at + V6_HEADER_BYTES..end, &mut addresses.destination)? {
        Upper::Whole { protocol, at } => parse_transport(frame, addresses, protocol, at..end),
        Upper::Fragment { protocol, place, at } => Some(fragment(addresses, protocol, place, at..end)),
    }
}

/// What is behind the extension headers.
pub(super) enum Upper {
    /// All of a message.
    Whole {
        /// Its protocol.
        protocol: u8,
        /// Where it begins.
        at: usize,
    },
    /// A part of one.
    Fragment {
        /// The protocol of the whole.
        protocol: u8,
        /// Offset and flag, as they stand in the header.
        place: u16,
        /// Where the part begins.
        at: usize,
    },
}

/// Skips the extension headers (RFC 8200 §4) in `part`, of which the first is of the kind `next`. Puts into `destination`
/// where a source route leads in the end: that is the address of the flow, and of the checksum (RFC 8200 §8.1). `None`
/// when they are not whole.
///
/// AH is no extension here: what is behind it cannot be changed.
pub(super) fn skip_extensions(
    frame: &[u8],
    mut next: u8,
    part: Range<usize>,
    destination: &mut IpAddr,
) -> Option<Upper> {
    let mut at = part.start;
    for _ in 0..EXTENSIONS_MAX {
        if !matches!(
            next,
            EXTENSION_HOP_BY_HOP | EXTENSION_ROUTING | EXTENSION_DESTINATION | EXTENSION_FRAGMENT
        ) {
            break;
        }
        let rest = frame.get(at..part.end)?;
        let extension = rest.first_chunk::<8>()?;
        if next == EXTENSION_FRAGMENT {
            let place = be16(extension, 2)? & 0xfff9;
            if place != 0 {
                return Some(Upper::Fragment { protocol: extension[0], place, at: at + 8 });
            }
            // RFC 6946: a fragment that is the whole
        } else if next == EXTENSION_ROUTING
            && matches!(extension[2], ROUTING_MOBILE | ROUTING_SEGMENTS)
            && extension[3] > 0
        {
            let last: [u8; 16] = *rest.get(8..)?.first_chunk()?;
            *destination = IpAddr::from(last);
        }
        let units = if next == EXTENSION_FRAGMENT { 0 } else { usize::from(extension[1]) };
        next = extension[0];
        at += 8 + units * 8;
    }
    (at <= part.end).then_some(Upper::Whole { protocol: next, at })
}

fn fragment(addresses: Addresses, protocol: u8, place: u16, content: Range<usize>) -> Kind {
    Kind::Datagram { addresses, transport: Transport::Fragment { protocol }, place, content }
}

#[inline(always)]
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
                    matches!(kind, ICMPV6_LISTENER_QUERY..=ICMPV6_REDIRECT | ICMPV6_LISTENER_REPORT_V2),
                )
            };
            let identifier = if echo { be16(bytes, 4)? } else { 0 };
            (Transport::Icmp { kind: [kind, code], identifier, discovery }, payload)
        }
        PROTOCOL_ESP | PROTOCOL_AH => {
            let spi = be32(bytes, if protocol == PROTOCOL_AH { 4 } else { 0 })?;
            (Transport::Security { protocol, spi }, payload)
        }
        protocol => (Transport::Other { protocol }, payload),
    };
    Some(Kind::Datagram { addresses, transport, place: 0, content })
}
