//! Copies between guest memory and a buffer of ours.

use colo::memory::GuestMemory;
use vm_memory::Bytes;
use vm_memory::guest_memory::Error;

use crate::request::Segment;

/// Bytes in all segments.
pub(crate) fn length(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.bytes as usize).sum()
}

/// Replaces the content of `data` by that of the segments.
pub(crate) fn gather(memory: &GuestMemory, segments: &[Segment], data: &mut Vec<u8>) -> Result<(), Error> {
    data.resize(length(segments), 0);
    let mut left = &mut data[..];
    for segment in segments {
        let (part, rest) = left.split_at_mut(segment.bytes as usize);
        memory.read_slice(part, segment.address)?;
        left = rest;
    }
    Ok(())
}

/// Fills the segments from `data`, as far as it goes.
pub(crate) fn scatter(memory: &GuestMemory, segments: &[Segment], data: &[u8]) -> Result<(), Error> {
    let mut left = data;
    for segment in segments {
        let (part, rest) = left.split_at(left.len().min(segment.bytes as usize));
        memory.write_slice(part, segment.address)?;
        left = rest;
    }
    Ok(())
}
