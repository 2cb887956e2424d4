//! How an Ethernet frame lies in a descriptor chain: behind a virtio-net header, cut at any place (virtio 1.2 §5.1.6).

use colo::memory::GuestMemory;
use colo::vhost_user::Chain;
use vm_memory::{Address, Bytes};

/// No frame is longer: the largest IP packet, an Ethernet header and two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 65_535 + 14 + 8;

/// The shortest thing that has source, destination and type.
pub const FRAME_BYTES_MIN: usize = 14;

/// The header as the driver has negotiated it: with VERSION_1 it has `num_buffers` at its end.
pub const HEADER_BYTES: usize = 12;
/// The header of a driver from before virtio 1.0.
pub const LEGACY_HEADER_BYTES: usize = 10;

/// Copies the frame that the guest sends into `into`. `None` when it is no frame: too short, too long. Whatever the
/// header asks for was never offered and is ignored.
pub fn from_guest<'b>(
    memory: &GuestMemory,
    chain: Chain,
    header_bytes: usize,
    into: &'b mut [u8; FRAME_BYTES_MAX],
) -> Option<&'b [u8]> {
    let mut skip = header_bytes;
    let mut filled = 0;
    for descriptor in chain.readable() {
        let len = descriptor.len() as usize;
        let skipped = skip.min(len);
        skip -= skipped;
        let piece = into.get_mut(filled..filled + len - skipped)?;
        if piece.is_empty() {
            continue;
        }
        memory.read_slice(piece, descriptor.addr().checked_add(skipped as u64)?).ok()?;
        filled += piece.len();
    }
    (filled >= FRAME_BYTES_MIN).then(|| &into[..filled])
}

/// Bytes of frame that fit into the chain behind the header.
pub fn room(chain: &Chain, header_bytes: usize) -> usize {
    let bytes: usize = chain.clone().writable().map(|descriptor| descriptor.len() as usize).sum();
    bytes.saturating_sub(header_bytes)
}

/// Writes a header and a frame into the guest's buffers. Returns how many bytes were used; `None` when the frame does
/// not fit.
pub fn to_guest(memory: &GuestMemory, chain: Chain, header_bytes: usize, frame: &[u8]) -> Option<u32> {
    // No checksum to complete, no segmentation; the frame is in this one chain.
    let mut header = [0; HEADER_BYTES];
    header[LEGACY_HEADER_BYTES] = 1;
    if room(&chain, header_bytes) < frame.len() {
        return None;
    }
    let mut parts = [&header[..header_bytes], frame];
    for descriptor in chain.writable() {
        let mut address = descriptor.addr();
        let mut space = descriptor.len() as usize;
        for part in &mut parts {
            let piece = space.min(part.len());
            memory.write_slice(&part[..piece], address).ok()?;
            address = address.checked_add(piece as u64)?;
            space -= piece;
            *part = &part[piece..];
        }
    }
    // the guest may have changed the chain since its room was counted
    parts.iter().all(|part| part.is_empty()).then_some((header_bytes + frame.len()) as u32)
}
