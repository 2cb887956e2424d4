//! The server over a socket pair: the `vhost` crate's frontend, and QEMU's messages in QEMU's order.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::memory::{DirtyLog, PageSet};

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const VERSION_1: u64 = 1 << 32;
const LOG_ALL: u64 = 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;

fn serve(device: &Arc<Shelf>, logs: &DirtyLogs) -> (UnixStream, JoinHandle<Result<(), SessionError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (device, logs) = (device.clone(), logs.clone());
    (ours, std::thread::spawn(move || serve_connection(&*device, &logs, theirs)))
}

fn memory_info(ram: &OwnedFd) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: RAM_BYTES,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: ram.as_raw_fd(),
    }
}

fn config_data(log: bool) -> VringConfigData {
    VringConfigData {
        queue_max_size: 8,
        queue_size: 8,
        flags: u32::from(log),
        desc_table_addr: USER + DESCRIPTORS,
        used_ring_addr: USER + USED,
        avail_ring_addr: USER + AVAILABLE,
        log_addr: Some(USED),
    }
}

#[test]
fn the_crates_frontend_drives_a_device() {
    let device = Arc::new(Shelf { config: Mutex::new(vec![1, 2, 3, 4]), ..Shelf::default() });
    let logs = DirtyLogs::new();
    let (stream, server) = serve(&device, &logs);
    let mut frontend = Frontend::from_stream(stream, 2);
    let offered = frontend.get_features().unwrap();
    assert_eq!(offered, 1 << 5 | VERSION_1 | EVENT_IDX | INDIRECT | LOG_ALL | PROTOCOL_FEATURES);
    frontend.set_owner().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ));
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(frontend.get_queue_num().unwrap(), 2);
    frontend.set_features(offered & !LOG_ALL).unwrap();
    assert_eq!(device.features.load(Ordering::SeqCst), 1 << 5 | VERSION_1 | EVENT_IDX | INDIRECT);

    let flags = VhostUserConfigFlags::WRITABLE;
    assert_eq!(frontend.get_config(1, 6, flags, &[0; 6]).unwrap().1, [2, 3, 4, 0, 0, 0]);
    frontend.set_config(2, flags, &[9]).unwrap();
    assert_eq!(frontend.get_config(0, 4, flags, &[0; 4]).unwrap().1, [1, 2, 9, 4]);
    assert!(frontend.set_config(4, flags, &[9]).is_err(), "refused, and the connection goes on");

    let ram = memfd(RAM_BYTES);
    let mut driver = Driver::new(&ram, 8);
    frontend.set_mem_table(&[memory_info(&ram)]).unwrap();
    let (kick, call) = (EventFd::new(libc::EFD_NONBLOCK).unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
    frontend.set_vring_num(1, 8).unwrap();
    frontend.set_vring_base(1, 0).unwrap();
    frontend.set_vring_addr(1, &config_data(false)).unwrap();
    frontend.set_vring_call(1, &call).unwrap();
    frontend.set_vring_kick(1, &kick).unwrap();
    assert!(!device.runs(1), "started, but not enabled");
    frontend.set_vring_enable(1, true).unwrap();
    assert!(device.runs(1) && !device.runs(0));

    driver.descriptor(0, 0x8000, 16, 0, 0);
    driver.offer(0);
    driver.offer(0);
    kick.write(1).unwrap();
    device.with_ring(1, |ring| {
        ring.drain_kick();
        let mut chain = Chain::new();
        assert!(ring.pop(&mut chain));
        ring.add_used(chain.head(), 0);
        ring.signal_used();
    });
    assert_eq!(call.read().unwrap(), 1);
    assert_eq!(kick.read().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    // a new memory table under the running ring
    frontend.set_mem_table(&[memory_info(&ram)]).unwrap();
    assert_eq!(device.with_ring(1, |ring| ring.next_avail()), 1);
    frontend.set_vring_enable(1, false).unwrap();
    assert!(!device.runs(1));
    frontend.set_vring_enable(1, true).unwrap();
    assert_eq!(frontend.get_vring_base(1).unwrap(), 1);
    assert!(!device.runs(1));
    assert_eq!(frontend.get_vring_base(0).unwrap(), 0, "one that never ran");
    drop(frontend);
    server.join().unwrap().unwrap();
}

/// Speaks to the server as QEMU's hw/virtio/vhost-user.c does.
struct Qemu(UnixStream);

impl Qemu {
    fn send(&self, request: FrontendReq, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        for word in [u32::from(request), flags | 1, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    fn number(&self, request: FrontendReq, value: u64) {
        self.send(request, 0, &value.to_ne_bytes(), &[]);
    }

    fn state(&self, request: FrontendReq, index: u32, num: u32) {
        self.send(request, 0, VhostUserVringState::new(index, num).as_slice(), &[]);
    }

    fn fd(&self, request: FrontendReq, index: u64, fd: &OwnedFd) {
        self.send(request, 0, &index.to_ne_bytes(), &[fd.as_fd()]);
    }

    fn receive(&mut self, request: FrontendReq) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request.into(), 5));
        let mut payload = vec![0; word(8) as usize];
        self.0.read_exact(&mut payload).unwrap();
        payload
    }

    fn receive_with_fd(&mut self, request: FrontendReq) -> (Vec<u8>, OwnedFd) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut message = [0; 12 + size_of::<VhostUserInflight>()];
        let into = &mut [IoSliceMut::new(&mut message)];
        let received = recvmsg(&self.0, into, &mut ancillary, RecvFlags::WAITALL).unwrap();
        assert_eq!(received.bytes, message.len());
        assert_eq!(message[..4], u32::from(request).to_ne_bytes());
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        (message[12..].to_vec(), fd.expect("a descriptor"))
    }

    fn ask(&mut self, request: FrontendReq) -> u64 {
        self.send(request, 0, &[], &[]);
        u64::from_ne_bytes(self.receive(request).try_into().unwrap())
    }

    fn vring_base(&mut self, index: u32) -> u32 {
        self.state(FrontendReq::GET_VRING_BASE, index, 0);
        let payload = self.receive(FrontendReq::GET_VRING_BASE);
        u32::from_ne_bytes(payload[4..8].try_into().unwrap())
    }

    fn addresses(&self, index: u32, log: bool) {
        let message = VhostUserVringAddr::from_config_data(index, &config_data(log));
        self.send(FrontendReq::SET_VRING_ADDR, 0, message.as_slice(), &[]);
    }

    fn memory_table(&self, ram: &OwnedFd) {
        let mut payload = VhostUserMemory::new(1).as_slice().to_vec();
        payload.extend_from_slice(VhostUserMemoryRegion::new(0, RAM_BYTES, USER, 0).as_slice());
        self.send(FrontendReq::SET_MEM_TABLE, 8, &payload, &[ram.as_fd()]);
    }
}

