//! Proof that a device really reads and writes its file, before its speed means anything.

use anyhow::{Result, ensure};

use super::{Connection, Disk, Pattern};
use crate::blk::Access;

/// Blocks that are checked.
const BLOCKS: usize = 64;

/// Writes blocks at random places through the device, finds them in the file, and reads them back through the device.
///
/// # Errors
/// Something else is there, or a request fails.
pub fn verify(connection: &mut Connection, disk: &Disk, seed: u64) -> Result<()> {
    let bytes = connection.shape().block_bytes;
    let mut places = Pattern::new(Access::WRITE, connection.blocks(), seed);
    let mut blocks: Vec<u64> = (0..BLOCKS).map(|_| places.next_access().1).collect();
    blocks.sort_unstable();
    blocks.dedup();
    for &block in &blocks {
        connection.transfer(true, block, &mut content(block, seed, bytes))?;
    }
    let mut data = vec![0; bytes];
    for &block in &blocks {
        let expected = content(block, seed, bytes);
        disk.read_exact_at(&mut data, block * bytes as u64)?;
        ensure!(data == expected, "What was written to block {block} is not in the file");
        connection.transfer(false, block, &mut data)?;
        ensure!(data == expected, "Block {block} is read back with other content than was written");
    }
    Ok(())
}

/// What belongs into a block: other bytes in each, and with each seed.
fn content(block: u64, seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = block ^ seed.rotate_left(32);
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ (state >> 29)).to_le_bytes()
    });
    words.take(bytes.div_ceil(8)).flatten().take(bytes).collect()
}
