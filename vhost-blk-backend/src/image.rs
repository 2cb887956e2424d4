//! The backing of the disk: a raw image file or a block device, locked against a second user.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::block_buffer::SECTOR_BYTES;
use crate::lock;

/// How long to wait for the lock: a back end that was killed holds it until the kernel has ended its last writes.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened or measured.
    #[error("Disk {path} cannot be opened: {error}; check the path and its permissions")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A block device that is mounted or claimed by another driver.
    #[error("Disk {path} is in use by this host (mounted, or part of a volume): unmount it first")]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// Another program holds the image.
    #[error(
        "Disk {path} is in use by another program (a second back end, or QEMU): \
         stop that one first, two writers would destroy the disk"
    )]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// A directory, a pipe or the like.
    #[error("Disk {path} is neither a file nor a block device: give a raw image")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Not whole sectors.
    #[error(
        "Disk {path} has {bytes} bytes, no positive multiple of {SECTOR_BYTES}: \
         give a raw image (not qcow2), made with `truncate -s`, or convert one with `qemu-img convert -O raw`"
    )]
    Length {
        /// The image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
}

/// An open image. The lock lasts as long as the value.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    bytes: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// It does not exist, is in use, or is no raw image.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let owned = || path.to_owned();
        let open_error = |error| ImageError::Open { path: owned(), error };
        let kind = std::fs::metadata(path).map_err(open_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind { path: owned() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        if kind.is_block_device() && !read_only {
            // without O_CREAT it means: not while the host itself uses the device (open(2))
            options.custom_flags(libc::O_EXCL);
        }
        let mut file = options.open(path).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => ImageError::Busy { path: owned() },
            _ => open_error(error),
        })?;
        let patience = Instant::now() + LOCK_PATIENCE;
        while !lock::try_lock(file.as_fd(), !read_only).map_err(open_error)? {
            if Instant::now() > patience {
                return Err(ImageError::Locked { path: owned() });
            }
            // there is no waiting for a lock with a limit
            std::thread::sleep(Duration::from_millis(20));
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES as u64) {
            return Err(ImageError::Length { path: owned(), bytes });
        }
        Ok(Self { file, path: owned(), bytes, read_only })
    }

    /// Length in bytes, a multiple of [`SECTOR_BYTES`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether `bytes` from `offset` on are all on the disk.
    pub fn holds(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// What the system says; how much was written is then unknown.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let writer = Image::open(file.path(), false).unwrap();
        for read_only in [false, true] {
            assert!(matches!(Image::open(file.path(), read_only), Err(ImageError::Locked { .. })));
        }
        drop(writer);
        let _readers = [Image::open(file.path(), true).unwrap(), Image::open(file.path(), true).unwrap()];
        let refused = Image::open(file.path(), false).unwrap_err().to_string();
        assert!(refused.contains("stop that one first"), "{refused}");
    }

    #[test]
    fn what_is_no_raw_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Image::open(&dir.path().join("none"), false), Err(ImageError::Open { .. })));
        assert!(matches!(Image::open(dir.path(), false), Err(ImageError::Kind { .. })));
        for bytes in [0, 511, 513] {
            assert!(matches!(Image::open(image(bytes).path(), false), Err(ImageError::Length { .. })));
        }
        let image = Image::open(image(1024).path(), false).unwrap();
        assert!(image.holds(0, 1024) && image.holds(1024, 0) && image.holds(512, 512));
        assert!(!image.holds(512, 513) && !image.holds(u64::MAX, 2));
    }
}
