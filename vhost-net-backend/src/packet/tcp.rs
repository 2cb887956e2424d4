//! TCP headers and options (RFC 9293 §3.1, RFC 7323, RFC 2018).

use std::ops::Range;

use super::checksum::{self, Checksum};
use super::{be16, be32};

const HEADER_BYTES: usize = 20;
/// Where in the header the checksum stands.
const CHECKSUM_AT: usize = 16;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMPS: u8 = 8;

/// RFC 7323 §2.3: a larger shift counts as this one.
const WINDOW_SCALE_MAX: u8 = 14;

/// The control bits of a TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub u16);

impl Flags {
    /// The sender has finished.
    pub const FIN: u16 = 0x01;
    /// The connection begins.
    pub const SYN: u16 = 0x02;
    /// The connection is broken off.
    pub const RST: u16 = 0x04;
    /// Hand the data on.
    pub const PSH: u16 = 0x08;
    /// The acknowledgment number counts.
    pub const ACK: u16 = 0x10;
    /// The urgent pointer counts.
    pub const URG: u16 = 0x20;
    /// Explicit congestion notification.
    pub const ECE: u16 = 0x40;
    /// Congestion window reduced.
    pub const CWR: u16 = 0x80;

    /// Whether all of `bits` are set.
    pub fn has(self, bits: u16) -> bool {
        self.0 & bits == bits
    }
}

/// Where the parts of a TCP segment lie, and the numbers of its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the header begins.
    pub at: usize,
    /// Sender's port.
    pub source_port: u16,
    /// Receiver's port.
    pub destination_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number, meaningful only with [`Flags::ACK`].
    pub ack: u32,
    /// Control bits.
    pub flags: Flags,
    /// The window as it stands in the header, unscaled.
    pub window: u16,
    /// The options' bytes.
    pub options: Range<usize>,
    /// The data.
    pub payload: Range<usize>,
}

/// The timestamps option (RFC 7323 §3) and where its values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamps {
    /// Where TSval stands; TSecr follows.
    pub at: usize,
    /// The sender's clock.
    pub value: u32,
    /// The receiver's clock as last heard.
    pub echo: u32,
}

/// The options of a SYN that both ends will go by as long as the connection lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SynOptions {
    /// Largest segment.
    pub mss: Option<u16>,
    /// Shift of every later window.
    pub window_scale: Option<u8>,
    /// Whether SACK may be used.
    pub sack_permitted: bool,
    /// Whether timestamps are offered.
    pub timestamps: bool,
}

impl Segment {
    #[inline(always)]
    pub(super) fn parse(frame: &[u8], part: Range<usize>) -> Option<Self> {
        let at = part.start;
        let header = frame.get(part.clone())?.first_chunk::<HEADER_BYTES>()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        if header_bytes < HEADER_BYTES || at + header_bytes > part.end {
            return None;
        }
        Some(Self {
            at,
            source_port: be16(header, 0)?,
            destination_port: be16(header, 2)?,
            seq: be32(header, 4)?,
            ack: be32(header, 8)?,
            flags: Flags(be16(header, 12)? & 0x01ff),
            window: be16(header, 14)?,
            options: at + HEADER_BYTES..at + header_bytes,
            payload: at + header_bytes..part.end,
        })
    }

    /// The options that are well formed up to the first that is not: kind, and where the data lies.
    pub fn options<'a>(&self, frame: &'a [u8]) -> impl Iterator<Item = (u8, Range<usize>)> + use<'a> {
        let mut left = self.options.clone();
        std::iter::from_fn(move || {
            loop {
                let kind = *frame.get(left.clone())?.first()?;
                match kind {
                    OPTION_END => return None,
                    OPTION_NOP => left.start += 1,
                    kind => {
                        let bytes = usize::from(*frame.get(left.clone())?.get(1)?);
                        if bytes < 2 || bytes > left.len() {
                            return None;
                        }
                        let data = left.start + 2..left.start + bytes;
                        left.start += bytes;
                        return Some((kind, data));
                    }
                }
            }
        })
    }

    /// The timestamps option, if there is one.
    pub fn timestamps(&self, frame: &[u8]) -> Option<Timestamps> {
        let (_, data) =
            self.options(frame).find(|(kind, data)| *kind == OPTION_TIMESTAMPS && data.len() == 8)?;
        Some(Timestamps {
            at: data.start,
            value: be32(frame, data.start)?,
            echo: be32(frame, data.start + 4)?,
        })
    }

    /// The options that matter in a SYN.
    pub fn syn_options(&self, frame: &[u8]) -> SynOptions {
        let mut options = SynOptions::default();
        for (kind, data) in self.options(frame) {
            match (kind, data.len()) {
                (OPTION_MSS, 2) => options.mss = be16(frame, data.start),
                (OPTION_WINDOW_SCALE, 1) => {
                    options.window_scale = Some(frame[data.start].min(WINDOW_SCALE_MAX));
                }
                (OPTION_SACK_PERMITTED, 0) => options.sack_permitted = true,
                (OPTION_TIMESTAMPS, 8) => options.timestamps = true,
                _ => {}
            }
        }
        options
    }

    /// Overwrites `frame[at..]`, a part of the segment, and corrects the checksum if it covers that.
    ///
    /// # Panics
    /// When that is outside of the frame.
    pub fn change(&self, frame: &mut [u8], checksum: Checksum, at: usize, new: &[u8]) {
        match checksum {
            Checksum::Complete => checksum::replace(frame, self.at + CHECKSUM_AT, self.at, at, new),
            Checksum::Partial => frame[at..at + new.len()].copy_from_slice(new),
        }
    }

    /// The sequence number behind everything that the segment occupies: data, SYN and FIN.
    pub fn seq_end(&self) -> u32 {
        self.seq
            .wrapping_add(self.payload.len() as u32)
            .wrapping_add(u32::from(self.flags.has(Flags::SYN)))
            .wrapping_add(u32::from(self.flags.has(Flags::FIN)))
    }

    /// Whether it carries nothing but an acknowledgment.
    pub fn is_pure_ack(&self) -> bool {
        self.payload.is_empty()
            && self.flags.has(Flags::ACK)
            && self.flags.0 & (Flags::SYN | Flags::FIN | Flags::RST) == 0
    }
}

/// Where the edges of the SACK blocks stand: sequence numbers of the one who receives the segment (RFC 2018 §3).
pub fn edge_positions<'a>(segment: &Segment, frame: &'a [u8]) -> impl Iterator<Item = usize> + use<'a> {
    segment
        .options(frame)
        .filter(|(kind, data)| *kind == OPTION_SACK && data.len() % 8 == 0)
        .flat_map(|(_, data)| data.step_by(4))
}
