//! A worker between a driver, a LAN, a peer and a controller that the test plays.

mod failover;
mod pair;
mod plain;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use colo::control::{Client, ClientError, Command, Event, Greeting, PROTOCOL_VERSION, Role, Server};
use colo::link::Header;
use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};
use colo::runtime::{Sender, mailbox};
use colo::vhost_user::{Ring, RingSetup};
use crossbeam_channel::{Receiver, bounded, unbounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::Value;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::control::NetHandler;
use crate::device::{NetDevice, RX, TX};
use crate::frame::{HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::lan::Tap;
use crate::proxy::DigestMode;

const LIMIT: Duration = Duration::from_secs(10);
/// Long enough for what must not happen to happen.
const MOMENT: Duration = Duration::from_millis(50);
const SIZE: u16 = 16;
const BUFFER_BYTES: u32 = 1526;

/// Where one queue and its buffers lie.
const fn base(queue: usize) -> u64 {
    0x10000 * (1 + queue as u64)
}

/// One queue of the guest: `SIZE` buffers of [`BUFFER_BYTES`], each a chain of two descriptors.
struct Queue {
    memory: Arc<GuestMemory>,
    base: u64,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    available: u16,
    seen: u16,
}

impl Queue {
    fn descriptor(&self, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(self.base + 16 * u64::from(index))).unwrap();
    }

    fn buffer(&self, head: u16) -> u64 {
        self.base + 0x2000 + 2048 * u64::from(head)
    }

    /// Offers a buffer, which is cut in the middle of the header.
    fn offer(&mut self, flags: u32, bytes: u32) {
        let head = self.available % SIZE;
        let at = self.buffer(head);
        self.descriptor(head, Descriptor::new(at, 7, (flags | VRING_DESC_F_NEXT) as u16, SIZE + head));
        self.descriptor(SIZE + head, Descriptor::new(at + 7, bytes - 7, flags as u16, 0));
        let ring = self.base + 0x1000;
        self.memory
            .write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(self.available % (2 * SIZE))))
            .unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available, GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Waits for the next used buffer: its head and length.
    fn used(&mut self, limit: Duration) -> Option<(u16, u32)> {
        let ring = self.base + 0x1800;
        let index = || -> u16 { self.memory.load(GuestAddress(ring + 2), Ordering::SeqCst).unwrap() };
        while index() == self.seen {
            if !readable(&self.call, limit) {
                return None;
            }
            rustix::io::read(&self.call, &mut [0u8; 8]).unwrap();
        }
        let at = ring + 4 + 8 * u64::from(self.seen % (2 * SIZE));
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

fn readable(fd: &impl AsFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// A whole back end but for the vhost-user socket.
struct Bench {
    orders: Sender<Order>,
    lan: OwnedFd,
    queues: [Queue; 2],
    header_bytes: usize,
    /// Of the frames on the LAN.
    lan_header_bytes: usize,
    client: Option<Client>,
    events: Receiver<Option<Event>>,
    /// What the back end's memory mapping logs to.
    memory: Arc<GuestMemory>,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn start(protected: bool) -> Self {
        Self::start_with(protected, |tap| Port::Tap(Tap::from_packets(tap, true)))
    }

    /// One that is to be protected, with digests whatever the link.
    fn start_digesting() -> Self {
        let config = Config { digest: DigestMode::On, ..Config::default() };
        Self::start_configured(true, config, |tap| Port::Tap(Tap::from_packets(tap, true)))
    }

    fn start_with(protected: bool, port: impl FnOnce(OwnedFd) -> Port) -> Self {
        Self::start_configured(protected, Config::default(), port)
    }

    fn start_configured(protected: bool, config: Config, port: impl FnOnce(OwnedFd) -> Port) -> Self {
        let (ours, lan) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let bytes = 0x40000;
        rustix::fs::ftruncate(&ram, bytes).unwrap();
        let map = |logs: &DirtyLogs| {
            let mut table = MemoryTable::new(logs.clone());
            let file = ram.try_clone().unwrap();
            table
                .replace(vec![Region { guest_address: 0, bytes, user_address: 0, mmap_offset: 0, file }])
                .unwrap();
            table.memory().clone()
        };
        let logs = DirtyLogs::new();
        let (orders, mailbox) = mailbox().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let server = Server::bind(&path).unwrap();
        let settings = Settings { pair: 0, protected, window: Duration::from_micros(50), proxy: config };
        let worker = Worker::new(port(ours), mailbox, server.events(), settings);
        std::thread::spawn(|| worker.run());
        let device = Arc::new(NetDevice::new(vec![orders.clone()], 0, None));
        let mut handler = NetHandler::new(device, logs.clone());
        let greeting = Greeting {
            protocol: PROTOCOL_VERSION,
            device: "net".into(),
            version: "0".into(),
            disk_bytes: None,
        };
        std::thread::spawn(move || server.run(&greeting, &mut handler));
        let (sender, events) = unbounded();
        let client = Client::connect(&path, move |event| drop(sender.send(event))).unwrap();
        let event = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let guest = map(&DirtyLogs::new());
        let queues = [RX, TX].map(|queue| Queue {
            memory: guest.clone(),
            base: base(queue),
            kick: event(),
            call: event(),
            available: 0,
            seen: 0,
        });
        let bench = Self {
            orders,
            lan,
            queues,
            header_bytes: HEADER_BYTES,
            lan_header_bytes: HEADER_BYTES,
            client: Some(client),
            events,
            memory: map(&logs),
            _directory: directory,
        };
        bench.features(1 << VIRTIO_F_VERSION_1);
        bench
    }

    fn features(&self, features: u64) {
        self.orders.send(Order::Features(features)).unwrap();
    }

    /// Starts both queues at these indices.
    fn start_rings(&self, next: [u16; 2]) {
        for queue in [RX, TX] {
            let at = base(queue);
            let ring = Ring::new(RingSetup {
                index: queue,
                size: 2 * SIZE,
                descriptors: GuestAddress(at),
                available: GuestAddress(at + 0x1000),
                used: GuestAddress(at + 0x1800),
                next_available: next[queue],
                event_idx: false,
                memory: self.memory.clone(),
                kick: Some(self.queues[queue].kick.clone()),
                call: Some(self.queues[queue].call.clone()),
                error: None,
                broken_rings: Arc::default(),
                inflight: None,
            });
            self.orders.send(Order::Start { queue, ring: Box::new(ring.unwrap()) }).unwrap();
        }
    }

    /// Stops both queues. Returns the next available indices.
    fn stop_rings(&self) -> [u16; 2] {
        [RX, TX].map(|queue| {
            let (done, stopped) = bounded(1);
            self.orders.send(Order::Stop { queue, done }).unwrap();
            stopped.recv_timeout(LIMIT).unwrap()
        })
    }

    /// The guest gives a buffer to receive into.
    fn offer_buffer(&mut self) {
        self.queues[RX].offer(VRING_DESC_F_WRITE, BUFFER_BYTES);
    }

    /// The guest sends a frame.
    fn guest_sends(&mut self, frame: &[u8]) {
        self.guest_sends_with(&vec![0; self.header_bytes], frame);
    }

    fn guest_sends_with(&mut self, header: &[u8], frame: &[u8]) {
        let queue = &mut self.queues[TX];
        let at = queue.buffer(queue.available % SIZE);
        queue.memory.write_slice(&[header, frame].concat(), GuestAddress(at)).unwrap();
        queue.offer(0, (header.len() + frame.len()) as u32);
    }

    /// The next buffer that the guest gets back.
    fn guest_buffer(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let queue = &mut self.queues[RX];
        let (head, bytes) = queue.used(limit)?;
        let mut data = vec![0; bytes as usize];
        queue.memory.read_slice(&mut data, GuestAddress(queue.buffer(head))).unwrap();
        Some(data)
    }

    /// The next frame that the guest receives.
    fn guest_receives(&mut self, limit: Duration) -> Option<Vec<u8>> {
        let mut frame = self.guest_buffer(limit)?;
        let rest = frame.split_off(self.header_bytes);
        let mut header = vec![0; self.header_bytes];
        if let Some(count) = header.get_mut(10) {
            *count = 1;
        }
        assert_eq!(frame, header);
        Some(rest)
    }

    fn lan_sends(&self, frame: &[u8]) {
        self.lan_sends_with(&vec![0; self.lan_header_bytes], frame);
    }

    fn lan_sends_with(&self, header: &[u8], frame: &[u8]) {
        rustix::io::write(&self.lan, &[header, frame].concat()).unwrap();
    }

    /// The next frame on the LAN, with its header.
    fn lan_receives_with(&self, limit: Duration) -> Option<Vec<u8>> {
        if !readable(&self.lan, limit) {
            return None;
        }
        let mut frame = vec![0; 70_000];
        let bytes = rustix::io::read(&self.lan, &mut frame).unwrap();
        frame.truncate(bytes);
        Some(frame)
    }

    fn lan_receives(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut frame = self.lan_receives_with(limit)?;
        let rest = frame.split_off(self.lan_header_bytes);
        assert!(frame.iter().all(|byte| *byte == 0), "{frame:?}");
        Some(rest)
    }

    fn call(&mut self, command: &Command) -> Result<Value, ClientError> {
        self.client.as_mut().unwrap().call(command, &[], LIMIT)
    }

    fn status(&mut self, pointer: &str) -> Value {
        self.call(&Command::Status).unwrap().pointer(pointer).cloned().unwrap()
    }

    /// Begins protection in epoch 1. Returns the peer's end of the link.
    fn attach(&mut self, role: Role) -> Peer {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        self.attach_to(role, &theirs);
        Peer(ours)
    }

    /// The same over a given link.
    fn attach_to(&mut self, role: Role, link: &UnixStream) {
        let client = self.client.as_mut().unwrap();
        client.call(&Command::Attach { role, epoch: 1 }, &[link.as_fd()], LIMIT).unwrap();
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(LIMIT).unwrap().unwrap()
    }
}

/// The peer's net back end.
struct Peer(UnixStream);

impl Peer {
    fn send(&mut self, kind: u16, epoch: u64, payload: &[u8]) {
        let mut bytes = Vec::new();
        colo::link::encode(kind, epoch, &[payload], &mut bytes);
        self.0.write_all(&bytes).unwrap();
    }

    /// The next frame of the link: kind, epoch, payload.
    fn receive(&mut self) -> (u16, u64, Vec<u8>) {
        let mut payload = Vec::new();
        let Header { kind, epoch, .. } = colo::link::read_frame(&mut self.0, &mut payload).unwrap();
        (kind, epoch, payload)
    }

    fn is_silent(&self) -> bool {
        !readable(&self.0, MOMENT)
    }
}

/// A frame of a protocol that nobody parses, which is compared as a whole.
fn frame(text: &str) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 0x88, 0xb5];
    frame.extend_from_slice(text.as_bytes());
    frame.resize(60, 0);
    frame
}
