use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::time::Instant;

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use tempfile::NamedTempFile;

use super::*;

const SOON: Duration = Duration::from_millis(60);

fn file(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn of(path: &Path) -> ImageOptions {
    ImageOptions { patience: SOON, ..ImageOptions::new(Source::File(path.into())) }
}

/// One that comes by migration.
fn incoming(path: &Path) -> ImageOptions {
    ImageOptions { hold: Hold::Incoming, ..of(path) }
}

fn held(path: &Path, read_only: bool) -> ImageOptions {
    ImageOptions { read_only, hold: Hold::WhileOpen, ..of(path) }
}

/// A loop device, which ends with the value.
struct Loop {
    path: PathBuf,
    file: NamedTempFile,
}

impl Loop {
    /// `None`, with a message, where that is not allowed.
    fn make(sector_bytes: u32, bytes: u64) -> Option<Self> {
        let file = file(bytes);
        let size = format!("--sector-size={sector_bytes}");
        let output = Command::new("losetup").args(["--find", "--show", &size]).arg(file.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self { path: String::from_utf8(output.stdout).unwrap().trim().into(), file })
            }
            other => {
                eprintln!("skipped: no loop device can be made here: {other:?}");
                None
            }
        }
    }

    fn losetup(&self, option: &str) {
        let status = Command::new("losetup").arg(option).arg(&self.path).status().unwrap();
        assert!(status.success(), "losetup {option}: {status}");
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.losetup("--detach");
    }
}

#[test]
fn one_writer_or_many_readers() {
    let file = file(4096);
    let writer = Image::open(&held(file.path(), false)).unwrap();
    for read_only in [false, true] {
        assert!(matches!(Image::open(&held(file.path(), read_only)), Err(ImageError::Locked { .. })));
    }
    drop(writer);
    let _readers = [0, 1].map(|_| Image::open(&held(file.path(), true)).unwrap());
    let refused = Image::open(&held(file.path(), false)).unwrap_err().to_string();
    assert!(refused.contains("stop that one first"), "{refused}");
}

#[test]
fn a_served_image_is_handed_over_when_its_last_queue_has_stopped() {
    let file = file(4096);
    let (source, destination) =
        (Image::open(&of(file.path())).unwrap(), Image::open(&of(file.path())).unwrap());
    source.acquire().unwrap();
    source.acquire().unwrap();
    assert!(matches!(Image::open(&of(file.path())), Err(ImageError::Locked { .. })));
    let third = Image::open(&incoming(file.path())).expect("opening only looks");
    assert!(matches!(third.acquire_within(SOON), Err(ImageError::Locked { .. })));
    source.release().unwrap();
    assert!(
        matches!(destination.acquire_within(SOON), Err(ImageError::Locked { .. })),
        "one queue still runs"
    );
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| destination.acquire());
        source.release().unwrap();
        waiting.join().unwrap().unwrap();
    });
    // the migration has failed: the source may have it back
    assert!(source.acquire_within(SOON).is_err());
    destination.release().unwrap();
    source.acquire_within(SOON).unwrap();
    // what has failed has left nothing behind
    source.release().unwrap();
    third.acquire_within(SOON).unwrap();
}

#[test]
fn readers_share_and_keep_writers_out_while_they_serve() {
    let file = file(4096);
    let readers = [0, 1].map(|_| Image::open(&ImageOptions { read_only: true, ..of(file.path()) }).unwrap());
    let writer = Image::open(&of(file.path())).unwrap();
    for reader in &readers {
        reader.acquire_within(SOON).unwrap();
    }
    assert!(writer.acquire_within(SOON).is_err());
    readers[0].release().unwrap();
    assert!(writer.acquire_within(SOON).is_err());
    readers[1].release().unwrap();
    writer.acquire_within(SOON).unwrap();
    assert!(readers[0].acquire_within(SOON).is_err());
}

/// What is in flight for a process that was killed keeps its open file: a duplicate stands for it here.
#[test]
fn the_lock_outlasts_the_image_until_its_open_file_ends() {
    for hold in [Hold::WhileOpen, Hold::WhileServing] {
        let file = file(4096);
        let killed = Image::open(&ImageOptions { hold, ..of(file.path()) }).unwrap();
        killed.acquire().unwrap();
        let in_flight = killed.file().try_clone().unwrap();
        drop(killed);
        let next = Image::open(&incoming(file.path())).unwrap();
        assert!(matches!(next.acquire_within(SOON), Err(ImageError::Locked { .. })));
        drop(in_flight);
        next.acquire_within(SOON).unwrap();
    }
}

