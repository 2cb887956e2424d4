//! The Internet checksum: whole (RFC 1071) and after a change of some bytes (RFC 1624).

use std::net::IpAddr;

use super::Addresses;

/// One's complement sum of `bytes`, the first of them in the high half of a word.
fn add(bytes: &[u8]) -> u64 {
    let (words, last) = bytes.as_chunks::<2>();
    let sum: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    sum + last.first().map_or(0, |byte| u64::from(*byte) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum over several pieces, as it stands in a header. Every piece but the last has an even length.
pub fn of(pieces: &[&[u8]]) -> u16 {
    !fold(sum(pieces))
}

fn sum(pieces: &[&[u8]]) -> u64 {
    debug_assert!(pieces.iter().rev().skip(1).all(|piece| piece.len() % 2 == 0));
    pieces.iter().map(|piece| add(piece)).sum()
}

/// The checksum of a TCP segment or a UDP datagram in such pieces, over the pseudo header of the IP header at the beginning
/// of `ip` (RFC 9293 §3.1, RFC 768, RFC 8200 §8.1). The checksum's own place must hold zeros.
///
/// # Panics
/// When that is shorter than an IP header.
pub fn of_transport(ip: &[u8], protocol: u8, pieces: &[&[u8]]) -> u16 {
    let addresses = if ip[0] >> 4 == 4 { 12..20 } else { 8..40 };
    let bytes = pieces.iter().map(|piece| piece.len()).sum::<usize>() as u32;
    !fold(sum(&[&ip[addresses], &bytes.to_be_bytes(), &[0, protocol]]) + sum(pieces))
}

/// The checksum of a TCP segment between two addresses (RFC 9293 §3.1). Its own place must hold zeros.
pub fn of_tcp(addresses: &Addresses, segment: &[u8]) -> u16 {
    let mut pseudo = [0; 40];
    let mut end = 0;
    for address in [addresses.source, addresses.destination] {
        match address {
            IpAddr::V4(address) => pseudo[end..end + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => pseudo[end..end + 16].copy_from_slice(&address.octets()),
        }
        end += if address.is_ipv4() { 4 } else { 16 };
    }
    let bytes = (segment.len() as u32).to_be_bytes();
    of(&[&pseudo[..end], &bytes, &[0, super::PROTOCOL_TCP], segment])
}

/// What the checksum field of a TCP header holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// The checksum.
    #[default]
    Complete,
    /// The sum over the pseudo header only, which no change of the segment changes. Whoever sends the frame on completes it
    /// (virtio 1.2 §5.1.6.2, VIRTIO_NET_HDR_F_NEEDS_CSUM).
    Partial,
}

/// Overwrites `frame[at..]` with `new` and corrects the checksum that stands at `checksum_at` and covers it; what it
/// covers begins at `covered_at`, which tells the halves of its words apart.
///
/// # Panics
/// When a position is outside of the frame.
pub fn replace(frame: &mut [u8], checksum_at: usize, covered_at: usize, at: usize, new: &[u8]) {
    let mut sum = u64::from(!u16::from_be_bytes([frame[checksum_at], frame[checksum_at + 1]]));
    for (position, new) in (at..).zip(new) {
        let old = std::mem::replace(&mut frame[position], *new);
        let shift = if (position - covered_at).is_multiple_of(2) { 8 } else { 0 };
        // RFC 1624, equation 3: HC' = ~(~HC + ~m + m'), here for words of which one half changes
        sum += u64::from(!(u16::from(old) << shift)) + (u64::from(*new) << shift);
    }
    frame[checksum_at..checksum_at + 2].copy_from_slice(&(!fold(sum)).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_correction_equals_a_new_sum(
            mut bytes in prop::collection::vec(any::<u8>(), 24..64),
            at in any::<prop::sample::Index>(),
            new in prop::collection::vec(any::<u8>(), 0..12),
            covered_at in 0usize..4,
        ) {
            // the checksum stands at the beginning of what it covers
            let sum = of(&[&bytes[covered_at + 2..]]);
            bytes[covered_at..covered_at + 2].copy_from_slice(&sum.to_be_bytes());
            let first = covered_at + 2;
            let at = first + at.index(bytes.len() - first - new.len());
            replace(&mut bytes, covered_at, covered_at, at, &new);
            prop_assert_eq!(&bytes[at..at + new.len()], &new[..]);
            // the sum over everything, the checksum included, is -0
            let left = of(&[&bytes[covered_at..]]);
            prop_assert!(left == 0 || left == 0xffff, "{left:#x}");
        }
    }

    #[test]
    fn known_sum() {
        // the example of RFC 1071 §3
        assert_eq!(of(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    }
}
