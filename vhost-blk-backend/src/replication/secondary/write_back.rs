//! A failover: the whole buffer goes to the disk, neighbours together.

use std::io;

use crate::block_buffer::{BlockBuffer, SECTOR_BYTES};
use crate::image::Image;

/// The most bytes in one system call.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// Writes all that `buffer` holds, in ascending order.
///
/// # Errors
/// What the disk says; some of it may have been written then.
pub(super) fn write_back(buffer: &BlockBuffer, image: &Image) -> io::Result<()> {
    let mut piece: Vec<u8> = Vec::with_capacity(PIECE_BYTES_MAX);
    let mut offset = 0;
    buffer.write_back(|sector, content| {
        let at = sector * SECTOR_BYTES as u64;
        if at != offset + piece.len() as u64 || piece.len() + content.len() > PIECE_BYTES_MAX {
            image.write_at(&piece, offset)?;
            piece.clear();
            offset = at;
        }
        piece.extend_from_slice(content);
        io::Result::Ok(())
    })?;
    image.write_at(&piece, offset)
}
