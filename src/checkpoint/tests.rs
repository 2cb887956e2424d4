//! Both halves together over a real connection, with VMs made of a few pages, cut at every message.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use proptest::prelude::*;

use super::*;
use crate::link::{read_frame, write_frame};
use crate::memory::PAGE_BYTES;
use crate::vm::{RamBlock, Vm};

const PAGES: u64 = 700;

/// A VM whose memory is one byte a page, spread over the page, and whose devices are a number.
struct SmallVm {
    blocks: Vec<RamBlock>,
    memory: BTreeMap<u64, u8>,
    dirty: PageSet,
    devices: u64,
    running: bool,
    /// Pages that loading the devices overwrites.
    scribbles: Vec<u64>,
}

impl SmallVm {
    fn new() -> Self {
        let block = |name: &str, first_page, pages| RamBlock {
            name: name.into(),
            bytes: pages * PAGE_BYTES as u64,
            first_page,
        };
        Self {
            blocks: vec![block("ram", 0, PAGES - 10), block("rom", PAGES - 10, 10)],
            memory: BTreeMap::new(),
            dirty: PageSet::new(PAGES),
            devices: 0,
            running: false,
            scribbles: Vec::new(),
        }
    }

    fn write(&mut self, page: u64, value: u8) {
        self.memory.insert(page, value);
        self.dirty.insert(page);
    }

    fn image(&self) -> (BTreeMap<u64, u8>, u64) {
        let memory = self.memory.iter().filter(|(_, value)| **value != 0);
        (memory.map(|(page, value)| (*page, *value)).collect(), self.devices)
    }
}

impl Vm for SmallVm {
    fn ram_blocks(&self) -> &[RamBlock] {
        &self.blocks
    }
    fn pause(&mut self) -> Result<(), VmError> {
        assert!(self.running, "paused twice");
        self.running = false;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), VmError> {
        assert!(!self.running, "resumed twice");
        self.running = true;
        Ok(())
    }
    fn start_tracking(&mut self, populated: &mut PageSet) -> Result<(), VmError> {
        self.memory.keys().for_each(|page| populated.insert(*page));
        self.dirty.clear();
        Ok(())
    }
    fn take_dirty(&mut self, dirty: &mut PageSet) -> Result<(), VmError> {
        assert!(!self.running);
        dirty.union(&self.dirty);
        self.dirty.clear();
        Ok(())
    }
    fn save_devices(&mut self, state: &mut Vec<u8>) -> Result<(), VmError> {
        assert!(!self.running);
        *state = self.devices.to_be_bytes().to_vec();
        Ok(())
    }
    fn load_devices(&mut self, state: &[u8]) -> Result<(), VmError> {
        assert!(!self.running);
        self.devices = u64::from_be_bytes(state.try_into().unwrap());
        for page in self.scribbles.clone() {
            self.write(page, 0xee);
        }
        Ok(())
    }
    fn read_pages(&self, pages: &[u64], into: &mut [u8]) -> Result<(), VmError> {
        for (page, bytes) in pages.iter().zip(into.chunks_exact_mut(PAGE_BYTES)) {
            bytes.fill(self.memory.get(page).copied().unwrap_or(0));
        }
        Ok(())
    }
    fn write_pages(&mut self, pages: &[u64], from: &[u8]) -> Result<(), VmError> {
        for (page, bytes) in pages.iter().zip(from.chunks_exact(PAGE_BYTES)) {
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a torn page");
            self.memory.insert(*page, bytes[0]);
        }
        Ok(())
    }
}

/// Back ends whose only trace is what they were told, and which pages they wrote.
#[derive(Default)]
struct SmallDevices {
    committed: Vec<u64>,
    dirty: Vec<u64>,
    /// The secondary's markers, as `colo run` would get them.
    markers: Option<Sender<u64>>,
}

impl Devices for SmallDevices {
    fn marker(&mut self, epoch: u64) -> Result<(), DeviceError> {
        if let Some(markers) = &self.markers {
            markers.send(epoch).unwrap();
        }
        Ok(())
    }
    fn commit(&mut self, epoch: u64) -> Result<(), DeviceError> {
        self.committed.push(epoch);
        Ok(())
    }
    fn take_dirty(&mut self, dirty: &mut PageSet) {
        self.dirty.drain(..).for_each(|page| dirty.insert(page));
    }
}

struct Half {
    vm: SmallVm,
    devices: SmallDevices,
}

/// Two VMs and the link between them, which breaks after so many frames in all.
struct Pair {
    primary: Primary,
    secondary: Secondary,
    replies: Receiver<Reply>,
    incoming: Receiver<Incoming>,
    markers: Receiver<u64>,
    a: Half,
    b: Half,
}

fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let left = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    left.set_nodelay(true).unwrap();
    (left, listener.accept().unwrap().0)
}

