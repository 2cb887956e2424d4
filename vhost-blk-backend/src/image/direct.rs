//! Whether an open image can be read and written past the page cache (O_DIRECT).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, ioctl_blksszget, statx};

use super::Access;

/// Memory that begins at a page satisfies every device.
const PAGE_BYTES: u32 = 4096;

/// Switches the descriptor to O_DIRECT if every whole block of `block_bytes` can then be read and written. Otherwise
/// it stays as it was, and the error says why in words that follow "because".
pub(super) fn switch_on(
    file: &File,
    is_device: bool,
    block_bytes: u32,
    bytes: u64,
) -> Result<Access, String> {
    let alignment = alignment(file, is_device).map_err(|error| format!("it cannot be examined: {error}"))?;
    let (memory_align, offset_align) = alignment.unwrap_or((PAGE_BYTES, block_bytes));
    if offset_align == 0 {
        return Err("its file system has no direct I/O".into());
    }
    if offset_align > block_bytes {
        return Err(format!(
            "direct I/O on it needs blocks of {offset_align} bytes and the guest sees blocks of {block_bytes}"
        ));
    }
    let refused = |error: rustix::io::Errno| format!("its file system refuses O_DIRECT: {error}");
    let flags = fcntl_getfl(file).map_err(refused)?;
    fcntl_setfl(file, flags | OFlags::DIRECT).map_err(refused)?;
    // Nobody has told the alignment, or whoever did may be wrong: the last block has the worst offset.
    if alignment.is_none() && !can_read(file, memory_align, block_bytes, bytes) {
        fcntl_setfl(file, flags).map_err(refused)?;
        return Err(format!("its file system does not take direct I/O in blocks of {block_bytes} bytes"));
    }
    Ok(Access::Direct { memory_align, offset_align })
}

/// For addresses and for offsets, in bytes; zeros where there is no direct I/O. `None` if nobody knows.
fn alignment(file: &File, is_device: bool) -> io::Result<Option<(u32, u32)>> {
    let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        return Ok(Some((told.stx_dio_mem_align, told.stx_dio_offset_align)));
    }
    if is_device {
        let bytes = ioctl_blksszget(file)?;
        return Ok(Some((bytes, bytes)));
    }
    Ok(None)
}

/// Whether the last block can be read from a descriptor with O_DIRECT.
pub(super) fn can_read(file: &File, memory_align: u32, block_bytes: u32, bytes: u64) -> bool {
    let mut memory = vec![0; (memory_align + block_bytes) as usize];
    let start = memory.as_ptr().align_offset(memory_align as usize);
    let block = &mut memory[start..start + block_bytes as usize];
    // a block that is broken is no reason
    !matches!(file.read_at(block, bytes - u64::from(block_bytes)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}
