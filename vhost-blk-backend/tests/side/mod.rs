//! One side of a pair: a protected disk, its guest, and a controller on the control socket.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use colo::control::{Client, Command, Event, Role, Server};
use colo::memory::DirtyLogs;
use crossbeam_channel::{Receiver, unbounded};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::Value;
use tempfile::TempDir;
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::control::Controlled;
use vhost_blk_backend::image::{Direct, Hold, ImageOptions, Source};

use crate::guest::Guest;

const LIMIT: Duration = Duration::from_secs(20);

pub struct Side {
    pub guest: Guest,
    client: Option<Client>,
    pub events: Receiver<Option<Event>>,
    directory: TempDir,
    disk_bytes: usize,
}

impl Side {
    /// A disk with this content, and nobody attached.
    pub fn start(content: &[u8], buffer_bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, content).unwrap();
        let image = ImageOptions {
            direct: Direct::Off,
            hold: Hold::WhileOpen,
            ..ImageOptions::new(Source::File(path))
        };
        let backend = Backend::start(&Options::new(image)).unwrap();
        let logs = DirtyLogs::new();
        let socket = directory.path().join("control");
        let server = Server::bind(&socket).unwrap();
        let mut controlled =
            Controlled::new(backend.clone(), logs.clone(), server.events(), true, buffer_bytes).unwrap();
        std::thread::spawn(move || {
            let greeting = controlled.greeting();
            server.run(&greeting, &mut controlled)
        });
        let (sender, events) = unbounded();
        let on_event = move |event| drop(sender.send(event));
        let client = Client::connect(&socket, on_event).unwrap();
        assert_eq!(client.greeting().disk_bytes, Some(content.len() as u64));
        let guest = Guest::start(backend, logs);
        Self { guest, client: Some(client), events, directory, disk_bytes: content.len() }
    }

    /// The controller goes and another comes. The back end has seen the first one's end by then.
    pub fn change_controllers(&mut self) {
        self.client = None;
        let (sender, events) = unbounded();
        let on_event = move |event| drop(sender.send(event));
        self.client = Some(Client::connect(&self.directory.path().join("control"), on_event).unwrap());
        self.events = events;
    }

    /// What the controller was told at its arrival.
    pub fn greeted_disk_bytes(&self) -> Option<u64> {
        self.client.as_ref().expect("a controller").greeting().disk_bytes
    }

    pub fn tell(&mut self, command: &Command) -> Result<Value, String> {
        self.tell_with(command, &[])
    }

    fn tell_with(&mut self, command: &Command, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<Value, String> {
        let client = self.client.as_mut().expect("a controller");
        client.call(command, fds, LIMIT).map_err(|error| error.to_string())
    }

    pub fn status(&mut self) -> Value {
        self.tell(&Command::Status).unwrap()
    }

    pub fn attach(&mut self, role: Role, link: &OwnedFd) -> Result<Value, String> {
        self.tell_with(&Command::Attach { role, epoch: 1 }, &[link.as_fd()])
    }

    pub fn next_event(&self) -> Event {
        self.events.recv_timeout(LIMIT).unwrap().expect("the back end serves")
    }

    /// The next event that is no wish for a checkpoint.
    pub fn await_marker(&self) -> u64 {
        loop {
            match self.next_event() {
                Event::Marker { epoch } => return epoch,
                Event::CheckpointWanted { .. } => {}
                other @ Event::LinkLost { .. } => panic!("{other:?}"),
            }
        }
    }

    /// What is on the disk, below everything.
    pub fn disk(&self) -> Vec<u8> {
        let mut content = vec![0; self.disk_bytes];
        let file = std::fs::File::open(self.directory.path().join("disk")).unwrap();
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    /// What the guest sees of it.
    pub fn seen(&mut self) -> Vec<u8> {
        let piece = crate::guest::DATA_BYTES.min(64 << 10);
        let offsets = (0..self.disk_bytes).step_by(piece);
        offsets.flat_map(|at| self.guest.read(at as u64 / 512, piece.min(self.disk_bytes - at))).collect()
    }
}

/// Two connected stream sockets.
pub fn link() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

pub struct Pair {
    pub primary: Side,
    pub secondary: Side,
    pub epoch: u64,
}

impl Pair {
    /// Two attached sides with equal disks.
    pub fn start(content: &[u8], buffer_bytes: usize) -> Self {
        let mut primary = Side::start(content, buffer_bytes);
        let mut secondary = Side::start(content, buffer_bytes);
        assert_eq!(primary.status()["disk_digest"], secondary.status()["disk_digest"]);
        let (ours, theirs) = link();
        secondary.attach(Role::Secondary, &theirs).unwrap();
        primary.attach(Role::Primary, &ours).unwrap();
        Self { primary, secondary, epoch: 1 }
    }

    /// The first half of a checkpoint: both paused, everything of the epoch applied. Returns where the rings stand.
    pub fn begin_checkpoint(&mut self) -> (u16, u16) {
        let stand = (self.primary.guest.pause(), self.secondary.guest.pause());
        assert_eq!(self.primary.guest.used_index(), stand.0, "something is in flight");
        assert_eq!(self.secondary.guest.used_index(), stand.1, "something is in flight");
        self.primary.tell(&Command::Marker { epoch: self.epoch }).unwrap();
        assert_eq!(self.secondary.await_marker(), self.epoch);
        stand
    }

    pub fn finish_checkpoint(&mut self, stand: (u16, u16)) {
        let commit = Command::Commit { epoch: self.epoch };
        self.secondary.tell(&commit).unwrap();
        assert_eq!(self.secondary.disk(), self.primary.disk());
        self.primary.tell(&commit).unwrap();
        self.epoch += 1;
        self.primary.guest.resume(stand.0);
        self.secondary.guest.resume(stand.1);
    }

    pub fn checkpoint(&mut self) {
        let stand = self.begin_checkpoint();
        self.finish_checkpoint(stand);
    }
}
