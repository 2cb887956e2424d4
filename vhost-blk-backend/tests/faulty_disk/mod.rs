//! A disk that fails when a test says so: a FUSE file system with one file, kept in memory.
//!
//! It is mounted in no directory. The path of its file leads through the descriptor of the mount, so that everything is
//! gone when the test is, however it ended.
#![allow(unreachable_pub, reason = "a module of a test")]

mod server;

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use fuser::Errno;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// Longer than any test may wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

/// What a request does to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Sync,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Error(Errno),
    /// No answer before it is taken away.
    Hang,
}

#[derive(Debug)]
struct Rule {
    number: u64,
    access: Access,
    /// Only what touches these bytes, which for a sync is anything.
    bytes: Range<u64>,
    fault: Fault,
}

#[derive(Debug, Default)]
struct State {
    content: Vec<u8>,
    rules: Vec<Rule>,
    next_number: u64,
    /// The most bytes that one read, and that one write moves.
    read_bytes_max: Option<usize>,
    write_bytes_max: Option<usize>,
    /// Requests that hang now.
    hanging: usize,
    /// Requests that were asked for, of any kind.
    requests: u64,
}

impl State {
    fn fault(&self, access: Access, bytes: &Range<u64>) -> Option<Fault> {
        let hit = |rule: &&Rule| {
            rule.access == access
                && (access == Access::Sync || rule.bytes.start < bytes.end && bytes.start < rule.bytes.end)
        };
        self.rules.iter().find(hit).map(|rule| rule.fault)
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// The mounted file system.
#[derive(Debug)]
pub struct FaultyDisk {
    mount: OwnedFd,
    shared: Arc<Shared>,
}

impl FaultyDisk {
    /// A disk of zeros. `None`, with a line that says so, where there is no FUSE.
    pub fn mount(bytes: usize) -> Option<Self> {
        let shared = Arc::<Shared>::default();
        shared.state().content = vec![0; bytes];
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mounted = rustix::fs::open("/dev/fuse", flags, Mode::empty()).and_then(|fuse| {
            let options = [
                ("fd", fuse.as_raw_fd().to_string()),
                ("rootmode", "40000".into()),
                ("user_id", "0".into()),
                ("group_id", "0".into()),
            ];
            let mount = mount("fuse", &options)?;
            Ok((fuse, mount))
        });
        match mounted {
            Ok((fuse, mount)) => {
                server::start(fuse, shared.clone());
                Some(Self { mount, shared })
            }
            Err(error) => {
                println!("skipped: no FUSE: {error}");
                None
            }
        }
    }

    /// Where the disk can be opened.
    pub fn path(&self) -> PathBuf {
        path_in(&self.mount).join("disk")
    }

    pub fn content(&self, offset: usize, bytes: usize) -> Vec<u8> {
        self.shared.state().content[offset..offset + bytes].to_vec()
    }

    pub fn set_content(&self, offset: usize, data: &[u8]) {
        self.shared.state().content[offset..offset + data.len()].copy_from_slice(data);
    }

    /// How many reads, writes and syncs the disk was asked for.
    pub fn requests(&self) -> u64 {
        self.shared.state().requests
    }

    /// The same disk through a read-only overlay, and where it can be opened there.
    ///
    /// FUSE files can be polled, and io_uring treats what can be polled differently: when a read is cut short, that of
    /// Linux 6.18 goes on by itself and loses its place. A file of an overlay cannot be polled, so the device gets to
    /// see what is short.
    pub fn overlay(&self) -> Option<(OwnedFd, PathBuf)> {
        let mounted = mount("tmpfs", &[]).and_then(|empty| {
            let layers = [path_in(&self.mount), path_in(&empty)].map(|layer| layer.display().to_string());
            mount("overlay", &[("lowerdir", layers.join(":"))])
        });
        match mounted {
            Ok(mount) => {
                let path = path_in(&mount).join("disk");
                Some((mount, path))
            }
            Err(error) => {
                println!("skipped: no overlay can be mounted: {error}");
                None
            }
        }
    }

    /// From here on one read moves so many bytes at most. To be read through [`FaultyDisk::overlay`].
    pub fn shorten_reads(&self, bytes_max: Option<usize>) {
        self.shared.state().read_bytes_max = bytes_max;
    }

    /// From here on one write moves so many bytes at most.
    pub fn shorten_writes(&self, bytes_max: Option<usize>) {
        self.shared.state().write_bytes_max = bytes_max;
    }

    /// From here on nothing is moved, or everything again.
    pub fn move_nothing(&self, nothing: bool) {
        let bytes_max = nothing.then_some(0);
        let mut state = self.shared.state();
        (state.read_bytes_max, state.write_bytes_max) = (bytes_max, bytes_max);
    }

    /// What touches these bytes fails, until the value is dropped.
    pub fn fail(&self, access: Access, bytes: Range<u64>, error: Errno) -> FaultGuard {
        self.rule(access, bytes, Fault::Error(error))
    }

    /// What touches these bytes gets no answer until the value is dropped. Keep it so that a test that fails drops it
    /// before its guest: the guest waits for what hangs.
    pub fn hang(&self, access: Access, bytes: Range<u64>) -> FaultGuard {
        self.rule(access, bytes, Fault::Hang)
    }

    fn rule(&self, access: Access, bytes: Range<u64>, fault: Fault) -> FaultGuard {
        let mut state = self.shared.state();
        let number = state.next_number;
        state.next_number += 1;
        state.rules.push(Rule { number, access, bytes, fault });
        FaultGuard { shared: self.shared.clone(), number }
    }

    /// Returns when so many requests hang.
    pub fn await_hanging(&self, count: usize) {
        let state = self.shared.state();
        let (state, waited) =
            self.shared.changed.wait_timeout_while(state, LIMIT, |state| state.hanging != count).unwrap();
        assert!(!waited.timed_out(), "{} requests hang, {count} should", state.hanging);
    }

    pub fn hanging(&self) -> usize {
        self.shared.state().hanging
    }
}

/// A fault, for as long as it lives.
#[derive(Debug)]
#[must_use]
pub struct FaultGuard {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        self.shared.state().rules.retain(|rule| rule.number != self.number);
        self.shared.changed.notify_all();
    }
}

/// A file system in no directory: it lasts as long as the descriptor and what is open in it.
pub fn mount(kind: &str, options: &[(&str, String)]) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, value.as_str())?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

/// The root directory of such a file system.
pub fn path_in(mount: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", mount.as_raw_fd()).into()
}
