//! What digests cost: the hash alone, beside a comparison of the same bytes, and a pair's proxies with and without.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use vhost_net_backend::digest::{Key, Range};
use vhost_net_backend::proxy::{Action, Actions, Buffer, Config, Primary, Secondary};
use vhost_net_backend::wire::MIRROR;

const NUMBER: u64 = 0x0123_4567_89ab_cdef;
/// Data of a segment in an Ethernet frame, with timestamps.
const SEGMENT_BYTES: usize = 1448;
/// Frames that a worker takes from its guest at once.
const BATCH: u32 = 64;

fn hash(c: &mut Criterion) {
    let key = Key::new(NUMBER).expect("a key");
    let mut group = c.benchmark_group("digest");
    for bytes in [256, SEGMENT_BYTES, 8948, 65_000] {
        let data: Vec<u8> = (0..bytes).map(|at| at as u8).collect();
        let same = data.clone();
        group.throughput(Throughput::Bytes(bytes as u64));
        for phase in [0, 1] {
            let name = if phase == 0 { "aligned" } else { "unaligned" };
            group.bench_with_input(BenchmarkId::new(name, bytes), &data, |bencher, data| {
                bencher.iter(|| key.digest(phase, black_box(data)));
            });
        }
        group.bench_with_input(BenchmarkId::new("in three parts", bytes), &data, |bencher, data| {
            let (first, rest) = data.split_at(bytes / 5);
            let (second, third) = rest.split_at(bytes / 2);
            bencher.iter(|| {
                let mut range = Range::at(0);
                for part in [first, second, third] {
                    range.extend(&key, black_box(part));
                }
                range.digest(&key)
            });
        });
        group.bench_with_input(BenchmarkId::new("memcmp", bytes), &data, |bencher, data| {
            bencher.iter(|| black_box(data) == black_box(&same));
        });
    }
    group.finish();
}

fn segment(seq: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    let data = [seq as u8; SEGMENT_BYTES];
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 1])
        .ipv4([10, 0, 0, 9], [10, 0, 0, 1], 64)
        .tcp(80, 40_000, seq, 512)
        .ack(1)
        .write(&mut frame, &data)
        .expect("a Vec takes all");
    frame
}

fn acknowledgment(ack: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 9], 64)
        .tcp(40_000, 80, 1, 512)
        .ack(ack)
        .write(&mut frame, &[])
        .expect("a Vec takes all");
    frame
}

/// Both halves without a link: a batch of segments of the PVM, the same of the SVM, all released, acknowledged.
struct Pair {
    primary: Primary,
    secondary: Secondary,
    /// What each half wants done.
    wishes: [Actions; 2],
    seq: u32,
}

impl Pair {
    fn new(digests: bool) -> Self {
        let mut pair = Self {
            primary: Primary::new(&Config::default(), 1, 0),
            secondary: Secondary::new(&Config::default(), 1, 0),
            wishes: [Actions::new(), Actions::new()],
            seq: 0,
        };
        if digests {
            pair.primary.want_digests(Key::new(NUMBER).expect("a key"), &mut pair.wishes[0]);
            pair.secondary_hears();
        }
        pair
    }

    fn secondary_hears(&mut self) {
        let [ours, theirs] = &mut self.wishes;
        for wish in ours.iter() {
            if let Action::ToPeer { kind, epoch, payload } = wish {
                self.secondary.peer_frame(kind, epoch, payload, 0, theirs).expect("well formed");
            }
        }
        ours.clear();
    }

    /// Returns the frames that left.
    fn primary_hears(&mut self) -> usize {
        let [ours, theirs] = &mut self.wishes;
        for wish in theirs.iter() {
            if let Action::ToPeer { kind, epoch, payload } = wish {
                self.primary.peer_frame(kind, epoch, payload, 0, ours).expect("well formed");
            }
        }
        theirs.clear();
        ours.iter().filter(|wish| matches!(wish, Action::ToLan(_))).count()
    }

    fn batch(&mut self, frames: &mut [Vec<u8>]) -> usize {
        for frame in frames {
            // nobody looks at the checksum
            frame[38..42].copy_from_slice(&self.seq.to_be_bytes());
            self.seq = self.seq.wrapping_add(SEGMENT_BYTES as u32);
            let copy = |actions: &mut Actions| -> Buffer { actions.pool().copy_of(frame) };
            let [ours, theirs] = &mut self.wishes;
            self.primary.guest_output(copy(ours), 0, ours);
            self.secondary.guest_output(copy(theirs), 0, theirs);
        }
        self.secondary.flush(&mut self.wishes[1]);
        let left = self.primary_hears();
        self.wishes[0].clear();
        let acknowledged = acknowledgment(self.seq);
        self.secondary.peer_frame(MIRROR, 1, &acknowledged, 0, &mut self.wishes[1]).expect("well formed");
        self.wishes[1].clear();
        left
    }
}

fn pair(c: &mut Criterion) {
    let mut group = c.benchmark_group("both halves");
    group.throughput(Throughput::Elements(BATCH.into()));
    for (name, digests) in [("whole", false), ("digests", true)] {
        let mut frames: Vec<_> = (0..BATCH).map(segment).collect();
        let mut pair = Pair::new(digests);
        group.bench_function(name, |bencher| {
            bencher.iter(|| assert_eq!(pair.batch(&mut frames), BATCH as usize));
        });
    }
    group.finish();
}

criterion_group!(benches, hash, pair);
criterion_main!(benches);
