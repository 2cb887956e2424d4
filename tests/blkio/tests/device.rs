//! What libblkio's client sees and does is what is in the image, on a disk and in memory.

use blkio::ReqFlags;
use colo_blkio::{Answer, Client, Queue, Server, pattern};

const DISK_BYTES: u64 = 16 << 20;
const KIB: usize = 1 << 10;
/// A file system on a disk, with O_DIRECT where it has that, and one in memory.
const PLACES: [&str; 2] = ["/var/tmp", "/dev/shm"];

fn client(server: &mut Server) -> Client {
    Client::start(server.connect(false), 1, 0, 1 << 20)
}

/// Writes, and reads back through the client.
fn round_trip(client: &mut Client, offset: u64, data: &[u8]) -> Vec<u8> {
    let Client { queues, region, .. } = client;
    region.set(0, data);
    queues[0].write(1, offset, region, 0, data.len());
    assert_eq!(queues[0].ended(), 0, "write at {offset}");
    region.set(0, &vec![0; data.len()]);
    queues[0].read(2, offset, region, 0, data.len());
    assert_eq!(queues[0].ended(), 0, "read at {offset}");
    region.get(0, data.len())
}

/// The client itself refuses the only request that was made.
fn refused(queue: &mut Queue) -> (i32, String) {
    let answers = queue.answers(1);
    let [Answer { errno, refusal: Some(refusal), .. }] = &answers[..] else { panic!("{answers:?}") };
    (*errno, refusal.clone())
}

#[test]
fn the_client_is_told_what_the_disk_is() {
    for (place, block_bytes, cache, queues) in
        [("/var/tmp", 512, "writeback", 1), ("/dev/shm", 4096, "writethrough", 64)]
    {
        let (block, count) = (block_bytes.to_string(), queues.to_string());
        let options = ["--block-size", &block, "--cache", cache, "--queues", &count];
        let mut server = Server::start(place, DISK_BYTES, &options);
        let blkio = server.connect(false);
        let number = |name: &str| blkio.get_str(name).unwrap().parse::<u64>().unwrap();
        assert_eq!(number("capacity"), DISK_BYTES);
        assert_eq!(number("max-queues"), queues);
        assert_eq!(number("request-alignment"), block_bytes);
        assert_eq!(number("optimal-io-alignment"), 4096);
        assert_eq!(blkio.get_bool("flush-needed").unwrap(), cache == "writeback");
        // the limits are the device's choice; that a request may use them whole is another test
        for limit in ["max-segments", "max-segment-len", "max-transfer", "max-discard-len"] {
            assert!(number(limit) > 0, "{limit}");
        }
        assert!(number("max-write-zeroes-len") > 0 && number("max-mem-regions") > 1);
        assert_eq!(number("discard-alignment"), 4096);
    }
}

#[test]
fn what_is_written_is_in_the_image_and_what_is_in_the_image_is_read() {
    for place in PLACES {
        let mut server = Server::start(place, DISK_BYTES, &[]);
        let mut client = client(&mut server);
        let sizes = [(0, 512), (512, 4096), (1 << 20, 128 * KIB), (DISK_BYTES - 65536, 65536)];
        for (at, (offset, bytes)) in sizes.into_iter().enumerate() {
            let data = pattern(at as u64, bytes);
            assert!(round_trip(&mut client, offset, &data) == data, "{place}: {bytes} bytes at {offset}");
            assert!(server.content(offset, bytes) == data, "{place}: {bytes} bytes at {offset} in the image");
        }
        let data = pattern(9, 64 * KIB);
        server.fill(4 << 20, &data);
        let Client { queues, region, .. } = &mut client;
        queues[0].read(1, 4 << 20, region, 0, data.len());
        assert_eq!(queues[0].ended(), 0);
        assert!(region.get(0, data.len()) == data, "{place}: from the image");
    }
}

#[test]
fn a_request_may_be_in_as_many_parts_as_the_device_allows() {
    for place in PLACES {
        let mut server = Server::start(place, DISK_BYTES, &[]);
        let blkio = server.connect(false);
        let parts_max = blkio.get_i32("max-segments").unwrap() as usize;
        let mut client = Client::start(blkio, 1, 0, 2 << 20);
        let Client { queues, region, .. } = &mut client;
        // of odd lengths and at odd addresses, whole blocks together
        let bytes = parts_max / 2 * 1024;
        let parts: Vec<_> =
            (0..parts_max / 2 * 2).map(|at| (at * 1500 + 7, if at % 2 == 0 { 1000 } else { 24 })).collect();
        let data = pattern(3, bytes);
        let mut rest = &data[..];
        for (at, len) in &parts {
            let (part, after) = rest.split_at(*len);
            region.set(*at, part);
            rest = after;
        }
        assert!(rest.is_empty());
        queues[0].writev(1, 8192, region, &parts);
        assert_eq!(queues[0].ended(), 0, "{place}");
        assert!(server.content(8192, bytes) == data, "{place}: in the image");
        region.set(0, &vec![0; 1 << 20]);
        queues[0].readv(2, 8192, region, &parts);
        assert_eq!(queues[0].ended(), 0, "{place}");
        let seen: Vec<u8> = parts.iter().flat_map(|(at, len)| region.get(*at, *len)).collect();
        assert!(seen == data, "{place}: read back");
        // nothing was written between the parts
        assert!(parts.iter().all(|(at, len)| region.get(at + len, 400).iter().all(|byte| *byte == 0)));
    }
}

