//! The backing of the disk: a raw image file, a block device, or nothing, with what can be done to it and how.

mod direct;
mod error;
mod geometry;
mod hold;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fstatfs, ioctl_blkpbszget};

pub use self::error::ImageError;
use self::geometry::Geometry;
pub use self::geometry::Topology;
pub use self::hold::Hold;
use self::hold::{Holder, Target};

/// How long to wait for the lock. A back end that was killed holds it until the kernel has ended its last writes, which
/// takes milliseconds on an idle disk, and seconds on a busy one.
const PATIENCE: Duration = Duration::from_secs(10);

/// What `statfs` says of file systems in memory (linux/magic.h). Not hugetlbfs, which has no write.
const MEMORY_FILE_SYSTEMS: [u32; 2] = [0x0102_1994, 0x8584_58f6]; // tmpfs, ramfs

/// And of those that keep the promise of RWF_NOWAIT, by our knowledge: ext2 to ext4, XFS, btrfs, F2FS.
const NOWAIT_FILE_SYSTEMS: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// What is behind the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A raw image file or a block device.
    File(PathBuf),
    /// Nothing: reads give zeros, writes are forgotten. For measuring.
    Null {
        /// The length that the guest sees.
        bytes: u64,
    },
}

/// Whether the guest's I/O goes past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Where the file allows it and its alignment fits the guest's blocks.
    #[default]
    Auto,
    /// Or not at all.
    On,
    /// Never.
    Off,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// What is behind it.
    pub source: Source,
    /// Refuse writes.
    pub read_only: bool,
    /// Past the page cache or through it.
    pub direct: Direct,
    /// The logical blocks that the guest sees, in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// When it is locked.
    pub hold: Hold,
    /// How long to wait for a lock that another program has.
    pub patience: Duration,
}

impl ImageOptions {
    /// A plain disk: written by one guest while that runs, in blocks of 512 bytes, past the page cache where possible.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            read_only: false,
            direct: Direct::Auto,
            block_bytes: 512,
            hold: Hold::WhileServing,
            patience: PATIENCE,
        }
    }
}

/// What the guest's I/O meets at [`Image::file`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: no system call is needed.
    Null,
    /// A file in memory: never waits for a disk.
    Memory,
    /// The page cache.
    Buffered,
    /// The disk itself (O_DIRECT).
    Direct {
        /// What a buffer's address must be a multiple of.
        memory_align: u32,
        /// What an offset and the length of a buffer must be a multiple of; never more than a block of the guest.
        offset_align: u32,
    },
}

impl Access {
    /// One word, for the statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Memory => "memory",
            Self::Buffered => "buffered",
            Self::Direct { .. } => "direct",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Null,
    File,
    Device,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    kind: Kind,
    file: File,
    /// The same through the page cache, where `file` goes past it.
    buffered: Option<File>,
    /// The same for [`Image::sync`]; none where nothing is made durable.
    sync: Option<File>,
    path: PathBuf,
    bytes: AtomicU64,
    block_bytes: u32,
    read_only: bool,
    access: Access,
    never_waits: bool,
    geometry: Geometry,
    hold: Hold,
    patience: Duration,
    holder: Holder,
}

