//! A frame that cannot go straight into the guest's buffers: it had a tag, or something is left to do that the guest does
//! not do. It is done here, and what comes of it is given one frame at a time.
#![expect(unsafe_code, reason = "the guest's buffers are reached through raw pointers only")]

use crate::frame::{FRAME_BYTES_MAX, LEGACY_HEADER_BYTES, LegacyHeader};
use crate::lan::pieces::{gather, scatter};
use crate::offload::{Left, Offloads, shift_header};
use crate::packet::segment::{Segments, complete_checksum};

/// Where a VLAN tag stands: behind the addresses (IEEE 802.1Q).
const TAG_AT: usize = 12;
pub(super) const TAG_BYTES: usize = 4;

/// What the kernel has taken off a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag {
    pub(super) protocol: u16,
    pub(super) control: u16,
}

impl Tag {
    fn bytes(self) -> [u8; TAG_BYTES] {
        let ([a, b], [c, d]) = (self.protocol.to_be_bytes(), self.control.to_be_bytes());
        [a, b, c, d]
    }
}

/// The frame, or none.
#[derive(Debug)]
pub(super) struct Held {
    frame: Box<[u8; FRAME_BYTES_MAX]>,
    bytes: usize,
    rest: Rest,
    /// Of the segment in hand.
    headers: Vec<u8>,
}

/// What of it has not been given.
#[derive(Debug)]
enum Rest {
    Nothing,
    Whole(LegacyHeader),
    Segments(Segments),
}

impl Default for Held {
    fn default() -> Self {
        let frame = vec![0; FRAME_BYTES_MAX].try_into().expect("as long as it is made");
        Self { frame, bytes: 0, rest: Rest::Nothing, headers: Vec::new() }
    }
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        matches!(self.rest, Rest::Nothing)
    }

    pub(super) fn clear(&mut self) {
        self.rest = Rest::Nothing;
    }

    /// Takes a frame of so many bytes out of the buffers, and puts its tag back.
    ///
    /// # Panics
    /// When it is too short for a frame, or too long with its tag.
    ///
    /// # Safety
    /// The buffers are mapped and stay so, and no reference to them exists.
    pub(super) unsafe fn take(&mut self, buffers: &[libc::iovec], bytes: usize, tag: Option<Tag>) {
        let tag = tag.map(Tag::bytes);
        let tag = tag.as_ref().map_or(&[][..], |tag| &tag[..]);
        self.bytes = bytes + tag.len();
        let (addresses, rest) = self.frame[..self.bytes].split_at_mut(TAG_AT);
        let (at, rest) = rest.split_at_mut(tag.len());
        at.copy_from_slice(tag);
        // SAFETY: the caller's promise, for both.
        unsafe {
            gather(buffers, 0, addresses);
            gather(buffers, TAG_AT, rest);
        }
    }

    /// Does with the frame that was taken, `tagged` or not, what the header that it came with asks for, as far as the guest
    /// does not. Returns false when nobody can: it is gone then.
    pub(super) fn prepare(&mut self, mut header: LegacyHeader, tagged: bool, offloads: Offloads) -> bool {
        if tagged {
            shift_header(&mut header, TAG_BYTES as u16);
        }
        let left = Left::by(&header);
        self.rest = if offloads.accept(&mut header) {
            Rest::Whole(header)
        } else {
            let frame = &mut self.frame[..self.bytes];
            match left {
                Left::Checksum { start, offset } if complete_checksum(frame, start, offset) => {
                    Rest::Whole([0; LEGACY_HEADER_BYTES])
                }
                Left::Segmentation(large, size) => {
                    Segments::new(frame, large, size).map_or(Rest::Nothing, Rest::Segments)
                }
                Left::Nothing | Left::Checksum { .. } | Left::Unknown => Rest::Nothing,
            }
        };
        !self.is_empty()
    }

    /// Puts the frame, or its next segment, into the buffers behind `header_bytes` of them. Returns how long it is, and its
    /// header; `None` when there are no more.
    ///
    /// # Safety
    /// As for [`Held::take`].
    pub(super) unsafe fn give(
        &mut self,
        buffers: &[libc::iovec],
        header_bytes: usize,
    ) -> Option<(usize, LegacyHeader)> {
        let frame = &self.frame[..self.bytes];
        let (header, front, payload) = match &mut self.rest {
            Rest::Nothing => return None,
            Rest::Whole(header) => (*header, &[][..], frame),
            Rest::Segments(segments) => {
                let payload = segments.next(frame, &mut self.headers)?;
                ([0; LEGACY_HEADER_BYTES], &self.headers[..], &frame[payload])
            }
        };
        // SAFETY: the caller's promise, for both.
        unsafe {
            scatter(buffers, header_bytes, front);
            scatter(buffers, header_bytes + front.len(), payload);
        }
        let bytes = front.len() + payload.len();
        if !matches!(&self.rest, Rest::Segments(segments) if segments.has_more()) {
            self.clear();
        }
        Some((bytes, header))
    }
}
