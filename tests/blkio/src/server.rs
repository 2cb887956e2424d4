//! The program under test, over an image of its own.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use blkio::{Blkio, Errno};
use serde_json::Value;
use tempfile::TempDir;

use crate::LIMIT;

/// `vhost-blk-backend` of `COLO_BIN_DIR`, else of the workspace's target/release.
fn program() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/release");
    let directory = std::env::var_os("COLO_BIN_DIR").map_or(built, PathBuf::from);
    let path = directory.join("vhost-blk-backend");
    assert!(path.exists(), "{} is not built: run 'make build', or set COLO_BIN_DIR", path.display());
    path
}

/// A back end lives no longer than this: libblkio waits for an answer for ever, and fails when the other side is gone.
const LIFE: Duration = Duration::from_secs(60);

/// A running back end. With the value it is killed, and its image, sockets and log are removed.
pub struct Server {
    child: Arc<Mutex<Child>>,
    /// Ends the thread that guards its life.
    alive: Sender<()>,
    directory: TempDir,
    image: File,
}

impl Server {
    /// Serves a new image of so many bytes in `parent`.
    pub fn start(parent: &str, bytes: u64, options: &[&str]) -> Self {
        let directory = TempDir::with_prefix_in("colo-blkio-", parent).unwrap();
        let path = |name: &str| directory.path().join(name);
        let image = File::options().create_new(true).read(true).write(true).open(path("image")).unwrap();
        image.set_len(bytes).unwrap();
        let log = File::create(path("log")).unwrap();
        let mut command = Command::new(program());
        command.arg("--socket-path").arg(path("socket")).arg("--control-path").arg(path("control"));
        command.arg("--blk-file").arg(path("image")).args(options);
        let child =
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let child = Arc::new(Mutex::new(child));
        let (alive, over) = channel();
        let guarded = child.clone();
        thread::spawn(move || {
            if over.recv_timeout(LIFE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("vhost-blk-backend is killed after {LIFE:?}");
                drop(guarded.lock().unwrap().kill());
            }
        });
        Self { child, alive, directory, image }
    }

    /// A libblkio client, as soon as the program listens.
    pub fn connect(&mut self, read_only: bool) -> Blkio {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", self.path("socket").to_str().unwrap()).unwrap();
        blkio.set_bool("read-only", read_only).unwrap();
        let deadline = Instant::now() + LIMIT;
        loop {
            match blkio.connect() {
                Ok(()) => return blkio,
                Err(error) if [Errno::NOENT, Errno::CONNREFUSED].contains(&error.errno()) => {}
                Err(error) => panic!("cannot connect: {error}"),
            }
            assert!(self.child().try_wait().unwrap().is_none(), "the back end has ended");
            assert!(Instant::now() < deadline, "the back end does not listen");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What an order (`status`, `resize`) prints.
    pub fn order(&self, order: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(program());
        command.arg(order).arg("--control-path").arg(self.path("control")).args(arguments);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A figure of `status`.
    pub fn figure(&self, name: &str) -> u64 {
        let status: Value = serde_json::from_str(&self.order("status", &[])).unwrap();
        status[name].as_u64().unwrap_or_else(|| panic!("no {name} in {status}"))
    }

    /// What is in the image.
    pub fn content(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.image.read_exact_at(&mut data, offset).unwrap();
        data
    }

    /// Puts something into the image, past the server.
    pub fn fill(&self, offset: u64, data: &[u8]) {
        self.image.write_all_at(data, offset).unwrap();
        self.image.sync_data().unwrap();
    }

    /// How much of the image the file system has given blocks.
    pub fn allocated_bytes(&self) -> u64 {
        // so that what is written late has blocks too
        self.image.sync_all().unwrap();
        self.image.metadata().unwrap().blocks() * 512
    }

    /// How many descriptors the program has open, and how many mappings.
    pub fn held(&self) -> [usize; 2] {
        let process = PathBuf::from(format!("/proc/{}", self.child().id()));
        let maps = std::fs::read_to_string(process.join("maps")).unwrap();
        [std::fs::read_dir(process.join("fd")).unwrap().count(), maps.lines().count()]
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // both fail only where it has ended already
        drop(self.child().kill());
        drop(self.child().wait());
        let _ = self.alive.send(());
        if thread::panicking() {
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            eprintln!("vhost-blk-backend said:\n{log}");
        }
    }
}