/// Passes frames on until the budget is used up, then breaks everything.
fn relay(mut from: TcpStream, mut to: TcpStream, budget: Arc<Mutex<usize>>) {
    thread::spawn(move || {
        let mut payload = Vec::new();
        while let Ok(header) = read_frame(&mut from, &mut payload) {
            let mut left = budget.lock().unwrap();
            if *left == 0 {
                break;
            }
            *left -= 1;
            if write_frame(&mut to, header.kind, header.epoch, &[&payload]).is_err() {
                break;
            }
        }
        *budget.lock().unwrap() = 0;
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}

impl Pair {
    fn new(frames: usize, verify: bool) -> Self {
        let (primary_end, relay_a) = connected();
        let (secondary_end, relay_b) = connected();
        let budget = Arc::new(Mutex::new(frames));
        relay(relay_a.try_clone().unwrap(), relay_b.try_clone().unwrap(), budget.clone());
        relay(relay_b, relay_a, budget);
        let (replies_tx, replies) = unbounded();
        let from_secondary = primary_end.try_clone().unwrap();
        thread::spawn(move || read_replies(from_secondary, |reply| drop(replies_tx.send(reply))));
        let secondary = Secondary::new(secondary_end.try_clone().unwrap(), PAGES).unwrap();
        let cache = secondary.cache();
        let (incoming_tx, incoming) = unbounded();
        thread::spawn(move || {
            read_checkpoints(secondary_end, &cache, |message| drop(incoming_tx.send(message)));
        });
        let (markers_tx, markers) = unbounded();
        let half = || Half { vm: SmallVm::new(), devices: SmallDevices::default() };
        let (mut a, b) = (half(), half());
        a.devices.markers = Some(markers_tx);
        Self {
            primary: Primary::new(primary_end, PAGES, verify).unwrap(),
            secondary,
            replies,
            incoming,
            markers,
            a,
            b,
        }
    }

    /// One checkpoint on two threads. Says how it went on both sides.
    fn checkpoint(&mut self) -> (Result<Record, CheckpointError>, Result<SecondarySteps, CheckpointError>) {
        let limit = Duration::from_secs(10);
        let Self { primary, secondary, replies, incoming, markers, a, b } = self;
        thread::scope(|scope| {
            let following = scope.spawn(move || {
                let peer = |what: &str| CheckpointError::Peer(what.into());
                let epoch = match incoming.recv_timeout(limit).unwrap() {
                    Incoming::Begin { epoch, .. } => epoch,
                    other => return Err(peer(&format!("{other:?}"))),
                };
                let mut complete = || match incoming.recv_timeout(limit).unwrap() {
                    Incoming::Complete { epoch: of, received } => {
                        assert_eq!((of, markers.recv_timeout(limit).unwrap()), (epoch, epoch));
                        Ok(received)
                    }
                    other => Err(peer(&format!("{other:?}"))),
                };
                let mut verified = || match incoming.recv_timeout(limit).unwrap() {
                    Incoming::Verified { .. } | Incoming::Lost(_) => Ok(()),
                    other => Err(peer(&format!("{other:?}"))),
                };
                secondary.checkpoint(epoch, &mut b.vm, &mut b.devices, &mut complete, &mut verified)
            });
            let taken = primary.checkpoint(&mut a.vm, &mut a.devices, "test", replies);
            if let Err(error @ CheckpointError::Verify { .. }) = &taken {
                primary.goodbye(&error.to_string()).unwrap();
            }
            (taken, following.join().unwrap())
        })
    }

    /// One checkpoint that has to succeed, with the secondary's report taken off the queue.
    fn checkpoint_whole(&mut self) -> Record {
        let (taken, applied) = self.checkpoint();
        let record = taken.unwrap();
        let steps = applied.unwrap();
        let reported = self.replies.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(reported, Reply::Resumed { epoch: record.epoch, steps });
        record
    }
}

impl Hearing for Receiver<Reply> {
    fn reply(&mut self) -> Result<Reply, CheckpointError> {
        match self.recv_timeout(Duration::from_secs(10)).unwrap() {
            Reply::Lost(why) => Err(CheckpointError::Peer(why)),
            reply => Ok(reply),
        }
    }

    fn wishes_are_met(&mut self) {}
}

/// What a VM did in an epoch: pages, and the device state at its end.
fn epoch_of_writes() -> impl Strategy<Value = (Vec<(u64, u8)>, u64)> {
    (prop::collection::vec((0..PAGES, 1u8..=255), 0..400), any::<u64>())
}

fn write(half: &mut Half, (pages, devices): &(Vec<(u64, u8)>, u64)) {
    for (index, (page, value)) in pages.iter().enumerate() {
        if index % 3 == 0 {
            // written by a back end: the VMM's tracker does not see it
            half.vm.memory.insert(*page, *value);
            half.devices.dirty.push(*page);
        } else {
            half.vm.write(*page, *value);
        }
    }
    half.vm.devices = *devices;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn after_each_checkpoint_both_are_equal(
        epochs in prop::collection::vec((epoch_of_writes(), epoch_of_writes()), 1..6),
        scribbles in prop::collection::vec(0..PAGES, 0..20),
        verify: bool,
    ) {
        let mut pair = Pair::new(usize::MAX, verify);
        pair.b.vm.scribbles = scribbles;
        for (number, (on_a, on_b)) in epochs.iter().enumerate() {
            write(&mut pair.a, on_a);
            write(&mut pair.b, on_b);
            let record = pair.checkpoint_whole();
            prop_assert_eq!(record.epoch, number as u64);
            prop_assert_eq!(pair.a.vm.image(), pair.b.vm.image());
            prop_assert!(pair.a.vm.running && pair.b.vm.running);
            prop_assert_eq!(pair.a.devices.committed.last(), Some(&record.epoch));
            prop_assert_eq!(pair.b.devices.committed.last(), Some(&record.epoch));
        }
    }

    #[test]
    fn a_link_that_breaks_anywhere_leaves_all_of_the_old_or_all_of_the_new(
        first in (epoch_of_writes(), epoch_of_writes()),
        second in (epoch_of_writes(), epoch_of_writes()),
        frames in 0usize..12,
    ) {
        // Frames of the first checkpoint: begin, pages, devices, end; committed, resumed.
        let pages = |on_a: &Vec<(u64, u8)>, on_b: &Vec<(u64, u8)>, both: bool| {
            let mut set: Vec<u64> = on_a.iter().chain(on_b.iter().filter(|_| both)).map(|(page, _)| *page).collect();
            set.sort_unstable();
            set.dedup();
            set.len().div_ceil(256)
        };
        let whole = 5 + pages(&first.0.0, &first.1.0, false);
        let mut pair = Pair::new(whole + frames, false);
        write(&mut pair.a, &first.0);
        write(&mut pair.b, &first.1);
        pair.checkpoint_whole();
        write(&mut pair.a, &second.0);
        write(&mut pair.b, &second.1);
        let (old, new) = (pair.b.vm.image(), pair.a.vm.image());
        let (taken, applied) = pair.checkpoint();
        match applied {
            Ok(_) => {
                prop_assert_eq!(pair.b.vm.image(), new);
                prop_assert!(pair.b.vm.running);
                prop_assert_eq!(&pair.b.devices.committed, &[0, 1]);
            }
            Err(_) => {
                prop_assert_eq!(pair.b.vm.image(), old);
                prop_assert_eq!(&pair.b.devices.committed, &[0]);
                // what the secondary does not have the primary must not release
                prop_assert!(taken.is_err());
            }
        }
        if taken.is_err() {
            prop_assert_eq!(&pair.a.devices.committed, &[0]);
        }
    }
}

#[test]
fn a_page_that_no_dirty_set_knows_is_found_by_verify() {
    let mut pair = Pair::new(usize::MAX, true);
    pair.checkpoint_whole();
    pair.a.vm.memory.insert(PAGES - 3, 9);
    let (taken, applied) = pair.checkpoint();
    assert!(applied.unwrap_err().to_string().contains("Goodbye"));
    let error = taken.unwrap_err().to_string();
    assert!(error.contains("1 pages differ") && error.contains("rom+0x7000"), "{error}");
    assert_eq!(pair.a.devices.committed, [0], "nothing is released on a copy that is wrong");
}

#[test]
fn nonsense_on_the_link_ends_it_and_changes_nothing() {
    let cases: [(u16, &[u8]); 6] = [
        (wire::PAGES, &[]),
        (wire::PAGES, &[0, 0, 0, 1]),
        (wire::PAGES, &[0xff; 4 + 8 + PAGE_BYTES]),
        (wire::END, b"{}"),
        (wire::END, br#"{"pages":5,"device_bytes":0,"digest":0,"verify":false}"#),
        (99, &[]),
    ];
    for (kind, payload) in cases {
        let (mut left, right) = connected();
        let secondary = Secondary::new(right.try_clone().unwrap(), PAGES).unwrap();
        write_frame(&mut left, wire::BEGIN, 1, &[b"test"]).unwrap();
        write_frame(&mut left, kind, 1, &[payload]).unwrap();
        left.shutdown(Shutdown::Write).unwrap();
        let mut said = Vec::new();
        read_checkpoints(right, &secondary.cache(), |message| said.push(message));
        assert!(matches!(&said[..], [Incoming::Begin { .. }, Incoming::Lost(_)]), "{kind}: {said:?}");
    }
    // a page beyond the last one
    let mut frame = vec![0, 0, 0, 1];
    frame.extend_from_slice(&PAGES.to_be_bytes());
    frame.resize(4 + 8 + PAGE_BYTES, 1);
    let (mut left, right) = connected();
    let secondary = Secondary::new(right.try_clone().unwrap(), PAGES).unwrap();
    write_frame(&mut left, wire::PAGES, 1, &[&frame]).unwrap();
    let mut said = Vec::new();
    read_checkpoints(right, &secondary.cache(), |message| said.push(message));
    assert!(matches!(&said[..], [Incoming::Lost(why)] if why.contains("page 700 of 700")), "{said:?}");
}