/// What net/vhost-user.c of QEMU 7.2 says when the socket connects.
fn greet(qemu: &mut Qemu, masked: &OwnedFd) -> u64 {
    let offered = qemu.ask(FrontendReq::GET_FEATURES);
    let protocol = qemu.ask(FrontendReq::GET_PROTOCOL_FEATURES) & 0xb;
    qemu.number(FrontendReq::SET_PROTOCOL_FEATURES, protocol);
    assert_eq!(qemu.ask(FrontendReq::GET_QUEUE_NUM), 2);
    qemu.send(FrontendReq::SET_OWNER, 0, &[], &[]);
    qemu.ask(FrontendReq::GET_FEATURES);
    for index in 0..2 {
        qemu.fd(FrontendReq::SET_VRING_CALL, index, masked);
        qemu.fd(FrontendReq::SET_VRING_ERR, index, masked);
    }
    // long before SET_FEATURES
    qemu.state(FrontendReq::SET_VRING_ENABLE, 0, 1);
    qemu.state(FrontendReq::SET_VRING_ENABLE, 1, 1);
    offered
}

fn start(qemu: &mut Qemu, features: u64, ram: &OwnedFd, base: u32, kick: &OwnedFd, call: &OwnedFd) {
    qemu.number(FrontendReq::SET_FEATURES, features);
    qemu.memory_table(ram);
    assert_eq!(qemu.receive(FrontendReq::SET_MEM_TABLE), [0; 8]);
    qemu.state(FrontendReq::SET_VRING_NUM, 0, 8);
    qemu.state(FrontendReq::SET_VRING_BASE, 0, base);
    qemu.addresses(0, false);
    qemu.fd(FrontendReq::SET_VRING_KICK, 0, kick);
    qemu.fd(FrontendReq::SET_VRING_CALL, 0, call);
}

