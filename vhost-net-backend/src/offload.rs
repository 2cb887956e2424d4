//! Checksums and segmentation that one side leaves to the other: what the driver has negotiated, and whether the header
//! of a packet keeps to it (virtio 1.2 §5.1.3, §5.1.6).

use colo::vhost_user::Chain;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::frame::{self, FRAME_BYTES_MIN, HEADER_BYTES, Header, LEGACY_HEADER_BYTES, LegacyHeader};
use crate::packet::checksum::Checksum;
use crate::packet::segment::Large;

const HDR_LEN_AT: usize = 2;
const GSO_SIZE_AT: usize = 4;
const CSUM_START_AT: usize = 6;
const CSUM_OFFSET_AT: usize = 8;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// What a driver may leave to the device, and the device to the driver. Each bit with what Linux calls it at a tap, which
/// is about what the tap gives.
const TO_GUEST: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];
const TO_LAN: [u32; 5] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_USO,
];

/// What a frame leaves to whoever gets it: a virtio-net header without `num_buffers` (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameHeader(LegacyHeader);

impl FrameHeader {
    /// Its bytes.
    pub const BYTES: usize = LEGACY_HEADER_BYTES;

    /// From its bytes, of which there may be more.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().copied().map(Self)
    }

    /// As it lies in memory.
    pub fn bytes(&self) -> &LegacyHeader {
        &self.0
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What the checksum field of the frame's TCP header holds.
    pub fn checksum(&self) -> Checksum {
        if self.0[0] & NEEDS_CSUM == 0 { Checksum::Complete } else { Checksum::Partial }
    }

    /// Whether what it names is within a frame of so many bytes.
    pub fn is_within(&self, frame_bytes: usize) -> bool {
        match Left::by(&self.0) {
            Left::Nothing => true,
            Left::Checksum { .. } | Left::Segmentation(..) => {
                let word = |at: usize| usize::from(u16::from_le_bytes([self.0[at], self.0[at + 1]]));
                let (start, offset) = (word(CSUM_START_AT), word(CSUM_OFFSET_AT));
                self.0[0] & NEEDS_CSUM != 0
                    && start >= FRAME_BYTES_MIN
                    && start + offset + 2 <= frame_bytes
                    && word(HDR_LEN_AT) <= frame_bytes
            }
            Left::Unknown => false,
        }
    }
}

/// The offloads that a driver has negotiated, and the header that goes with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    features: u64,
}

impl Offloads {
    /// From the driver's features.
    pub fn negotiated(features: u64) -> Self {
        Self { features }
    }

