//! The file system's side of it.
#![expect(unsafe_code, reason = "gives the server's threads a descriptor table of their own")]

use std::ffi::OsStr;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session,
    SessionACL, WriteFlags,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{Access, Fault, Shared};

/// A thread whose request hangs serves nothing else.
const THREADS: usize = 6;

const TTL: Duration = Duration::from_secs(3600);

const FILE: INodeNo = INodeNo(2);

/// Serves the file system until nobody has it open any more.
///
/// A process that waits for a file system which it serves itself cannot be killed: the wait ends when the last
/// descriptor of /dev/fuse is closed, and the threads that wait keep their common table of descriptors alive. So the
/// server's threads have another table, with that one descriptor in it.
pub(super) fn start(fuse: OwnedFd, shared: Arc<Shared>) {
    let number = fuse.as_raw_fd();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let serve = move || {
        // SAFETY: of the descriptors in the copied table this thread, and those that it starts, use one: `fuse`.
        unsafe { unshare_unsafe(UnshareFlags::FILES) }.unwrap();
        for (first, last) in [(3, number - 1), (number + 1, i32::MAX)] {
            if first <= last {
                // SAFETY: they are copies, in a table that belongs to this thread alone.
                let closed = unsafe { libc::close_range(first as u32, last as u32, 0) };
                assert_eq!(closed, 0, "{}", std::io::Error::last_os_error());
            }
        }
        ready.send(()).unwrap();
        // SAFETY: open, and the only owner of it in this table.
        let fuse = unsafe { OwnedFd::from_raw_fd(number) };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        let served =
            Session::from_fd(File { shared }, fuse, SessionACL::Owner, config).and_then(Session::run);
        if let Err(error) = served {
            println!("the faulty disk's server has ended: {error}");
        }
    };
    let fuse = std::mem::ManuallyDrop::new(fuse);
    std::thread::Builder::new().name("faulty-disk".into()).spawn(serve).unwrap();
    is_ready.recv().unwrap();
    // the server has its copy
    drop(std::mem::ManuallyDrop::into_inner(fuse));
}

struct File {
    shared: Arc<Shared>,
}

impl File {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o700, 0),
            FILE => (FileType::RegularFile, 0o600, self.shared.state().content.len() as u64),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// Does something with the file's content, after whatever stands in its way.
    fn access<T>(
        &self,
        access: Access,
        offset: u64,
        bytes: usize,
        act: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, Errno> {
        let mut state = self.shared.state();
        state.requests += 1;
        let length = state.content.len();
        let start = length.min(usize::try_from(offset).unwrap_or(length));
        let most = match access {
            Access::Read => state.read_bytes_max,
            Access::Write => state.write_bytes_max,
            Access::Sync => None,
        };
        let most = most.unwrap_or(usize::MAX);
        let end = start + bytes.min(most).min(length - start);
        let touched: Range<u64> = start as u64..end as u64;
        if state.fault(access, &touched) == Some(Fault::Hang) {
            state.hanging += 1;
            self.shared.changed.notify_all();
            let hangs = |state: &mut super::State| state.fault(access, &touched) == Some(Fault::Hang);
            state = self.shared.changed.wait_while(state, hangs).unwrap();
            state.hanging -= 1;
            self.shared.changed.notify_all();
        }
        match state.fault(access, &touched) {
            Some(Fault::Error(error)) => Err(error),
            _ => Ok(act(&mut state.content[start..end])),
        }
    }
}

impl Filesystem for File {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == "disk" => {
                reply.entry(&TTL, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Nothing is cached, so that each transfer arrives here as it was asked for and its length is the answer's, and
    /// one write that hangs does not keep the kernel from asking for others.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.access(Access::Read, offset, size as usize, |content| content.to_vec()) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let write = |content: &mut [u8]| {
            content.copy_from_slice(&data[..content.len()]);
            content.len() as u32
        };
        let written = self.access(Access::Write, offset, data.len(), write).and_then(|bytes| {
            // RWF_DSYNC is the file system's to keep
            if flags.0 & libc::O_DSYNC != 0 {
                self.access(Access::Sync, 0, 0, |_| ())?;
            }
            Ok(bytes)
        });
        match written {
            Ok(bytes) => reply.written(bytes),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.access(Access::Sync, 0, 0, |_| ()) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }
}