#[test]
fn qemus_order_with_stop_cont_and_migration() {
    let device = Arc::new(Shelf::default());
    let logs = DirtyLogs::new();
    let (stream, server) = serve(&device, &logs);
    let mut qemu = Qemu(stream);
    let (masked, kick, call) = (event(), event(), event());
    let offered = greet(&mut qemu, &masked);
    assert_eq!(qemu.ask(FrontendReq::GET_PROTOCOL_FEATURES) & 1 << 9, 0, "no CONFIG without a configuration");
    let ram = memfd(RAM_BYTES);
    let mut driver = Driver::new(&ram, 8);
    driver.descriptor(0, 0x8000, 16, 2, 0);
    let features = offered & !LOG_ALL;
    start(&mut qemu, features, &ram, 0, &kick, &call);
    let work = |device: &Shelf| {
        device.with_ring(0, |ring| {
            let mut chain = Chain::new();
            assert!(ring.pop(&mut chain));
            assert_eq!(chain.fill(&[&[1]]), 1);
            ring.add_used(chain.head(), 1);
            ring.signal_used();
        });
    };
    let offer = |driver: &mut Driver| {
        driver.set_used_event(driver.available);
        driver.offer(0);
    };
    offer(&mut driver);
    work(&device);

    // stop and cont
    assert_eq!(qemu.vring_base(0), 1);
    assert!(!device.runs(0));
    start(&mut qemu, features, &ram, 1, &kick, &call);
    offer(&mut driver);
    work(&device);
    assert_eq!(driver.read(USED + 2), 2);
    assert!(signals(&call) >= 2);

    // migration begins: logging is switched on under the running ring
    let log = DirtyLog::create(64).unwrap();
    let drained = || {
        let mut set = PageSet::new(64);
        log.drain(&mut set);
        set.iter().collect::<Vec<_>>()
    };
    qemu.send(FrontendReq::SET_LOG_BASE, 0, VhostUserLog::new(8, 0).as_slice(), &[log.as_fd()]);
    assert_eq!(qemu.receive(FrontendReq::SET_LOG_BASE).len(), 16);
    qemu.number(FrontendReq::SET_FEATURES, features | LOG_ALL);
    qemu.addresses(0, true);
    qemu.ask(FrontendReq::GET_FEATURES);
    assert_eq!(device.features.load(Ordering::SeqCst) & LOG_ALL, 0);
    assert!(drained().is_empty());
    offer(&mut driver);
    work(&device);
    assert_eq!(drained(), [USED / 4096, 8]);
    // memory that is mapped after SET_LOG_BASE is logged as well
    let other = memfd(RAM_BYTES);
    rustix::io::write(&masked, &1u64.to_ne_bytes()).unwrap();
    qemu.memory_table(&other);
    assert_eq!(qemu.receive(FrontendReq::SET_MEM_TABLE), [0; 8]);
    device.with_ring(0, |ring| ring.memory().write_obj(1u8, GuestAddress(0x5000)).unwrap());
    assert_eq!(drained(), [5]);
    qemu.memory_table(&ram);
    assert_eq!(qemu.receive(FrontendReq::SET_MEM_TABLE), [0; 8]);
    // migration is cancelled: only the used ring is logged for a moment, then nothing
    qemu.number(FrontendReq::SET_FEATURES, features);
    qemu.ask(FrontendReq::GET_FEATURES);
    offer(&mut driver);
    work(&device);
    assert!(drained().contains(&(USED / 4096)));
    qemu.addresses(0, false);
    qemu.ask(FrontendReq::GET_FEATURES);
    offer(&mut driver);
    work(&device);
    assert!(drained().is_empty());
    assert_eq!(device.feature_choices.load(Ordering::SeqCst), 1, "the driver has not chosen again");

    // the frontend dies without a word
    drop(qemu);
    server.join().unwrap().unwrap();
    assert!(!device.runs(0));
    // and the next one starts from nothing
    let (stream, server) = serve(&device, &logs);
    let mut qemu = Qemu(stream);
    greet(&mut qemu, &masked);
    assert_eq!(qemu.vring_base(0), 0);
    start(&mut qemu, features, &ram, 5, &kick, &call);
    assert_eq!(qemu.vring_base(0), 5);
    drop(qemu);
    server.join().unwrap().unwrap();
}

