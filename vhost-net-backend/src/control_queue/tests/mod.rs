//! A whole device behind a vhost-user socket: our own frontend and driver on one side, a LAN on the other.

mod announce;
mod filter;
mod life;
mod pairs;
mod tap;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo::control::EventSender;
use colo::memory::{DirtyLogs, GuestMemory, MemoryTable, Region};
use colo::runtime::mailbox;
use colo::vhost_user::{Device, SessionError, serve_connection};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Config, MacAddress, NetDevice};
use crate::frame::HEADER_BYTES;
use crate::lan::{Port, Tap};
use crate::worker::{Settings, Worker};

const LIMIT: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to happen.
const MOMENT: Duration = Duration::from_millis(50);
const RAM_BYTES: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

const OK: u8 = VIRTIO_NET_OK as u8;
const ERR: u8 = VIRTIO_NET_ERR as u8;

/// What a driver of today negotiates.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << VIRTIO_NET_F_CTRL_VLAN
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

const SIZE: u16 = 64;
/// Descriptors of a chain.
const PIECES_MAX: u16 = 16;
const SLOT_BYTES: u64 = 2048;

/// The driver's side of a queue: four chains, each with a buffer, again and again.
struct Queue {
    memory: Arc<GuestMemory>,
    base: u64,
    kick: EventFd,
    call: EventFd,
    available: u16,
    seen: u16,
}