#[test]
fn the_longest_request_goes_through() {
    let mut server = Server::start("/var/tmp", 64 << 20, &[]);
    let blkio = server.connect(false);
    let [parts, part] = ["max-segments", "max-segment-len"].map(|name| blkio.get_i32(name).unwrap() as usize);
    let mut client = Client::start(blkio, 1, 0, parts * part);
    let Client { queues, region, .. } = &mut client;
    let data = pattern(4, parts * part);
    region.set(0, &data);
    let parts: Vec<_> = (0..parts).map(|at| (at * part, part)).collect();
    queues[0].writev(1, 1 << 20, region, &parts);
    assert_eq!(queues[0].ended(), 0);
    assert!(server.content(1 << 20, data.len()) == data);
}

#[test]
fn flushes_reach_the_device() {
    for place in PLACES {
        let mut server = Server::start(place, DISK_BYTES, &[]);
        let mut client = client(&mut server);
        let Client { queues, region, .. } = &mut client;
        let before = server.figure("flushes");
        queues[0].flush(1);
        assert_eq!(queues[0].ended(), 0);
        assert_eq!(server.figure("flushes"), before + 1);
        // the client makes a write that has to be durable from a write and a flush
        region.set(0, &pattern(5, 4096));
        queues[0].write_with(2, 0, region, 0, 4096, ReqFlags::FUA);
        assert_eq!(queues[0].ended(), 0);
        assert_eq!(server.figure("flushes"), before + 2);
        assert_eq!(server.content(0, 4096), pattern(5, 4096));
    }
}

#[test]
fn a_discard_gives_blocks_back_and_zeros_keep_them_if_they_are_to() {
    const RANGE: usize = 1 << 20;
    for place in PLACES {
        let mut server = Server::start(place, DISK_BYTES, &[]);
        let data = pattern(6, 4 * RANGE);
        server.fill(0, &data);
        let full = server.allocated_bytes();
        assert!(full >= data.len() as u64, "{place}: {full} bytes");
        let mut client = client(&mut server);
        let Client { queues, region, .. } = &mut client;
        let clear = RANGE as u64;
        queues[0].write_zeroes(1, 0, clear, ReqFlags::NO_UNMAP);
        assert_eq!(queues[0].ended(), 0, "{place}");
        assert!(server.allocated_bytes() >= full, "{place}: zeros without unmap");
        queues[0].write_zeroes(2, clear, clear, ReqFlags::empty());
        assert_eq!(queues[0].ended(), 0, "{place}");
        assert!(server.allocated_bytes() <= full - clear, "{place}: zeros with unmap");
        queues[0].discard(3, 2 * clear, clear);
        assert_eq!(queues[0].ended(), 0, "{place}");
        assert!(server.allocated_bytes() <= full - 2 * clear, "{place}: discard");
        // a file of which blocks were given back has zeros there, and the rest is as it was
        let expected = [vec![0; 3 * RANGE], data[3 * RANGE..].to_vec()].concat();
        assert!(server.content(0, data.len()) == expected, "{place}");
        for at in (0..4 * RANGE).step_by(64 * KIB) {
            queues[0].read(4, at as u64, region, 0, 64 * KIB);
            assert_eq!(queues[0].ended(), 0, "{place}");
            assert!(region.get(0, 64 * KIB) == expected[at..at + 64 * KIB], "{place}: read at {at}");
        }
    }
}