#[test]
fn a_back_end_that_was_killed_is_followed_by_one_that_does_the_rest() {
    let ram = memfd(RAM_BYTES);
    let mut driver = Driver::new(&ram, 8);
    let (masked, kick, call) = (event(), event(), event());
    for index in 0..8 {
        driver.descriptor(index, 0x8000 + u64::from(index) * 16, 16, 2, 0);
    }
    let asked = VhostUserInflight::new(0, 0, 2, 8);
    let mut kept: Option<(VhostUserInflight, OwnedFd)> = None;
    let mut unanswered: Vec<u16> = Vec::new();
    for round in 0..20u16 {
        let device = Arc::new(Shelf::default());
        let (stream, server) = serve(&device, &DirtyLogs::new());
        let mut qemu = Qemu(stream);
        let offered = greet(&mut qemu, &masked);
        if kept.is_none() {
            qemu.send(FrontendReq::GET_INFLIGHT_FD, 0, asked.as_slice(), &[]);
            let (payload, fd) = qemu.receive_with_fd(FrontendReq::GET_INFLIGHT_FD);
            let mut answer = VhostUserInflight::default();
            answer.as_mut_slice().copy_from_slice(&payload);
            kept = Some((answer, fd));
        }
        let (answer, fd) = kept.as_ref().unwrap();
        qemu.send(FrontendReq::SET_INFLIGHT_FD, 0, answer.as_slice(), &[fd.as_fd()]);
        // QEMU knows no better than the used index
        let used = driver.read(USED + 2);
        signals(&call);
        start(&mut qemu, offered & !LOG_ALL, &ram, used.into(), &kick, &call);
        qemu.ask(FrontendReq::GET_FEATURES);
        if !unanswered.is_empty() {
            assert_ne!(signals(&call), 0, "the driver looks again, whatever it was told before");
        }
        let rest = std::mem::take(&mut unanswered);
        let mut new: Vec<u16> = (0..8).filter(|head| !rest.contains(head)).collect();
        let turn = (usize::from(round) % 3).min(new.len());
        new.rotate_left(turn);
        new.iter().for_each(|head| driver.offer(*head));
        device.with_ring(0, |ring| {
            assert_eq!(ring.has_again(), !rest.is_empty());
            let mut heads = Vec::new();
            let mut chain = Chain::new();
            while ring.pop(&mut chain) {
                heads.push(chain.head());
                if heads.len() == 3 {
                    // one that has to wait, and then does not
                    ring.undo_pop(&chain);
                    assert!(ring.pop(&mut chain));
                    assert_eq!(Some(&chain.head()), heads.last());
                }
            }
            assert_eq!(heads, [rest, new].concat(), "round {round}");
            // some are answered, in another order, and one more is noted but not published
            let (answered, skip) = (usize::from(round) % 8, usize::from(round) % 5);
            let answers: Vec<u16> = heads.iter().cycle().skip(skip).take(answered + 1).copied().collect();
            for head in &answers[..answered] {
                ring.add_used(*head, 0);
                ring.publish_used();
            }
            ring.add_used(answers[answered], 0);
            // what is left, in the order in which it was taken
            heads.retain(|head| !answers[..answered].contains(head));
            unanswered = heads;
        });
        // killed: nothing is given back in good order
        let ring = device.rings.lock().unwrap()[0].take();
        std::mem::forget(ring);
        drop(qemu);
        server.join().unwrap().unwrap();
    }
}

