use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;
use crate::image::{Image, ImageOptions, Source};

const LIMIT: Duration = Duration::from_secs(20);

fn shared() -> Arc<Shared> {
    let image = Image::open(&ImageOptions::new(Source::Null { bytes: 1 << 20 })).unwrap();
    Arc::new(Shared {
        image: Arc::new(image),
        metrics: [Metrics::default()].into(),
        serial: Default::default(),
        write_through: AtomicBool::new(false),
        sync_failed: AtomicBool::new(false),
    })
}

#[test]
fn an_order_is_not_slept_on_whose_wake_a_turn_has_seen() {
    let (orders, mailbox) = mailbox().unwrap();
    let sender = orders.clone();
    let (awake, is_awake) = bounded(1);
    let worker = thread::spawn(move || {
        let mut worker = Worker::new(shared(), mailbox, 0, 1, None, Duration::ZERO).unwrap();
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