    /// All that a tap or another interface of Linux can do. `udp`: the kernel segments UDP too (Linux 6.2).
    pub fn of_linux(udp: bool) -> u64 {
        let of_udp = [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
        TO_LAN
            .into_iter()
            .chain(TO_GUEST.map(|(bit, _)| bit))
            .chain([VIRTIO_NET_F_MRG_RXBUF])
            .filter(|bit| udp || !of_udp.contains(bit))
            .fold(0, |bits, bit| bits | 1 << bit)
    }

    /// Of these those that a pair can do: all but for UDP, whose datagrams are compared one by one.
    pub fn of_pair(offloads: u64) -> u64 {
        offloads & Self::of_linux(false)
    }

    fn has(self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Whether anything is left to the other side.
    pub fn any(self) -> bool {
        TO_LAN.into_iter().chain(TO_GUEST.map(|(bit, _)| bit)).any(|bit| self.has(bit))
    }

    /// Whether a frame may lie in several of the driver's buffers.
    pub fn mergeable(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Length of the header (§5.1.6).
    pub fn header_bytes(self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.mergeable() { HEADER_BYTES } else { LEGACY_HEADER_BYTES }
    }

    /// Whether the guest takes frames that are longer than the LAN's.
    pub fn receives_large(self) -> bool {
        TO_GUEST[1..].iter().any(|(bit, _)| self.has(*bit))
    }

    /// What a tap may leave to the guest (TUNSETOFFLOAD).
    pub(crate) fn tap_flags(self) -> u32 {
        // without checksums there is no segmentation to leave to anybody
        if !self.has(VIRTIO_NET_F_GUEST_CSUM) {
            return 0;
        }
        let mut flags =
            TO_GUEST.iter().filter(|(bit, _)| self.has(*bit)).fold(0, |flags, (_, flag)| flags | flag);
        // Linux takes those for UDP only together
        let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        if flags & udp != udp {
            flags &= !udp;
        }
        flags
    }

    /// Whether the guest takes a frame that the LAN gives with this header. If it does, no flag is left in it
    /// that the guest does not know (§5.1.6.4.1).
    #[inline]
    pub(crate) fn accept(self, header: &mut LegacyHeader) -> bool {
        let checksum = self.has(VIRTIO_NET_F_GUEST_CSUM);
        let accepted = match u32::from(header[1] & !ECN) {
            VIRTIO_NET_HDR_GSO_NONE => checksum || header[0] & NEEDS_CSUM == 0,
            VIRTIO_NET_HDR_GSO_TCPV4 => checksum && self.has(VIRTIO_NET_F_GUEST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => checksum && self.has(VIRTIO_NET_F_GUEST_TSO6),
            // as at a tap, only both
            VIRTIO_NET_HDR_GSO_UDP_L4 => {
                checksum && self.has(VIRTIO_NET_F_GUEST_USO4) && self.has(VIRTIO_NET_F_GUEST_USO6)
            }
            _ => false,
        };
        let accepted = accepted && (header[1] & ECN == 0 || self.has(VIRTIO_NET_F_GUEST_ECN));
        if accepted && !checksum {
            header[0] = 0;
        }
        accepted
    }

    /// Whether the guest takes a frame of so many bytes with this header; as [`Offloads::accept`].
    pub(crate) fn accept_frame(self, header: &mut FrameHeader, frame_bytes: usize) -> bool {
        header.is_within(frame_bytes) && self.accept(&mut header.0)
    }

    /// Takes the header off what the guest sends. `None` when the rest is no frame, or the header is not to be admitted.
    #[inline]
    pub(crate) fn take_header(self, chain: &mut Chain) -> Option<Header> {
        let mut header = frame::take_header(chain, self.header_bytes())?;
        self.admit(&mut header, chain.readable_bytes() as usize).then_some(header)
    }

    /// Whether a header that the guest sends with a frame of `frame_bytes` bytes keeps to what was negotiated, and makes
    /// sense. Bits that mean nothing in this direction are cleared, as is `num_buffers`.
    fn admit(self, header: &mut Header, frame_bytes: usize) -> bool {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (start, offset, size) = (word(CSUM_START_AT), word(CSUM_OFFSET_AT), word(GSO_SIZE_AT));
        let needs_checksum = u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
        if needs_checksum
            && (!self.has(VIRTIO_NET_F_CSUM) || start < FRAME_BYTES_MIN || start + offset + 2 > frame_bytes)
        {
            return false;
        }
        let ecn = u32::from(header[1]) & VIRTIO_NET_HDR_GSO_ECN != 0;
        let bit = match u32::from(header[1]) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => None,
            VIRTIO_NET_HDR_GSO_TCPV4 => Some(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => Some(VIRTIO_NET_F_HOST_TSO6),
            VIRTIO_NET_HDR_GSO_UDP_L4 => Some(VIRTIO_NET_F_HOST_USO),
            _ => return false,
        };
        match bit {
            Some(bit) => {
                if !self.has(bit) || !needs_checksum || size == 0 || ecn && !self.has(VIRTIO_NET_F_HOST_ECN) {
                    return false;
                }
                // a hint, which the kernel would take for the length of its linear part
                let linear = word(HDR_LEN_AT).min(frame_bytes) as u16;
                header[HDR_LEN_AT..GSO_SIZE_AT].copy_from_slice(&linear.to_le_bytes());
            }
            None => {
                header[1] = 0;
                header[HDR_LEN_AT..CSUM_START_AT].fill(0);
            }
        }
        header[0] = u8::from(needs_checksum);
        if !needs_checksum {
            header[CSUM_START_AT..LEGACY_HEADER_BYTES].fill(0);
        }
        header[LEGACY_HEADER_BYTES..].fill(0);
        true
    }
}

/// What the LAN has left to the receiver of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nothing.
    Nothing,
    /// The checksum over all from `start` on, to be put `offset` bytes behind it.
    Checksum {
        /// Where it begins.
        start: usize,
        /// From there.
        offset: usize,
    },
    /// To cut it into segments with so many bytes of payload.
    Segmentation(Large, usize),
    /// Something that nobody knows.
    Unknown,
}

impl Left {
    /// As the frame's header says.
    pub(crate) fn by(header: &LegacyHeader) -> Self {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let large = match u32::from(header[1] & !ECN) {
            VIRTIO_NET_HDR_GSO_NONE if header[0] & NEEDS_CSUM == 0 => return Self::Nothing,
            VIRTIO_NET_HDR_GSO_NONE => {
                return Self::Checksum { start: word(CSUM_START_AT), offset: word(CSUM_OFFSET_AT) };
            }
            VIRTIO_NET_HDR_GSO_TCPV4 => Large::TcpV4,
            VIRTIO_NET_HDR_GSO_TCPV6 => Large::TcpV6,
            VIRTIO_NET_HDR_GSO_UDP_L4 => Large::Udp,
            _ => return Self::Unknown,
        };
        Self::Segmentation(large, word(GSO_SIZE_AT))
    }
}

/// The frame has become longer by so many bytes before what its header names positions of.
pub(crate) fn shift_header(header: &mut LegacyHeader, bytes: u16) {
    let checksum = (header[0] & NEEDS_CSUM != 0).then_some(CSUM_START_AT);
    let large = (u32::from(header[1]) != VIRTIO_NET_HDR_GSO_NONE).then_some(HDR_LEN_AT);
    for at in checksum.into_iter().chain(large) {
        let word = u16::from_le_bytes([header[at], header[at + 1]]).saturating_add(bytes);
        header[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all() -> u64 {
        Offloads::of_linux(true) | 1 << VIRTIO_F_VERSION_1
    }

    fn header(flags: u8, gso: u8, words: [u16; 4]) -> Header {
        let mut header = [0; HEADER_BYTES];
        (header[0], header[1]) = (flags, gso);
        for (at, word) in words.into_iter().enumerate() {
            header[2 + 2 * at..4 + 2 * at].copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    #[test]
    fn what_was_negotiated_is_admitted_and_nothing_else() {
        // flags, type, [hdr_len, gso_size, csum_start, csum_offset], what it takes
        let cases = [
            (0, 0, [0; 4], 0),
            (1, 0, [0, 0, 34, 16], 1 << VIRTIO_NET_F_CSUM),
            (1, 1, [54, 1448, 34, 16], 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4),
            (1, 4, [74, 1428, 54, 16], 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO6),
            (1, 5, [42, 1400, 34, 6], 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_USO),
            (
                1,
                0x81,
                [54, 1448, 34, 16],
                1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_ECN,
            ),
        ];
        for (flags, gso, words, needed) in cases {
            let asked = header(flags, gso, words);
            let mut seen = asked;
            assert!(Offloads::negotiated(needed).admit(&mut seen, 4000));
            assert_eq!(seen, asked);
            assert!(Offloads::negotiated(all()).admit(&mut seen, 4000));
            // each bit that it takes
            for bit in (0..64).filter(|bit| needed >> bit & 1 == 1) {
                assert!(!Offloads::negotiated(all() & !(1 << bit)).admit(&mut { asked }, 4000), "{asked:?}");
            }
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        for lie in [
            header(1, 0, [0, 0, 3999, 0]),
            header(1, 0, [0, 0, 34, 3965]),
            header(1, 0, [0, 0, 65535, 65535]),
            header(1, 0, [0, 0, 0, 16]),
            header(0, 1, [54, 1448, 34, 16]),
            header(1, 1, [54, 0, 34, 16]),
            header(1, 2, [54, 1448, 34, 16]),
            header(1, 3, [54, 1448, 34, 16]),
            header(1, 0x7f, [54, 1448, 34, 16]),
        ] {
            assert!(!Offloads::negotiated(all()).admit(&mut { lie }, 4000), "{lie:?}");
        }
    }

    #[test]
    fn what_the_lan_leaves_was_negotiated_or_is_ours_to_do() {
        // flags, type, what it takes, and what there is to do without
        let (csum, tcp4) = (1 << VIRTIO_NET_F_GUEST_CSUM, 1 << VIRTIO_NET_F_GUEST_TSO4);
        let udp = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        let cases = [
            (0, 0, 0, Left::Nothing),
            (2, 0, 0, Left::Nothing),
            (1, 0, csum, Left::Checksum { start: 34, offset: 16 }),
            (1, 1, csum | tcp4, Left::Segmentation(Large::TcpV4, 1448)),
            (1, 0x81, csum | tcp4 | 1 << VIRTIO_NET_F_GUEST_ECN, Left::Segmentation(Large::TcpV4, 1448)),
            (1, 4, csum | 1 << VIRTIO_NET_F_GUEST_TSO6, Left::Segmentation(Large::TcpV6, 1448)),
            (1, 5, csum | udp, Left::Segmentation(Large::Udp, 1448)),
        ];
        for (flags, gso, needed, left) in cases {
            let given: LegacyHeader = *header(flags, gso, [54, 1448, 34, 16]).first_chunk().unwrap();
            assert_eq!(Left::by(&given), left);
            let mut seen = given;
            assert!(Offloads::negotiated(needed).accept(&mut seen));
            assert_eq!(seen[0], if needed == 0 { 0 } else { flags });
            assert_eq!(seen[1..], given[1..]);
            assert!(Offloads::negotiated(all()).accept(&mut { given }));
            for bit in (0..64).filter(|bit| needed >> bit & 1 == 1) {
                assert!(!Offloads::negotiated(all() & !(1 << bit)).accept(&mut { given }), "{given:?}");
            }
        }
        // UDP in fragments (UFO) is no more
        let given = *header(1, 3, [54, 1448, 34, 16]).first_chunk().unwrap();
        assert!(!Offloads::negotiated(all()).accept(&mut { given }));
        assert_eq!(Left::by(&given), Left::Unknown);
    }

    #[test]
    fn a_tag_shifts_what_the_header_names() {
        let mut large = *header(1, 1, [54, 1448, 34, 16]).first_chunk().unwrap();
        shift_header(&mut large, 4);
        assert_eq!(large, header(1, 1, [58, 1448, 38, 16])[..10]);
        let mut none = [0; LEGACY_HEADER_BYTES];
        shift_header(&mut none, 4);
        assert_eq!(none, [0; LEGACY_HEADER_BYTES]);
    }

    #[test]
    fn the_header_is_as_long_as_the_driver_thinks() {
        let bytes = |features| Offloads::negotiated(features).header_bytes();
        assert_eq!(
            (bytes(0), bytes(1 << VIRTIO_F_VERSION_1), bytes(1 << VIRTIO_NET_F_MRG_RXBUF)),
            (10, 12, 12)
        );
        assert_eq!(Offloads::negotiated(all()).tap_flags(), 0x6f);
        assert_eq!(Offloads::negotiated(all() & !(1 << VIRTIO_NET_F_GUEST_USO4)).tap_flags(), 0xf);
        assert_eq!(Offloads::negotiated(all() & !(1 << VIRTIO_NET_F_GUEST_CSUM)).tap_flags(), 0);
    }

    #[test]
    fn a_pair_offers_the_same_on_any_host_and_nothing_for_udp() {
        let udp = [VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6];
        let of_pair = Offloads::of_pair(Offloads::of_linux(true));
        assert_eq!(of_pair, Offloads::of_pair(Offloads::of_linux(false)));
        assert!(udp.iter().all(|bit| of_pair >> bit & 1 == 0));
        for bit in
            [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MRG_RXBUF]
        {
            assert_eq!(of_pair >> bit & 1, 1);
        }
    }

    #[test]
    fn a_frames_header_names_nothing_outside_of_it() {
        let is_within = |header: Header, bytes| FrameHeader::read(&header).unwrap().is_within(bytes);
        let checksum = header(1, 0, [0, 0, 34, 16]);
        assert!(is_within(checksum, 52) && !is_within(checksum, 51));
        let large = header(1, 1, [66, 1448, 34, 16]);
        assert!(is_within(large, 66) && !is_within(large, 65));
        // the Ethernet header is nobody's to sum up, a large frame needs a checksum, and UFO is no more
        for lie in
            [header(1, 0, [0, 0, 13, 16]), header(0, 1, [54, 1448, 34, 16]), header(1, 3, [54, 1448, 34, 16])]
        {
            assert!(!is_within(lie, 4000), "{lie:?}");
        }
        assert!(is_within(header(2, 0, [0; 4]), 14));
        assert_eq!(FrameHeader::read(&[0; 9]), None);
    }

    proptest! {
        /// What is admitted names no byte outside of its frame, and is admitted again unchanged.
        #[test]
        fn what_is_admitted_is_sound(bytes: [u8; HEADER_BYTES], features: u64, frame_bytes in FRAME_BYTES_MIN..70_000) {
            let offloads = Offloads::negotiated(features);
            let mut header = bytes;
            header[1] &= 0x87;
            if offloads.admit(&mut header, frame_bytes) {
                let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
                prop_assert!(word(HDR_LEN_AT) <= frame_bytes);
                prop_assert!(word(CSUM_START_AT) + word(CSUM_OFFSET_AT) + 2 <= frame_bytes);
                let mut again = header;
                prop_assert!(offloads.admit(&mut again, frame_bytes));
                prop_assert_eq!(again, header);
            }
        }
    }
}