#[test]
fn regions_come_and_go_one_by_one() {
    let device = Arc::new(Shelf::default());
    let (stream, server) = serve(&device, &DirtyLogs::new());
    let mut qemu = Qemu(stream);
    let (masked, kick) = (event(), event());
    let offered = greet(&mut qemu, &masked);
    assert_ne!(qemu.ask(FrontendReq::GET_PROTOCOL_FEATURES) & 1 << 15, 0);
    assert!(qemu.ask(FrontendReq::GET_MAX_MEM_SLOTS) >= 32);
    let ram = memfd(2 * RAM_BYTES);
    let region = |at: u64| VhostUserSingleMemoryRegion::new(at, RAM_BYTES, USER + at, at);
    let add = |qemu: &mut Qemu, at| {
        qemu.send(FrontendReq::ADD_MEM_REG, 8, region(at).as_slice(), &[ram.as_fd()]);
        assert_eq!(qemu.receive(FrontendReq::ADD_MEM_REG), [0; 8]);
    };
    let remove = |qemu: &mut Qemu, at| {
        qemu.send(FrontendReq::REM_MEM_REG, 8, region(at).as_slice(), &[]);
        qemu.receive(FrontendReq::REM_MEM_REG)
    };
    add(&mut qemu, 0);
    qemu.number(FrontendReq::SET_FEATURES, offered & !LOG_ALL);
    qemu.state(FrontendReq::SET_VRING_NUM, 0, 8);
    qemu.addresses(0, false);
    qemu.fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    add(&mut qemu, RAM_BYTES);
    let regions = |device: &Shelf| {
        device.with_ring(0, |ring| vm_memory::GuestMemoryBackend::num_regions(&**ring.memory()))
    };
    assert_eq!(regions(&device), 2);
    assert_eq!(remove(&mut qemu, RAM_BYTES), [0; 8]);
    assert_eq!(regions(&device), 1);
    // the ring's own region: it waits until that is back
    assert_eq!(remove(&mut qemu, 0), [0; 8]);
    assert!(!device.runs(0));
    add(&mut qemu, RAM_BYTES);
    assert!(!device.runs(0));
    // which is no end of anything
    assert_eq!(device.quiet.load(Ordering::SeqCst), 0);
    add(&mut qemu, 0);
    assert_eq!(regions(&device), 2);
    // QEMU says both once for each pair of queues
    add(&mut qemu, 0);
    assert_eq!(regions(&device), 2);
    assert_eq!(remove(&mut qemu, RAM_BYTES), [0; 8]);
    assert_eq!(remove(&mut qemu, RAM_BYTES), [0; 8]);
    assert_eq!(regions(&device), 1);
    // but what overlaps is refused
    let overlap = VhostUserSingleMemoryRegion::new(4096, RAM_BYTES, USER + 4096, 4096);
    qemu.send(FrontendReq::ADD_MEM_REG, 8, overlap.as_slice(), &[ram.as_fd()]);
    assert_eq!(qemu.receive(FrontendReq::ADD_MEM_REG), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(server.join().unwrap().is_err());
    assert_eq!(device.quiet.load(Ordering::SeqCst), 1);
}

#[test]
fn the_device_hears_of_every_choice_of_features() {
    let device = Arc::new(Shelf::default());
    let (stream, _server) = serve(&device, &DirtyLogs::new());
    let mut qemu = Qemu(stream);
    let heard = |qemu: &mut Qemu| {
        // what was sent before has been carried out when this is answered
        qemu.ask(FrontendReq::GET_FEATURES);
        device.feature_choices.load(Ordering::SeqCst)
    };
    // a driver that takes none, and the same again
    for _ in 0..2 {
        qemu.number(FrontendReq::SET_FEATURES, 0);
        assert_eq!(heard(&mut qemu), 1);
    }
    // which after a reset is news
    qemu.send(FrontendReq::RESET_DEVICE, 0, &[], &[]);
    qemu.number(FrontendReq::SET_FEATURES, 0);
    assert_eq!(heard(&mut qemu), 2);
}

#[test]
fn a_guest_that_has_arrived_is_announced() {
    let device = Arc::new(Shelf::default());
    let (stream, _server) = serve(&device, &DirtyLogs::new());
    let mut qemu = Qemu(stream);
    assert_ne!(qemu.ask(FrontendReq::GET_PROTOCOL_FEATURES) & 1 << 2, 0);
    // as QEMU puts it: the six bytes, then two of nothing
    qemu.number(FrontendReq::SEND_RARP, u64::from_le_bytes([0x52, 0x54, 0, 1, 2, 3, 0, 0]));
    qemu.ask(FrontendReq::GET_FEATURES);
    assert_eq!(*device.announced.lock().unwrap(), [[0x52, 0x54, 0, 1, 2, 3]]);
}

#[test]
fn a_change_of_the_configuration_is_told_on_the_frontends_channel() {
    let device = Arc::new(Shelf { channel: Some(FrontendChannel::new()), ..Shelf::default() });
    let channel = device.channel.as_ref().unwrap();
    assert!(!channel.config_changed(), "there is nobody to tell");
    let (stream, server) = serve(&device, &DirtyLogs::new());
    let mut qemu = Qemu(stream);
    assert_ne!(qemu.ask(FrontendReq::GET_PROTOCOL_FEATURES) & 1 << 5, 0);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qemu.send(FrontendReq::SET_BACKEND_REQ_FD, 0, &[], &[theirs.as_fd()]);
    drop(theirs);
    qemu.ask(FrontendReq::GET_FEATURES);
    assert!(channel.config_changed());
    let mut header = [0; 12];
    ours.read_exact(&mut header).unwrap();
    assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    drop(qemu);
    server.join().unwrap().unwrap();
    assert!(!channel.config_changed());
    assert_eq!(ours.read(&mut header).unwrap(), 0);
}

#[test]
fn without_protocol_features_a_ring_needs_no_enable() {
    let device = Arc::new(Shelf::default());
    let (stream, server) = serve(&device, &DirtyLogs::new());
    let frontend = Frontend::from_stream(stream, 2);
    frontend.set_features(VERSION_1).unwrap();
    let ram = memfd(RAM_BYTES);
    frontend.set_mem_table(&[memory_info(&ram)]).unwrap();
    frontend.set_vring_num(0, 8).unwrap();
    frontend.set_vring_addr(0, &config_data(false)).unwrap();
    frontend.set_vring_kick(0, &EventFd::new(0).unwrap()).unwrap();
    device.with_ring(0, |ring| assert_eq!(ring.size(), 8));
    let log = DirtyLog::create(64).unwrap();
    let region =
        VhostUserDirtyLogRegion { mmap_size: 8, mmap_offset: 0, mmap_handle: log.as_fd().as_raw_fd() };
    frontend.set_log_base(0, Some(region)).unwrap();
    drop(frontend);
    // that was the old SET_LOG_BASE without a descriptor, which nobody can serve
    assert!(server.join().unwrap().unwrap_err().to_string().contains("SET_LOG_BASE"));
    assert!(!device.runs(0));
}

#[test]
fn descriptors_that_are_left_out_mean_polling_and_silence() {
    let device = Arc::new(Shelf::default());
    let (stream, server) = serve(&device, &DirtyLogs::new());
    let mut qemu = Qemu(stream);
    let event = event();
    let offered = greet(&mut qemu, &event);
    let ram = memfd(RAM_BYTES);
    start(&mut qemu, offered, &ram, 0, &event, &event);
    qemu.number(FrontendReq::SET_VRING_KICK, 0x100);
    qemu.number(FrontendReq::SET_VRING_CALL, 0x100);
    qemu.number(FrontendReq::SET_VRING_ERR, 0x100);
    qemu.ask(FrontendReq::GET_FEATURES);
    signals(&event);
    device.with_ring(0, |ring| {
        ring.drain_kick();
        ring.add_used(0, 0);
        ring.signal_used();
    });
    assert_eq!(signals(&event), 0);
    qemu.send(FrontendReq::RESET_DEVICE, 8, &[], &[]);
    assert_eq!(qemu.receive(FrontendReq::RESET_DEVICE), [0; 8]);
    assert!(!device.runs(0));
    drop(qemu);
    server.join().unwrap().unwrap();
}

#[test]
fn what_is_asked_wrongly_is_named_and_ends_the_connection() {
    type Case = (&'static str, fn(&Qemu));
    let cases: [Case; 8] = [
        ("bits 0x8000000000000000", |q| q.number(FrontendReq::SET_FEATURES, 1 << 63)),
        ("queue 7 of 2", |q| q.state(FrontendReq::SET_VRING_NUM, 7, 8)),
        ("3 entries", |q| q.state(FrontendReq::SET_VRING_NUM, 0, 3)),
        ("neither 0 nor 1", |q| q.state(FrontendReq::SET_VRING_ENABLE, 0, 2)),
        ("must have 1", |q| q.number(FrontendReq::SET_VRING_KICK, 0)),
        ("message 26", |q| q.number(FrontendReq::CREATE_CRYPTO_SESSION, 0)),
        ("set_owner came with 1", |q| q.fd(FrontendReq::SET_OWNER, 0, &event())),
        ("set_vring_base with 8 bytes", |q| {
            q.send(FrontendReq::SET_VRING_BASE, 0, &[0; 7], &[]);
        }),
    ];
    for (expected, act) in cases {
        let (stream, server) = serve(&Arc::default(), &DirtyLogs::new());
        let qemu = Qemu(stream);
        act(&qemu);
        let error = server.join().unwrap().unwrap_err().to_string().to_lowercase();
        assert!(error.contains(expected.strip_suffix(" with 8 bytes").unwrap_or(expected)), "{error}");
    }
}
