//! A digest of a disk's content, so that a pair with different disks is noticed before it is protected.
//!
//! The digest of the digests of [`CHUNK_BYTES`] each: a chunk that lies in a hole has the known digest of zeros and is
//! not read, and content counts, not how the file is allocated.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::image::{Direct, Hold, Image, ImageOptions, Source};

const CHUNK_BYTES: usize = 1 << 20;

/// Length and digest of the image at `path`.
///
/// # Errors
/// The file cannot be opened or read.
pub fn digest(path: &Path) -> io::Result<(u64, u128)> {
    let options = ImageOptions {
        read_only: true,
        direct: Direct::Off,
        hold: Hold::WhileOpen,
        ..ImageOptions::new(Source::File(path.to_owned()))
    };
    let image = Image::open(&options).map_err(io::Error::other)?;
    Ok((image.bytes(), digest_of(image.file(), image.bytes())?))
}

/// The digest of the first `bytes` of `file`.
///
/// # Errors
/// The file cannot be read.
pub fn digest_of(file: &File, bytes: u64) -> io::Result<u128> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let zeros = xxh3_128(&chunk);
    let mut all = Xxh3::new();
    all.update(&bytes.to_le_bytes());
    let mut hole = Hole::default();
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(CHUNK_BYTES as u64);
        let whole = length == CHUNK_BYTES as u64;
        let digest = if whole && hole.covers(file, offset, offset + length, bytes)? {
            zeros
        } else {
            let chunk = &mut chunk[..length as usize];
            file.read_exact_at(chunk, offset)?;
            xxh3_128(chunk)
        };
        all.update(&digest.to_le_bytes());
        offset += length;
    }
    Ok(all.digest128())
}

/// The part of the file ahead that is known to hold no data.
#[derive(Default)]
struct Hole {
    /// Where data begins at or after the place asked last; everything between is a hole.
    data_at: u64,
}

impl Hole {
    fn covers(&mut self, file: &File, from: u64, to: u64, end: u64) -> io::Result<bool> {
        if to <= self.data_at {
            return Ok(true);
        }
        self.data_at = match rustix::fs::seek(file, SeekFrom::Data(from)) {
            Ok(data) => data,
            Err(Errno::NXIO) => end,
            // a file system or device that does not tell: everything is data
            Err(Errno::INVAL | Errno::OPNOTSUPP) => from,
            Err(error) => return Err(error.into()),
        };
        Ok(to <= self.data_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn image(bytes: u64, content: &[(u64, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        for (offset, data) in content {
            file.as_file().write_all_at(data, *offset).unwrap();
        }
        file
    }

    #[test]
    fn content_counts_and_not_how_it_is_allocated() {
        let bytes = 8 * MIB + 512;
        let sparse = image(bytes, &[(3 * MIB + 100, b"content"), (8 * MIB, b"end")]);
        let zeros = vec![0; bytes as usize];
        let full = image(bytes, &[(0, &zeros), (3 * MIB + 100, b"content"), (8 * MIB, b"end")]);
        assert_eq!(digest(sparse.path()).unwrap(), digest(full.path()).unwrap());
        assert_eq!(digest(full.path()).unwrap().0, bytes);
    }

    #[test]
    fn a_changed_byte_a_moved_one_or_another_length_are_noticed() {
        let bytes = 4 * MIB;
        let mut digests: Vec<u128> = [
            image(bytes, &[]),
            image(bytes, &[(0, b"x")]),
            image(bytes, &[(MIB, b"x")]),
            image(bytes, &[(bytes - 1, b"x")]),
            image(bytes + MIB, &[]),
            image(bytes + 512, &[]),
        ]
        .iter()
        .map(|file| digest(file.path()).unwrap().1)
        .collect();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), 6);
    }
}