impl Queue {
    fn new(memory: &Arc<GuestMemory>, index: usize) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let base = 0x10000 * (1 + index as u64);
        Self { memory: memory.clone(), base, kick: event(), call: event(), available: 0, seen: 0 }
    }

    /// Where the next chain's buffer is.
    fn buffer(&self) -> u64 {
        self.buffer_of(self.available % (SIZE / PIECES_MAX) * PIECES_MAX)
    }

    fn buffer_of(&self, head: u16) -> u64 {
        self.base + 0x3000 + SLOT_BYTES * u64::from(head / PIECES_MAX)
    }

    /// Offers a chain of pieces (length, writable), one after the other in its buffer.
    fn offer(&mut self, pieces: &[(usize, bool)]) {
        assert!(pieces.len() <= usize::from(PIECES_MAX));
        let head = self.available % (SIZE / PIECES_MAX) * PIECES_MAX;
        let mut at = self.buffer();
        for (number, (bytes, writable)) in pieces.iter().enumerate() {
            let index = head + number as u16;
            let next = number + 1 < pieces.len();
            let flags = u16::from(next) | if *writable { 2 } else { 0 };
            let descriptor = Descriptor::new(at, *bytes as u32, flags, if next { index + 1 } else { 0 });
            self.memory.write_obj(descriptor, GuestAddress(self.base + 16 * u64::from(index))).unwrap();
            at += *bytes as u64;
        }
        let ring = self.base + 0x1000;
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(self.available % SIZE))).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available, GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits for the next used chain: its buffer and what was written.
    fn used(&mut self, limit: Duration) -> Option<(u64, u32)> {
        let ring = self.base + 0x2000;
        let deadline = Instant::now() + limit;
        while self.memory.load::<u16>(GuestAddress(ring + 2), Ordering::SeqCst).unwrap() == self.seen {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let at = ring + 4 + 8 * u64::from(self.seen % SIZE);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((self.buffer_of(head as u16), self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

/// The device, with what is on either side of it.
struct World {
    frontend: Frontend,
    /// The same connection, for what that frontend cannot say.
    socket: UnixStream,
    /// What the device says unasked.
    requests: UnixStream,
    serving: JoinHandle<Result<(), SessionError>>,
    device: Arc<NetDevice>,
    /// The LAN's end of each tap.
    lan: Vec<OwnedFd>,
    ram: OwnedFd,
    queues: Vec<Queue>,
    control: usize,
    logs: DirtyLogs,
}

fn ram() -> OwnedFd {
    let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&ram, RAM_BYTES).unwrap();
    ram
}

fn map(ram: &OwnedFd) -> Arc<GuestMemory> {
    let mut table = MemoryTable::new(DirtyLogs::new());
    let file = ram.try_clone().unwrap();
    let region = Region { guest_address: 0, bytes: RAM_BYTES, user_address: USER, mmap_offset: 0, file };
    table.replace(vec![region]).unwrap();
    table.memory().clone()
}

/// A device with these queue pairs and a control queue, and the LAN's ends of its taps.
fn device(pairs: usize) -> (Arc<NetDevice>, Vec<OwnedFd>) {
    let pair = |_| {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Tap::from_packets(ours, true), theirs)
    };
    let (taps, lan) = (0..pairs).map(pair).unzip();
    (device_on(taps), lan)
}

/// A device on these taps, one for each queue pair, and its threads.
fn device_on(taps: Vec<Tap>) -> Arc<NetDevice> {
    let mut workers = Vec::new();
    for (pair, tap) in taps.into_iter().enumerate() {
        let (orders, mailbox) = mailbox().unwrap();
        let window = Duration::from_micros(20);
        let settings = Settings { pair, protected: false, window, proxy: crate::proxy::Config::default() };
        let worker = Worker::new(Port::Tap(tap), mailbox, EventSender::default(), settings);
        std::thread::spawn(|| worker.run());
        workers.push(orders);
    }
    let config = Config { mac: MacAddress(MAC), mtu: 1500 };
    let mut device = NetDevice::new(workers, MERGEABLE, Some(config));
    let control_queue = device.add_control_queue().unwrap().unwrap();
    std::thread::spawn(|| control_queue.run());
    Arc::new(device)
}

impl World {
    /// A driver that has just started, on a device with these queue pairs.
    fn start(pairs: usize, features: u64) -> Self {
        let world = Self::connected(pairs, features);
        world.begun()
    }

    /// The same before any queue is started.
    fn connected(pairs: usize, features: u64) -> Self {
        let (device, lan) = device(pairs);
        Self::connect(device, lan, ram(), features)
    }

    fn connect(device: Arc<NetDevice>, lan: Vec<OwnedFd>, ram: OwnedFd, features: u64) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let logs = DirtyLogs::new();
        let serving = {
            let (device, logs) = (device.clone(), logs.clone());
            std::thread::spawn(move || serve_connection(&*device, &logs, theirs))
        };
        let queues = device.queues();
        let mut frontend = Frontend::from_stream(socket.try_clone().unwrap(), queues as u64);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(features & !offered, 0);
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RARP
            | VhostUserProtocolFeatures::BACKEND_REQ;
        assert!(frontend.get_protocol_features().unwrap().contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (requests, theirs) = UnixStream::pair().unwrap();
        requests.set_read_timeout(Some(LIMIT)).unwrap();
        frontend.set_backend_request_fd(&theirs).unwrap();
        let control = if features & MQ == 0 { 2 } else { queues - 1 };
        let memory = map(&ram);
        let world = Self {
            frontend,
            socket,
            requests,
            serving,
            device,
            lan,
            ram,
            queues: (0..queues).map(|index| Queue::new(&memory, index)).collect(),
            control,
            logs,
        };
        world.set_features(features);
        world.set_memory();
        world
    }

    fn set_features(&self, features: u64) {
        self.frontend.set_features(features | 1 << 30).unwrap();
    }

    fn set_memory(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM_BYTES,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.ram.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    /// Starts every queue.
    fn begun(mut self) -> Self {
        for index in 0..=self.control {
            self.start_queue(index, 0).unwrap();
        }
        self
    }

    fn start_queue(&mut self, index: usize, next: u16) -> Result<(), vhost::Error> {
        let queue = &self.queues[index];
        let address = |offset: u64| USER + queue.base + offset;
        let data = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: address(0),
            avail_ring_addr: address(0x1000),
            used_ring_addr: address(0x2000),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, SIZE)?;
        self.frontend.set_vring_base(index, next)?;
        self.frontend.set_vring_addr(index, &data)?;
        self.frontend.set_vring_call(index, &queue.call)?;
        self.frontend.set_vring_kick(index, &queue.kick)?;
        self.frontend.set_vring_enable(index, true).map_err(|_| vhost::Error::InvalidQueue)
    }

    /// Stops all queues, as when the VM is paused or the driver resets the device. Returns where they go on.
    fn stop(&mut self) -> Vec<u16> {
        (0..=self.control).map(|index| self.frontend.get_vring_base(index).unwrap() as u16).collect()
    }

    fn resume(&mut self, next: &[u16]) {
        for (index, next) in next.iter().enumerate() {
            self.start_queue(index, *next).unwrap();
        }
    }

    /// The driver begins anew after a reset.
    fn reset(&mut self) {
        self.stop();
        self.begin_anew();
    }

    fn begin_anew(&mut self) {
        self.forget();
        self.resume(&vec![0; self.control + 1]);
    }

    /// Rings with nothing in them.
    fn forget(&mut self) {
        self.queues = (0..self.queues.len()).map(|index| Queue::new(&map(&self.ram), index)).collect();
        for queue in &self.queues {
            queue.memory.write_slice(&[0; 0x3000], GuestAddress(queue.base)).unwrap();
        }
    }

    /// Gives a command in pieces, with room for an answer. Returns what is there afterwards, and the length that the device
    /// says.
    fn command_in(&mut self, command: &[u8], pieces: &[usize], room: usize) -> (Vec<u8>, u32) {
        assert_eq!(pieces.iter().sum::<usize>(), command.len());
        let queue = &mut self.queues[self.control];
        let at = queue.buffer();
        queue.memory.write_slice(command, GuestAddress(at)).unwrap();
        queue.memory.write_slice(&vec![0xee; room], GuestAddress(at + command.len() as u64)).unwrap();
        let mut pieces: Vec<_> = pieces.iter().map(|bytes| (*bytes, false)).collect();
        if room > 0 {
            pieces.push((room, true));
        }
        queue.offer(&pieces);
        let (buffer, written) = queue.used(LIMIT).expect("the command is not answered");
        assert_eq!(buffer, at);
        let mut answer = vec![0; room];
        queue.memory.read_slice(&mut answer, GuestAddress(at + command.len() as u64)).unwrap();
        (answer, written)
    }

    /// Gives a command as Linux does. Returns the answer.
    fn command(&mut self, class: u32, command: u32, data: &[u8]) -> u8 {
        let bytes = [&[class as u8, command as u8], data].concat();
        let (answer, written) = self.command_in(&bytes, &[2, data.len()], 1);
        assert_eq!(written, 1);
        answer[0]
    }

    fn mode(&mut self, command: u32, on: bool) {
        assert_eq!(self.command(VIRTIO_NET_CTRL_RX, command, &[u8::from(on)]), OK);
    }

    fn set_tables(&mut self, unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> u8 {
        let table = |macs: &[[u8; 6]]| [&(macs.len() as u32).to_le_bytes()[..], &macs.concat()].concat();
        let data = [table(unicast), table(multicast)].concat();
        self.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, &data)
    }

    fn lan_sends(&self, pair: usize, frame: &[u8]) {
        rustix::io::write(&self.lan[pair], &[&[0; HEADER_BYTES], frame].concat()).unwrap();
    }

    /// The next frame that the guest receives by a pair for which it has a buffer.
    fn received(&mut self, pair: usize, limit: Duration) -> Option<Vec<u8>> {
        let queue = &mut self.queues[2 * pair];
        let (at, bytes) = queue.used(limit)?;
        let mut frame = vec![0; bytes as usize];
        queue.memory.read_slice(&mut frame, GuestAddress(at)).unwrap();
        Some(frame.split_off(HEADER_BYTES))
    }

    /// Which of these frames the guest receives by the first pair, when they come in this order. Its buffers are in pieces
    /// of these lengths.
    fn admitted_in(&mut self, frames: &[Vec<u8>], pieces: &[usize]) -> Vec<Vec<u8>> {
        let pieces: Vec<_> = pieces.iter().map(|bytes| (*bytes, true)).collect();
        // the last comes in any case, so that nobody has to wait for what does not come
        let end = frame(MAC, &[0x88, 0xb5, 0xed]);
        for frame in frames.iter().chain([&end]) {
            self.lan_sends(0, frame);
        }
        let mut admitted = Vec::new();
        loop {
            self.queues[0].offer(&pieces);
            let frame = self.received(0, LIMIT).expect("the last frame does not come");
            if frame == end {
                return admitted;
            }
            admitted.push(frame);
        }
    }

    fn admitted(&mut self, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        self.admitted_in(frames, &[1526])
    }

    fn config(&mut self) -> Vec<u8> {
        self.frontend.get_config(0, 12, VhostUserConfigFlags::WRITABLE, &[0; 12]).unwrap().1
    }

    /// Link and announcement, as the driver reads them.
    fn status(&mut self) -> u32 {
        let config = self.config();
        u16::from_le_bytes([config[6], config[7]]).into()
    }

    /// SEND_RARP, with an answer.
    fn send_rarp(&mut self, mac: [u8; 6]) {
        let mut message = [19u32, 1 | 8, 8].map(u32::to_ne_bytes).concat();
        message.extend(mac);
        message.extend([0; 2]);
        self.socket.write_all(&message).unwrap();
        let mut answer = [0; 20];
        self.socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8]);
    }

    fn lan_receives(&self, limit: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut frame = vec![0; 2000];
        while Instant::now() < deadline {
            if let Ok(bytes) = rustix::io::read(&self.lan[0], &mut frame) {
                return Some(frame[HEADER_BYTES..bytes].to_vec());
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        None
    }

    fn figure(&self, pointer: &str) -> u64 {
        let status = crate::control::status(&self.device, &self.logs).unwrap();
        status.pointer(pointer).and_then(serde_json::Value::as_u64).unwrap()
    }
}

/// A frame to this address: what comes behind the addresses, and zeros.
fn frame(to: [u8; 6], rest: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &[0x52, 0x54, 0, 0, 0, 0x99], rest].concat();
    frame.resize(60, 0);
    frame
}

fn to(address: [u8; 6]) -> Vec<u8> {
    frame(address, &[0x88, 0xb5])
}

fn tagged(address: [u8; 6], tag: u16) -> Vec<u8> {
    let [high, low] = tag.to_be_bytes();
    frame(address, &[0x81, 0x00, high, low, 0x88, 0xb5])
}

const BROADCAST: [u8; 6] = [0xff; 6];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const OTHER_GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];
