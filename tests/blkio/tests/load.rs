//! Many requests at a time, on several queues, and memory that changes meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use colo_blkio::{Client, Queue, Region, Server, pattern};

const BLOCK: usize = 4096;
/// Requests of one queue under way.
const DEPTH: usize = 32;
/// Blocks of one queue's part of the disk.
const BLOCKS: usize = 1024;
const PART_BYTES: usize = BLOCKS * BLOCK;

/// Block `block` in a queue's part of the disk, as round `round` writes it.
fn content(queue: usize, round: usize, block: usize) -> Vec<u8> {
    pattern(((queue * 100 + round) * BLOCKS + block) as u64, BLOCK)
}

/// Blocks in an order that is no order.
fn shuffled() -> impl Iterator<Item = usize> {
    (0..BLOCKS).map(|at| at * 389 % BLOCKS)
}

/// Carries out one request for each block of the queue's part, `DEPTH` at a time. `prepare` makes a block's request in
/// the slot that is given, `check` sees the slot of one that has ended.
fn for_each_block(
    queue: &mut Queue,
    mut prepare: impl FnMut(&mut Queue, usize, usize),
    mut check: impl FnMut(usize, usize),
) {
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut blocks = shuffled();
    let mut in_slot = [0; DEPTH];
    loop {
        while let Some(slot) = free.pop() {
            let Some(block) = blocks.next() else {
                free.push(slot);
                break;
            };
            in_slot[slot] = block;
            prepare(queue, slot, block);
        }
        if free.len() == DEPTH {
            return;
        }
        for answer in queue.answers(1) {
            assert!(answer.errno == 0 && answer.refusal.is_none(), "{answer:?}");
            check(answer.request, in_slot[answer.request]);
            free.push(answer.request);
        }
    }
}

/// Writes a queue's part of the disk through that queue's part of the memory.
fn write_part(queue: &mut Queue, region: &Region, number: usize, part: usize, round: usize) {
    let at = |slot: usize| (number * DEPTH + slot) * BLOCK;
    let prepare = |queue: &mut Queue, slot: usize, block: usize| {
        region.set(at(slot), &content(part, round, block));
        queue.write(slot, (part * PART_BYTES + block * BLOCK) as u64, region, at(slot), BLOCK);
    };
    for_each_block(queue, prepare, |_, _| {});
}

fn read_part(queue: &mut Queue, region: &Region, number: usize, part: usize, round: usize) {
    let at = |slot: usize| (number * DEPTH + slot) * BLOCK;
    let prepare = |queue: &mut Queue, slot: usize, block: usize| {
        region.set(at(slot), &[0; BLOCK]);
        queue.read(slot, (part * PART_BYTES + block * BLOCK) as u64, region, at(slot), BLOCK);
    };
    for_each_block(queue, prepare, |slot, block| {
        assert!(region.get(at(slot), BLOCK) == content(part, round, block), "block {block} of part {part}");
    });
}

fn assert_parts(server: &Server, parts: usize, round: usize) {
    for part in 0..parts {
        let expected: Vec<u8> = (0..BLOCKS).flat_map(|block| content(part, round, block)).collect();
        assert!(
            server.content((part * PART_BYTES) as u64, PART_BYTES) == expected,
            "part {part} in the image"
        );
    }
}

#[test]
fn four_queues_at_once_write_and_read_what_they_should() {
    const QUEUES: usize = 4;
    // signalled and polled, in one client; more queues than workers and as many
    for (place, signalled, workers) in [("/dev/shm", 4, "2"), ("/var/tmp", 2, "2"), ("/dev/shm", 0, "4")] {
        let options = ["--queues", "4", "--workers", workers];
        let mut server = Server::start(place, (QUEUES * PART_BYTES) as u64, &options);
        let blkio = server.connect(false);
        let mut client = Client::start(blkio, signalled, QUEUES - signalled, QUEUES * DEPTH * BLOCK);
        let Client { queues, region, .. } = &mut client;
        let region = &*region;
        for round in 0..2 {
            thread::scope(|scope| {
                for (number, queue) in queues.iter_mut().enumerate() {
                    scope.spawn(move || write_part(queue, region, number, number, round));
                }
            });
            // each reads what another has written
            thread::scope(|scope| {
                for (number, queue) in queues.iter_mut().enumerate() {
                    scope.spawn(move || read_part(queue, region, number, (number + 1) % QUEUES, round));
                }
            });
            assert_parts(&server, QUEUES, round);
        }
        assert_eq!(server.figure("writes"), (2 * QUEUES * BLOCKS) as u64, "{place}");
        assert_eq!(server.figure("in_flight"), 0, "{place}");
    }
}

/// Becomes true when this goes.
struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn memory_comes_and_goes_while_requests_are_under_way() {
    const CHANGES: usize = 50;
    for place in ["/dev/shm", "/var/tmp"] {
        let mut server = Server::start(place, 2 * PART_BYTES as u64, &["--queues", "2"]);
        let mut client = Client::start(server.connect(false), 2, 0, DEPTH * BLOCK);
        let Client { queues, region, blkio } = &mut client;
        let [busy, other] = &mut queues[..] else { panic!("two queues") };
        let region = &*region;
        let (passes, enough) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            // also when an assertion fails: the scope waits for the worker
            let _over = Set(&enough);
            let worker = scope.spawn(|| {
                while !enough.load(Ordering::Acquire) {
                    let round = passes.load(Ordering::Acquire);
                    write_part(busy, region, 0, 0, round);
                    read_part(busy, region, 0, 0, round);
                    passes.store(round + 1, Ordering::Release);
                }
            });
            while passes.load(Ordering::Acquire) == 0 && !worker.is_finished() {
                thread::yield_now();
            }
            // all of them while the worker is in its requests, `DEPTH` at a time; it works until told that they are over
            for change in 0..CHANGES {
                let more = Region::add(blkio, (change % 3 + 1) * BLOCK);
                // it is good for requests at once
                more.set(0, &content(1, change, change));
                let offset = (PART_BYTES + change * BLOCK) as u64;
                other.write(1, offset, &more, 0, BLOCK);
                assert_eq!(other.ended(), 0, "{place}: {change}");
                assert!(server.content(offset, BLOCK) == content(1, change, change), "{place}: {change}");
                more.remove(blkio);
                assert!(!worker.is_finished(), "{place}: the worker has failed");
            }
        });
        let passes = passes.into_inner();
        assert!(passes > 0);
        assert_parts(&server, 1, passes - 1);
        assert_eq!(
            server.figure("writes"),
            (passes * BLOCKS + CHANGES) as u64,
            "{place}: each was done once"
        );
    }
}