impl Image {
    /// Opens an image and locks it, or looks whether it could be ([`Hold`]).
    ///
    /// # Errors
    /// It does not exist, is in use, or is no raw image of whole blocks.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let block_bytes = options.block_bytes;
        if ![512, 4096].contains(&block_bytes) {
            return Err(ImageError::BlockSize { bytes: block_bytes });
        }
        let (path, kind) = match &options.source {
            Source::Null { .. } => ("/dev/null".as_ref(), Kind::Null),
            Source::File(path) => (path.as_path(), kind_of(path)?),
        };
        let open_error = |error| ImageError::Open { path: path.to_owned(), error };
        let mut file =
            OpenOptions::new().read(true).write(!options.read_only).open(path).map_err(open_error)?;
        let bytes = match options.source {
            Source::Null { bytes } => bytes,
            Source::File(_) => file.seek(SeekFrom::End(0)).map_err(open_error)?,
        };
        let geometry = match kind {
            Kind::Null => Geometry::of_file(0, block_bytes),
            Kind::File => Geometry::of_file(file.metadata().map_err(open_error)?.blksize(), block_bytes),
            Kind::Device => {
                let number = file.metadata().map_err(open_error)?.rdev();
                let physical_bytes = ioctl_blkpbszget(&file).map_err(|error| open_error(error.into()))?;
                Geometry::of_device(number, physical_bytes, block_bytes)
            }
        };
        let mut image = Self {
            kind,
            file,
            buffered: None,
            sync: None,
            path: if kind == Kind::Null { "null".into() } else { path.to_owned() },
            bytes: AtomicU64::new(bytes),
            block_bytes,
            read_only: options.read_only,
            access: if kind == Kind::Null { Access::Null } else { Access::Buffered },
            never_waits: false,
            geometry,
            hold: options.hold,
            patience: options.patience,
            holder: Holder::default(),
        };
        image.check_length(bytes)?;
        image.look_at_lock()?;
        image.choose_access(options.direct)?;
        Ok(image)
    }

    fn look_at_lock(&self) -> Result<(), ImageError> {
        match (self.kind, self.hold) {
            (Kind::Null, _) => {}
            (_, Hold::WhileOpen) => self.holder.acquire(self.target(), self.patience)?,
            // now as well, so that a second program by mistake is told at once
            (_, Hold::WhileServing) => {
                self.holder.acquire(self.target(), self.patience)?;
                self.holder.release(self.target(), || {});
            }
            (_, Hold::Incoming) => {
                if !self.target().is_free()? {
                    let path = self.path.display();
                    tracing::info!(
                        "Disk {path} is still in use by another program, as it is before a migration ends"
                    );
                }
            }
        }
        Ok(())
    }

    fn choose_access(&mut self, direct: Direct) -> Result<(), ImageError> {
        let path = self.path.clone();
        let open_error = |error| ImageError::Open { path: path.clone(), error };
        let file_system = fstatfs(&self.file).map_err(|error| open_error(error.into()))?.f_type as u32;
        let in_memory = self.kind == Kind::File && MEMORY_FILE_SYSTEMS.contains(&file_system);
        self.never_waits = self.kind == Kind::Device || NOWAIT_FILE_SYSTEMS.contains(&file_system);
        if self.kind != Kind::Null && !in_memory && !self.read_only {
            self.sync = Some(self.open_again().map_err(open_error)?);
        }
        let why = if self.kind == Kind::Null {
            "there is nothing behind it".to_owned()
        } else if in_memory {
            self.access = Access::Memory;
            "it is in memory, where that gains nothing".to_owned()
        } else if direct == Direct::Off {
            "it was asked not to be".to_owned()
        } else {
            // before the switch, since the flag is one of the open file
            let buffered = self.open_again().map_err(open_error)?;
            let is_device = self.kind == Kind::Device;
            match direct::switch_on(&self.file, is_device, self.block_bytes, self.bytes()) {
                Ok(access) => {
                    self.access = access;
                    self.buffered = Some(buffered);
                    tracing::info!("Disk {}: served with direct I/O, {access:?}", path.display());
                    return Ok(());
                }
                Err(why) => why,
            }
        };
        if direct == Direct::On {
            return Err(ImageError::Direct { path, why });
        }
        tracing::info!("Disk {}: served without direct I/O, because {why}", path.display());
        Ok(())
    }

    /// An open file of its own, by the descriptor: the path may lead elsewhere by now.
    fn open_again(&self) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        OpenOptions::new().read(true).write(!self.read_only).open(path)
    }

    fn target(&self) -> Target<'_> {
        Target {
            file: &self.file,
            path: &self.path,
            exclusive: !self.read_only,
            is_device: self.kind == Kind::Device,
        }
    }

    /// One more queue works on the image. With [`Hold::WhileServing`] the first locks it, and waits some seconds if
    /// another program still has it.
    ///
    /// # Errors
    /// The other does not give it back. The queue must not touch the image, nor release it.
    pub fn acquire(&self) -> Result<(), ImageError> {
        self.acquire_within(self.patience)
    }

    fn acquire_within(&self, patience: Duration) -> Result<(), ImageError> {
        if self.kind == Kind::Null || self.hold == Hold::WhileOpen {
            return Ok(());
        }
        self.holder.acquire(self.target(), patience)
    }

    /// A queue that has acquired the image has nothing in flight any more. With [`Hold::WhileServing`] the last one makes
    /// durable what was written and gives the lock back.
    ///
    /// # Errors
    /// It cannot be made durable. The lock is given back all the same.
    ///
    /// # Panics
    /// When nobody has acquired it.
    pub fn release(&self) -> io::Result<()> {
        let mut result = Ok(());
        if self.kind != Kind::Null && self.hold != Hold::WhileOpen {
            self.holder.release(self.target(), || result = self.sync());
        }
        result
    }

    /// Makes all writes that have ended durable. On an open file of its own: Linux tells each of them once that writes were
    /// lost, and what is told here is not kept from the guest's flush, which is done on [`Self::file`].
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> io::Result<()> {
        self.sync.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// Takes over the length that the file or device has now; with `wanted` a shorter file is made that long before.
    /// Returns the length.
    ///
    /// # Errors
    /// A length that is not of whole blocks or would cut data off, a device of another length, or the disk is full.
    pub fn resize(&self, wanted: Option<u64>) -> Result<u64, ImageError> {
        let present = match self.kind {
            Kind::Null => self.bytes(),
            // the position of the descriptor does not matter: all I/O is at given offsets
            Kind::File | Kind::Device => (&self.file)
                .seek(SeekFrom::End(0))
                .map_err(|error| ImageError::Measure { path: self.path.clone(), error })?,
        };
        let bytes = wanted.unwrap_or(present);
        self.check_length(bytes)?;
        let refused =
            |why: String| ImageError::Resize { path: self.path.clone(), bytes: present, wanted: bytes, why };
        if bytes < present {
            return Err(refused("a disk is only enlarged, so that no data is cut off".into()));
        }
        if bytes > present {
            match self.kind {
                Kind::Null => {}
                Kind::Device => {
                    return Err(refused("enlarge the device itself, then resize without a length".into()));
                }
                Kind::File if self.read_only => {
                    return Err(refused("it is served read-only".into()));
                }
                Kind::File => {
                    self.acquire()?;
                    let resized = self.file.set_len(bytes);
                    let released = self.release();
                    resized.and(released).map_err(|error| refused(error.to_string()))?;
                }
            }
        }
        let before = self.bytes.swap(bytes, Ordering::Relaxed);
        if bytes < before {
            let path = self.path.display();
            tracing::warn!("Disk {path} has become shorter, from {before} to {bytes} bytes");
        }
        Ok(bytes)
    }

    fn check_length(&self, bytes: u64) -> Result<(), ImageError> {
        let block_bytes = self.block_bytes;
        if bytes == 0 || !bytes.is_multiple_of(block_bytes.into()) || bytes > i64::MAX as u64 {
            return Err(ImageError::Length { path: self.path.clone(), bytes, block_bytes });
        }
        Ok(())
    }

    /// Length in bytes, a multiple of [`Self::block_bytes`].
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Where it was opened; `null` for a disk with nothing behind it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether `bytes` from `offset` on are all on the disk.
    pub fn holds(&self, offset: u64, bytes: u64) -> bool {
        offset.checked_add(bytes).is_some_and(|end| end <= self.bytes())
    }

    /// The open file for the guest's I/O, which follows the rules of [`Self::access`]; with [`Access::Null`] nobody needs
    /// it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How the guest's I/O gets to the disk.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Whether I/O that must not wait (RWF_NOWAIT, and what io_uring tries first) does not. FUSE for one makes its caller
    /// wait all the same, which would keep a worker from everything else.
    pub fn never_waits(&self) -> bool {
        self.never_waits
    }

    /// The logical blocks that the guest sees.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// How the guest should arrange its requests.
    pub fn topology(&self) -> Topology {
        self.geometry.topology
    }

    /// The pieces in which a discard frees anything, in bytes; 0 where it never does.
    pub fn discard_bytes_granularity(&self) -> u32 {
        self.geometry.discard_granularity_bytes
    }

    /// The mode of a fallocate(2) on [`Self::file`] that discards: what it covers reads as zeros afterwards. On a block device
    /// too, since Linux refuses the mode that would leave the content open (FALLOC_FL_NO_HIDE_STALE). Where it cannot be
    /// done it ends with EOPNOTSUPP, and the discard may be answered as done: it is a hint.
    pub fn discard_mode(&self) -> i32 {
        (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits() as i32
    }

    /// The mode of one that writes zeros, and with `unmap` may free what it covers. Where it cannot be done it ends with
    /// EOPNOTSUPP, and the zeros have to be written.
    pub fn zero_mode(&self, unmap: bool) -> i32 {
        if unmap {
            return self.discard_mode();
        }
        (FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE).bits() as i32
    }

    /// Fills `data` from `offset`, through the page cache.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        if self.kind == Kind::Null {
            data.fill(0);
            return Ok(());
        }
        self.buffered.as_ref().unwrap_or(&self.file).read_exact_at(data, offset)
    }

    /// Writes all of `data` at `offset`, through the page cache.
    ///
    /// # Errors
    /// What the system says; how much was written is then unknown.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.buffered.as_ref().unwrap_or(&self.file).write_all_at(data, offset)
    }
}

fn kind_of(path: &Path) -> Result<Kind, ImageError> {
    let metadata =
        std::fs::metadata(path).map_err(|error| ImageError::Open { path: path.to_owned(), error })?;
    let kind = metadata.file_type();
    if kind.is_file() {
        Ok(Kind::File)
    } else if kind.is_block_device() {
        Ok(Kind::Device)
    } else {
        Err(ImageError::Kind { path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests;
