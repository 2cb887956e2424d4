//! How an Ethernet frame lies in a descriptor chain: behind a virtio-net header, cut at any place (virtio 1.2 §5.1.6).

use colo::vhost_user::Chain;

use crate::offload::{FrameHeader, Offloads};
use crate::proxy::{Buffer, Pool};

/// No frame is longer: the largest IP packet, an Ethernet header and two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 65_535 + 14 + 8;

/// The shortest thing that has source, destination and type.
pub const FRAME_BYTES_MIN: usize = 14;

/// The header as the driver has negotiated it: with VERSION_1 it has `num_buffers` at its end.
pub const HEADER_BYTES: usize = 12;
/// The header of a driver from before virtio 1.0.
pub const LEGACY_HEADER_BYTES: usize = 10;

/// A virtio-net header, without `num_buffers` for a driver from before virtio 1.0.
pub(crate) type Header = [u8; HEADER_BYTES];
/// The part of it that all have.
pub type LegacyHeader = [u8; LEGACY_HEADER_BYTES];

/// Takes the header off what the guest sends. `None` when the rest is no frame: too short, too long.
#[inline]
pub(crate) fn take_header(chain: &mut Chain, header_bytes: usize) -> Option<Header> {
    let mut header = [0; HEADER_BYTES];
    let whole = chain.take_front(&mut header[..header_bytes]);
    let bytes = chain.readable_bytes() as usize;
    (whole && (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes)).then_some(header)
}

/// Copies the frame that the guest sends into memory of its own. `None` when it is no frame, or its header is not to be
/// admitted.
pub(crate) fn from_guest(chain: &mut Chain, offloads: Offloads, pool: &mut Pool) -> Option<Buffer> {
    let header = offloads.take_header(chain)?;
    let bytes = chain.readable_bytes() as usize;
    let mut frame = pool.take(bytes);
    frame.set_header(FrameHeader::read(&header)?);
    (chain.copy_to(&mut frame) == bytes).then_some(frame)
}

/// Bytes of frame that fit into the chain behind the header.
pub fn room(chain: &Chain, header_bytes: usize) -> usize {
    (chain.writable_bytes() as usize).saturating_sub(header_bytes)
}

/// Writes a header and a frame into the guest's buffers. Returns how many bytes were used; `None` when the frame does
/// not fit.
pub fn to_guest(chain: &Chain, header_bytes: usize, frame: &[u8]) -> Option<u32> {
    // No checksum to complete, no segmentation; the frame is in this one chain.
    let mut header = [0; HEADER_BYTES];
    header[LEGACY_HEADER_BYTES] = 1;
    if room(chain, header_bytes) < frame.len() {
        return None;
    }
    Some(chain.fill(&[&header[..header_bytes], frame]) as u32)
}