#[test]
fn what_is_no_raw_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Image::open(&of(&dir.path().join("none"))), Err(ImageError::Open { .. })));
    assert!(matches!(Image::open(&of(dir.path())), Err(ImageError::Kind { .. })));
    for (bytes, block_bytes) in [(0, 512), (511, 512), (513, 512), (4096 + 512, 4096)] {
        let refused = Image::open(&ImageOptions { block_bytes, ..of(file(bytes).path()) }).unwrap_err();
        assert!(matches!(refused, ImageError::Length { .. }), "{refused}");
    }
    for block_bytes in [0, 1024, 8192] {
        let refused = Image::open(&ImageOptions { block_bytes, ..of(file(8192).path()) }).unwrap_err();
        assert!(matches!(refused, ImageError::BlockSize { .. }), "{refused}");
    }
    let image = Image::open(&of(file(1024).path())).unwrap();
    assert!(image.holds(0, 1024) && image.holds(1024, 0) && image.holds(512, 512));
    assert!(!image.holds(512, 513) && !image.holds(u64::MAX, 2));
}

#[test]
fn a_file_in_memory_is_never_served_past_the_page_cache() {
    let file = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
    file.as_file().set_len(8192).unwrap();
    let image = Image::open(&of(file.path())).unwrap();
    assert_eq!(image.access(), Access::Memory);
    let flags = rustix::fs::fcntl_getfl(image.file()).unwrap();
    assert!(!flags.contains(OFlags::DIRECT));
    let on = ImageOptions { direct: Direct::On, ..of(file.path()) };
    let refused = Image::open(&on).unwrap_err().to_string();
    assert!(refused.contains("in memory") && refused.contains("--direct auto"), "{refused}");
}

/// Both descriptors of an image that is served with O_DIRECT see what the other has written.
#[test]
fn direct_and_buffered_see_the_same() {
    let file = file(1 << 20);
    let off = Image::open(&ImageOptions { direct: Direct::Off, ..of(file.path()) }).unwrap();
    assert!(matches!(off.access(), Access::Buffered | Access::Memory));
    let image = Image::open(&ImageOptions { block_bytes: 4096, ..of(file.path()) }).unwrap();
    let Access::Direct { memory_align, offset_align } = image.access() else {
        eprintln!("skipped: no direct I/O in {}", file.path().display());
        return;
    };
    assert!(offset_align <= 4096);
    let mut memory = vec![0; 4096 + memory_align as usize];
    let start = memory.as_ptr().align_offset(memory_align as usize);
    let block = &mut memory[start..start + 4096];
    image.write_at(&[7; 1000], 8192 + 1).unwrap();
    image.file().read_exact_at(block, 8192).unwrap();
    assert_eq!((block[0], block[1], block[1000], block[1001]), (0, 7, 7, 0));
    block.fill(9);
    image.file().write_all_at(block, 8192).unwrap();
    let mut read = [0; 3];
    image.read_at(&mut read, 8192 + 4094 - 1).unwrap();
    assert_eq!(read, [9, 9, 9]);
    // a file system may serve what is not aligned all the same (ext4 does), so only the flag tells
    assert!(rustix::fs::fcntl_getfl(image.file()).unwrap().contains(OFlags::DIRECT));
    assert!(!rustix::fs::fcntl_getfl(off.file()).unwrap().contains(OFlags::DIRECT));
}

#[test]
fn a_null_disk_is_zeros_and_takes_everything() {
    let options = ImageOptions::new(Source::Null { bytes: 1 << 40 });
    let image = Image::open(&options).unwrap();
    assert_eq!((image.access(), image.bytes(), image.path()), (Access::Null, 1 << 40, Path::new("null")));
    image.acquire().unwrap();
    image.release().unwrap();
    image.write_at(&[1; 100], 1 << 39).unwrap();
    let mut data = [1; 100];
    image.read_at(&mut data, 1 << 39).unwrap();
    assert_eq!(data, [0; 100]);
    assert_eq!(image.resize(Some(1 << 41)).unwrap(), 1 << 41);
    assert!(image.holds(1 << 40, 512));
    let uneven = ImageOptions::new(Source::Null { bytes: 1000 });
    assert!(matches!(Image::open(&uneven), Err(ImageError::Length { .. })));
}

#[test]
fn a_file_grows_when_told_or_when_it_has_grown() {
    let file = file(8192);
    let image = Image::open(&of(file.path())).unwrap();
    assert_eq!(image.resize(Some(16384)).unwrap(), 16384);
    assert_eq!((image.bytes(), file.as_file().metadata().unwrap().len()), (16384, 16384));
    image.acquire_within(SOON).unwrap();
    file.as_file().set_len(32768).unwrap();
    assert_eq!(image.bytes(), 16384);
    assert_eq!(image.resize(None).unwrap(), 32768);
    assert!(image.holds(32256, 512));
    let refused = image.resize(Some(16384)).unwrap_err().to_string();
    assert!(refused.contains("only enlarged") && refused.contains("32768"), "{refused}");
    assert!(matches!(image.resize(Some(33000)), Err(ImageError::Length { .. })));
    assert!(matches!(image.resize(Some(0)), Err(ImageError::Length { .. })));
    assert!(matches!(image.resize(Some(1 << 63)), Err(ImageError::Length { .. })));
    // whoever has cut the file must hear the truth from the guest's errors only
    file.as_file().set_len(1024).unwrap();
    assert_eq!(image.resize(None).unwrap(), 1024);
    assert_eq!(file.as_file().metadata().unwrap().len(), 1024);
    let reader = Image::open(&ImageOptions { read_only: true, ..incoming(file.path()) }).unwrap();
    assert!(reader.resize(Some(2048)).unwrap_err().to_string().contains("read-only"));
    assert_eq!(reader.resize(Some(1024)).unwrap(), 1024);
}

