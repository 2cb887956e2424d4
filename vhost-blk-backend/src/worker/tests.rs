use std::os::fd::OwnedFd;
use std::thread;

use colo::memory::{DirtyLogs, MemoryTable, Region};
use colo::vhost_user::RingSetup;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;
use crate::image::{Image, ImageOptions, Source};

const LIMIT: Duration = Duration::from_secs(20);

fn shared(source: Source) -> Arc<Shared> {
    let image = Image::open(&ImageOptions::new(source)).unwrap();
    Arc::new(Shared::new(Arc::new(image), 1, "", true))
}

#[test]
fn an_order_is_not_slept_on_whose_wake_a_turn_has_seen() {
    let (orders, mailbox) = mailbox().unwrap();
    let sender = orders.clone();
    let (awake, is_awake) = bounded(1);
    let worker = thread::spawn(move || {
        let mut worker =
            Worker::new(shared(Source::Null { bytes: 1 << 20 }), mailbox, 0, 1, None, Duration::ZERO)
                .unwrap();
        worker.disk.arm(Wake::Order, worker.orders.as_fd());
        assert!(worker.orders.try_recv().is_none());
        // it comes here, and there is no other work
        sender.send(Order::Look).unwrap();
        while !worker.disk.has_fired(Wake::Order) {
            assert!(!worker.turn());
        }
        worker.sleep();
        awake.send(()).unwrap();
        assert!(matches!(worker.orders.try_recv(), Some(Order::Look)));
    });
    let result = is_awake.recv_timeout(LIMIT);
    // one that sleeps after all ends too
    drop(orders.send(Order::Look));
    worker.join().unwrap();
    assert_eq!(result, Ok(()), "it has slept on an order");
}

/// A ring with a flush in it, and what its driver is signalled by.
fn flush() -> (Ring, Arc<OwnedFd>) {
    const RAM_BYTES: u64 = 1 << 16;
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, RAM_BYTES).unwrap();
    let region = Region { guest_address: 0, bytes: RAM_BYTES, user_address: 0, mmap_offset: 0, file: ram };
    let mut table = MemoryTable::new(DirtyLogs::new());
    table.replace(vec![region]).unwrap();
    let memory = table.memory().clone();
    let write = |at: u64, value: &[u8]| memory.write_slice(value, GuestAddress(at)).unwrap();
    write(0, Descriptor::new(0x3000, 16, VRING_DESC_F_NEXT as u16, 1).as_slice());
    write(16, Descriptor::new(0x4000, 1, VRING_DESC_F_WRITE as u16, 0).as_slice());
    write(0x3000, &VIRTIO_BLK_T_FLUSH.to_le_bytes());
    write(0x1002, &1u16.to_le_bytes());
    let event = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
    let call = event();
    let setup = RingSetup {
        index: 0,
        size: 4,
        descriptors: GuestAddress(0),
        available: GuestAddress(0x1000),
        used: GuestAddress(0x2000),
        next_available: 0,
        event_idx: false,
        memory,
        kick: Some(event()),
        call: Some(call.clone()),
        error: None,
        broken_rings: Arc::default(),
        inflight: None,
    };
    (Ring::new(setup).unwrap(), call)
}

#[test]
fn what_ends_while_a_worker_waits_for_something_else_is_signalled() {
    let disk = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let (_orders, mailbox) = mailbox().unwrap();
    let shared = shared(Source::File(disk.path().into()));
    let mut worker = Worker::new(shared, mailbox, 0, 1, None, Duration::ZERO).unwrap();
    let (ring, call) = flush();
    worker.mode = Mode::Alone;
    worker.obey(Order::Start(0, Box::new(ring)));
    assert_eq!((worker.take_batch(0), worker.disk.in_flight()), (1, 1));
    worker.drain();
    assert_eq!(rustix::io::read(&*call, &mut [0; 8]), Ok(8));
}