#[test]
fn what_does_not_fit_the_blocks_or_the_disk_is_refused_and_changes_nothing() {
    for place in PLACES {
        let mut server = Server::start(place, DISK_BYTES, &["--block-size", "4096"]);
        let data = pattern(7, 64 * KIB);
        server.fill(0, &data);
        let end = server.content(DISK_BYTES - 8192, 8192);
        let mut client = client(&mut server);
        let Client { queues, region, .. } = &mut client;
        let queue = &mut queues[0];
        region.set(0, &pattern(8, 64 * KIB));
        let refusals = server.figure("refused");
        // what the client lets through: sectors that are no block, lengths that are no block, past the end
        let wrong = [(512, 4096), (4096, 512), (8192, 4000), (4096, 4097), (DISK_BYTES - 4096, 8192)];
        for (offset, bytes) in wrong.into_iter().chain([(DISK_BYTES, 4096), (1 << 62, 4096)]) {
            queue.write(1, offset, region, 0, bytes);
            assert_eq!(queue.ended(), libc::EIO, "{place}: write {bytes} at {offset}");
            queue.read(2, offset, region, 64 * KIB, bytes);
            assert_eq!(queue.ended(), libc::EIO, "{place}: read {bytes} at {offset}");
        }
        for (offset, bytes) in [(512, 4096), (4096, 512), (DISK_BYTES - 4096, 8192)] {
            queue.discard(3, offset, bytes);
            assert_eq!(queue.ended(), libc::EIO, "{place}: discard {bytes} at {offset}");
            queue.write_zeroes(4, offset, bytes, ReqFlags::empty());
            assert_eq!(queue.ended(), libc::EIO, "{place}: zeros {bytes} at {offset}");
        }
        assert_eq!(server.figure("refused"), refusals + 2 * 7 + 2 * 3);
        // what it does not even send
        queue.write(5, 100, region, 0, 4096);
        assert_eq!(refused(queue), (libc::EINVAL, "invalid start offset".into()));
        queue.discard(6, 4096, 100);
        assert_eq!(refused(queue), (libc::EINVAL, "invalid len or start offset".into()));
        assert_eq!(region.get(64 * KIB, 64 * KIB), vec![0; 64 * KIB], "{place}: nothing was read");
        assert!(server.content(0, data.len()) == data, "{place}: nothing was written");
        assert!(server.content(DISK_BYTES - 8192, 8192) == end, "{place}: nothing was written at the end");
        assert_eq!(server.figure("disk_bytes"), DISK_BYTES);
        let data = pattern(10, 8192);
        assert!(round_trip(&mut client, DISK_BYTES - 8192, &data) == data, "{place}: and it goes on");
    }
}

#[test]
fn a_disk_that_is_read_only_is_only_read() {
    let mut server = Server::start("/var/tmp", DISK_BYTES, &["--read-only"]);
    let data = pattern(11, 4096);
    server.fill(4096, &data);
    let mut blkio = server.connect(false);
    assert_eq!(blkio.start().err().map(|error| error.errno()), Some(blkio::Errno::ROFS));
    drop(blkio);
    let mut client = Client::start(server.connect(true), 1, 0, 64 * KIB);
    let Client { queues, region, .. } = &mut client;
    queues[0].read(1, 4096, region, 0, 4096);
    assert_eq!(queues[0].ended(), 0);
    assert_eq!(region.get(0, 4096), data);
    queues[0].write(2, 4096, region, 0, 4096);
    assert_eq!(refused(&mut queues[0]), (libc::EBADF, "device is read-only".into()));
    queues[0].discard(3, 4096, 4096);
    assert_eq!(refused(&mut queues[0]), (libc::ENOTSUP, "discard not supported".into()));
}

#[test]
fn a_disk_that_grows_is_longer_for_the_client_too() {
    let mut server = Server::start("/var/tmp", DISK_BYTES, &[]);
    let mut client = client(&mut server);
    let more = 2 * DISK_BYTES;
    assert_eq!(server.order("resize", &[&more.to_string()]).trim(), more.to_string());
    assert_eq!(client.capacity(), more);
    let data = pattern(12, 4096);
    assert!(round_trip(&mut client, more - 4096, &data) == data);
    assert_eq!(server.content(more - 4096, 4096), data);
}

#[test]
fn clients_that_come_and_go_leave_the_disk_and_nothing_else() {
    const ROUNDS: u64 = 100;
    let mut server = Server::start("/dev/shm", DISK_BYTES, &["--queues", "4"]);
    let round = |server: &mut Server, at: u64| {
        let mut client = Client::start(server.connect(false), 2, 2, 64 * KIB);
        let data = pattern(at, 4096);
        assert!(round_trip(&mut client, at * 4096, &data) == data);
        server.held()
    };
    // A thread that allocates for the first time gets an arena, and keeps it: 51 mappings have become 55. What leaks with
    // each client would be ten times as many.
    let first: Vec<_> = (0..10).map(|at| round(&mut server, at)).collect();
    let later: Vec<_> = (10..ROUNDS).map(|at| round(&mut server, at)).collect();
    let last = &later[later.len() - 10..];
    for (what, figure, more) in [("descriptors", 0, 0), ("mappings", 1, 8)] {
        let most = first.iter().map(|held| held[figure]).max().unwrap();
        let least = last.iter().map(|held| held[figure]).min().unwrap();
        assert!(least <= most + more, "{most} {what} in the first rounds, {least} after {ROUNDS}");
    }
    for at in 0..ROUNDS {
        assert_eq!(server.content(at * 4096, 4096), pattern(at, 4096), "{at}");
    }
}