/// Discards and zeroes the middle of a disk of 64 KiB that was full of ones.
fn zeroed_where_told(image: &Image) {
    for (mode, what) in [
        (image.discard_mode(), "discard"),
        (image.zero_mode(true), "zeroes with unmap"),
        (image.zero_mode(false), "zeroes"),
    ] {
        image.write_at(&[1; 65536], 0).unwrap();
        image.file().sync_data().unwrap();
        let mode = FallocateFlags::from_bits(mode as u32).unwrap();
        match fallocate(image.file(), mode, 8192, 16384) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP) => {
                eprintln!("skipped: no {what} on {}", image.path().display());
                continue;
            }
            Err(error) => panic!("{what}: {error}"),
        }
        let mut data = vec![2; 65536];
        image.read_at(&mut data, 0).unwrap();
        let expected = [vec![1; 8192], vec![0; 16384], vec![1; 65536 - 24576]].concat();
        assert!(data == expected, "{what}");
        assert_eq!(image.resize(None).unwrap(), 65536, "{what}");
    }
}

#[test]
fn discards_and_zeroes_of_a_file_cover_what_they_say() {
    let file = file(65536);
    let image = Image::open(&of(file.path())).unwrap();
    zeroed_where_told(&image);
    assert!(image.discard_bytes_granularity() >= 512);
    image.write_at(&[1; 65536], 0).unwrap();
    image.file().sync_data().unwrap();
    let full = file.as_file().metadata().unwrap().blocks();
    fallocate(image.file(), FallocateFlags::from_bits_retain(image.discard_mode() as u32), 0, 65536).unwrap();
    assert!(file.as_file().metadata().unwrap().blocks() < full, "a discard frees");
}

#[test]
fn a_block_device_is_served_with_its_own_geometry() {
    let Some(device) = Loop::make(4096, 65536) else { return };
    let image = Image::open(&ImageOptions { block_bytes: 4096, ..of(&device.path) }).unwrap();
    assert_eq!(image.bytes(), 65536);
    assert!(matches!(image.access(), Access::Direct { offset_align: 4096, .. }), "{:?}", image.access());
    assert_eq!(image.topology().physical_block_exp, 0);
    // what is tried where nobody tells the alignment
    assert!(
        direct::can_read(image.file(), 4096, 4096, 65536)
            && !direct::can_read(image.file(), 4096, 512, 65536)
    );
    zeroed_where_told(&image);
    assert!(image.resize(Some(131_072)).unwrap_err().to_string().contains("enlarge the device itself"));
    device.file.as_file().set_len(131_072).unwrap();
    device.losetup("--set-capacity");
    assert_eq!(image.resize(None).unwrap(), 131_072);
    drop(image);
    // blocks that the guest may split further than the device can write them
    let small = Image::open(&of(&device.path)).unwrap();
    assert_eq!((small.access(), small.topology().physical_block_exp), (Access::Buffered, 3));
    let on = ImageOptions { direct: Direct::On, ..of(&device.path) };
    let refused = Image::open(&on).unwrap_err().to_string();
    assert!(refused.contains("blocks of 4096 bytes"), "{refused}");
}

#[test]
fn a_block_device_that_the_host_uses_is_refused_and_one_of_ours_is_waited_for() {
    let Some(device) = Loop::make(512, 65536) else { return };
    let mounted = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path).unwrap();
    for hold in [Hold::WhileOpen, Hold::WhileServing] {
        let refused = Image::open(&ImageOptions { hold, ..of(&device.path) }).unwrap_err();
        assert!(matches!(refused, ImageError::Busy { .. }), "{refused}");
    }
    drop(mounted);
    let first = Image::open(&of(&device.path)).unwrap();
    first.acquire().unwrap();
    let second = Image::open(&incoming(&device.path)).unwrap();
    let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device.path);
    assert_eq!(
        claim.unwrap_err().raw_os_error(),
        Some(libc::EBUSY),
        "the host is kept out while it is served"
    );
    let began = Instant::now();
    assert!(matches!(second.acquire_within(SOON), Err(ImageError::Locked { .. })));
    assert!(began.elapsed() >= SOON);
    first.release().unwrap();
    second.acquire_within(SOON).unwrap();
}
