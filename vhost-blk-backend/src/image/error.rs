//! Why an image cannot be served.

use std::io;
use std::path::PathBuf;

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
    /// Not whole blocks.
    #[error(
        "Disk {path} has {bytes} bytes, no positive multiple of {block_bytes}: \
         give a raw image (not qcow2), made with `truncate -s`, or convert one with `qemu-img convert -O raw`"
    )]
    Length {
        /// The image.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The guest's blocks.
        block_bytes: u32,
    },
    /// A block size that virtio or Linux does not have.
    #[error("A block size of {bytes} bytes is not possible: 512 or 4096")]
    BlockSize {
        /// What was asked for.
        bytes: u32,
    },
    /// Direct I/O was demanded.
    #[error(
        "Disk {path} cannot be served with direct I/O, because {why}; leave the choice to `--direct auto`"
    )]
    Direct {
        /// The image.
        path: PathBuf,
        /// What is in the way.
        why: String,
    },
    /// Its length is not to be had any more.
    #[error("The length of disk {path} cannot be found: {error}")]
    Measure {
        /// The image.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A new length that it cannot have.
    #[error("Disk {path} has {bytes} bytes and cannot be made {wanted}: {why}")]
    Resize {
        /// The image.
        path: PathBuf,
        /// Its present length.
        bytes: u64,
        /// The length that was asked for.
        wanted: u64,
        /// What is in the way.
        why: String,
    },
}
