//! How QEMU's filters put packets on a stream: the packet's length, with `vnet_hdr_support` the length of the virtio-net
//! header in front of it, both 32 bits big endian, then the packet.

use std::io::{self, Read};

/// No packet is longer, the virtio-net header included (QEMU's `NET_BUFSIZE`).
pub const PACKET_BYTES_MAX: usize = 4096 + 65_536;

/// Bytes that one read takes at most.
const READ_BYTES: usize = 256 << 10;

/// What makes a stream worthless: whoever sends has other options, or is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The length makes no sense.
    #[error(
        "A packet of {0} bytes was announced, 1 to {PACKET_BYTES_MAX} are possible: is a QEMU filter at the other end, \
         and has it vnet_hdr_support exactly if this program has --vnet-hdr?"
    )]
    Length(u32),
    /// The header is longer than the packet that it is part of.
    #[error(
        "A packet of {packet} bytes was announced, {header} of them virtio-net header: has the filter at the other end \
         vnet_hdr_support, as this program has --vnet-hdr?"
    )]
    Header {
        /// Bytes of the whole packet.
        packet: u32,
        /// Bytes of the header.
        header: u32,
    },
}

/// A packet on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The virtio-net header; empty without `vnet_hdr_support`.
    pub header: &'a [u8],
    /// The Ethernet frame, or whatever the guest sent in place of one.
    pub frame: &'a [u8],
}

/// Appends a packet to what is to be sent.
pub fn encode(packet: Packet<'_>, vnet_hdr: bool, out: &mut Vec<u8>) {
    let Packet { header, frame } = packet;
    debug_assert!(vnet_hdr || header.is_empty());
    out.extend_from_slice(&((header.len() + frame.len()) as u32).to_be_bytes());
    if vnet_hdr {
        out.extend_from_slice(&(header.len() as u32).to_be_bytes());
    }
    out.extend_from_slice(header);
    out.extend_from_slice(frame);
}

/// Cuts a stream that is read without blocking into packets. Its memory is taken once.
#[derive(Debug)]
pub struct Decoder {
    vnet_hdr: bool,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Decoder {
    /// At the beginning of a stream.
    pub fn new(vnet_hdr: bool) -> Self {
        let buffer = vec![0; READ_BYTES + 8 + PACKET_BYTES_MAX].into_boxed_slice();
        Self { vnet_hdr, buffer, start: 0, end: 0 }
    }

    /// Another stream begins.
    pub fn restart(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Reads once. Returns the number of bytes; 0 is the end of the stream. All whole packets must have been taken out
    /// before, so that there is room.
    ///
    /// # Errors
    /// What the reader says, `WouldBlock` included.
    pub fn fill(&mut self, reader: &mut impl Read) -> io::Result<usize> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = &mut self.buffer[self.end..];
        debug_assert!(!room.is_empty());
        let read = reader.read(room)?;
        self.end += read;
        Ok(read)
    }

    /// The next whole packet, if there is one.
    ///
    /// # Errors
    /// The stream is worthless from here on.
    pub fn next_packet(&mut self) -> Result<Option<Packet<'_>>, FramingError> {
        let held = &self.buffer[self.start..self.end];
        let Some((length, mut rest)) = held.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        if length == 0 || length as usize > PACKET_BYTES_MAX {
            return Err(FramingError::Length(length));
        }
        let mut header_bytes = 0;
        if self.vnet_hdr {
            let Some((header, behind)) = rest.split_first_chunk::<4>() else {
                return Ok(None);
            };
            header_bytes = u32::from_be_bytes(*header);
            rest = behind;
            if header_bytes > length {
                return Err(FramingError::Header { packet: length, header: header_bytes });
            }
        }
        let Some(packet) = rest.get(..length as usize) else {
            return Ok(None);
        };
        self.start += held.len() - rest.len() + packet.len();
        let (header, frame) = packet.split_at(header_bytes as usize);
        Ok(Some(Packet { header, frame }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packets_survive_any_cut_of_the_stream(
            packets in prop::collection::vec((0usize..20, prop::collection::vec(any::<u8>(), 1..3000)), 1..20),
            vnet_hdr in any::<bool>(),
            cut in 1usize..5000,
        ) {
            let mut wire = Vec::new();
            let packets: Vec<(&[u8], &[u8])> = packets
                .iter()
                .map(|(header, bytes)| bytes.split_at(if vnet_hdr { *header.min(&bytes.len()) } else { 0 }))
                .collect();
            for (header, frame) in &packets {
                encode(Packet { header, frame }, vnet_hdr, &mut wire);
            }
            let mut decoder = Decoder::new(vnet_hdr);
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.fill(&mut &piece[..]).unwrap();
                while let Some(packet) = decoder.next_packet().unwrap() {
                    seen.push((packet.header.to_vec(), packet.frame.to_vec()));
                }
            }
            let seen: Vec<(&[u8], &[u8])> = seen.iter().map(|(header, frame)| (&header[..], &frame[..])).collect();
            prop_assert_eq!(seen, packets);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), vnet_hdr in any::<bool>()) {
            let mut decoder = Decoder::new(vnet_hdr);
            decoder.fill(&mut &bytes[..]).unwrap();
            while let Ok(Some(_)) = decoder.next_packet() {}
        }
    }

    #[test]
    fn the_longest_packet_passes_in_any_pieces_and_a_longer_one_does_not() {
        let longest = vec![5; PACKET_BYTES_MAX];
        let mut wire = Vec::new();
        for _ in 0..3 {
            encode(Packet { header: &longest[..12], frame: &longest[12..] }, true, &mut wire);
        }
        for cut in [1 << 20, PACKET_BYTES_MAX + 7, PACKET_BYTES_MAX + 8, PACKET_BYTES_MAX + 9, 100_001] {
            let mut decoder = Decoder::new(true);
            let (mut left, mut seen) = (&wire[..], 0);
            while !left.is_empty() {
                let mut piece = &left[..cut.min(left.len())];
                let read = decoder.fill(&mut piece).unwrap();
                left = &left[read..];
                while let Some(packet) = decoder.next_packet().unwrap() {
                    assert_eq!((packet.header.len(), packet.frame.len()), (12, PACKET_BYTES_MAX - 12));
                    seen += 1;
                }
            }
            assert_eq!(seen, 3);
        }
        let length = PACKET_BYTES_MAX as u32 + 1;
        let mut decoder = Decoder::new(false);
        decoder.fill(&mut &length.to_be_bytes()[..]).unwrap();
        assert_eq!(decoder.next_packet(), Err(FramingError::Length(length)));
    }

    #[test]
    fn filters_with_other_options_are_noticed() {
        let mut decoder = Decoder::new(true);
        decoder.fill(&mut &[0, 0, 0, 60, 0x52, 0x54, 0, 1, 2][..]).unwrap();
        assert_eq!(decoder.next_packet(), Err(FramingError::Header { packet: 60, header: 0x5254_0001 }));
        let mut wire = Vec::new();
        encode(Packet { header: &[0; 12], frame: &[0xff; 60] }, true, &mut wire);
        let mut decoder = Decoder::new(false);
        decoder.fill(&mut &wire[..]).unwrap();
        assert!(decoder.next_packet().unwrap().is_some());
        assert_eq!(decoder.next_packet(), Err(FramingError::Length(u32::MAX)));
    }
}
