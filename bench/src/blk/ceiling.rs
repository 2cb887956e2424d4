//! What the load generator itself can do: against a device in this process that does nothing but answer.
#![expect(unsafe_code, reason = "the other side of the rings, reached through raw pointers as ring.rs does")]

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use core_affinity::CoreId;

use super::connection::build_queues;
use super::ring::{Layout, SLOT_DESCRIPTORS};
use super::{Connection, Load, Measured, Shape, load};
use crate::driver::{Descriptor, Memory};

const DISK_BYTES: u64 = 1 << 30;
const NO_NOTIFY: u16 = 1;
const BATCH: u16 = 16;

/// Measures `load` on one queue against the device, which runs on `core`.
///
/// # Errors
/// The core is not ours, or the load fails.
pub fn run(depth: u16, core: usize, measured: &Load) -> Result<Measured> {
    run_with_status(depth, core, measured, 0)
}

/// The same with a device that gives every request this status.
fn run_with_status(depth: u16, core: usize, measured: &Load, status: u8) -> Result<Measured> {
    ensure!(measured.polling, "The device in this process gives no signals");
    let shape = Shape { queues: 1, depth, block_bytes: 4096, event_idx: false };
    let (memory, queues) = build_queues(shape)?;
    let queue = queues.into_iter().next().context("One queue")?;
    let layout = queue.layout;
    let mut connection = Connection::without_server(shape, DISK_BYTES, vec![queue]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let device = scope.spawn(|| {
            ensure!(core_affinity::set_for_current(CoreId { id: core }), "Core {core} is not ours");
            answer(&memory, &layout, &stop, status);
            Ok(())
        });
        let result = load::run(&mut connection, measured, || Ok(Duration::ZERO));
        stop.store(true, Ordering::Relaxed);
        device.join().map_err(|_| anyhow!("The device panicked"))??;
        result
    })
}

/// Answers every request with this status.
fn answer(memory: &Memory, layout: &Layout, stop: &AtomicBool, status: u8) {
    let size = usize::from(layout.place.size);
    let descriptors: *mut Descriptor = memory.at(layout.place.descriptors, size_of::<Descriptor>() * size);
    let available: *mut u16 = memory.at(layout.place.available, 6 + 2 * size);
    let used: *mut u16 = memory.at(layout.place.used, 6 + 8 * size);
    // SAFETY: index words of rings that are mapped as long as `memory` is, reached by atomic accesses on both sides.
    let (available_index, used_index) =
        unsafe { (AtomicU16::from_ptr(available.add(1)), AtomicU16::from_ptr(used.add(1))) };
    // SAFETY: the flags, likewise.
    unsafe { AtomicU16::from_ptr(used) }.store(NO_NOTIFY, Ordering::Relaxed);
    let mut seen = 0u16;
    while !stop.load(Ordering::Relaxed) {
        let count = available_index.load(Ordering::Acquire).wrapping_sub(seen).min(BATCH);
        if count == 0 {
            continue;
        }
        for at in (0..count).map(|at| usize::from(seen.wrapping_add(at) & (layout.place.size - 1))) {
            // SAFETY: inside the ring; the driver in this process offers the first descriptor of a slot, whose third
            // is a status byte in this memory, and leaves all of it alone until it is used.
            unsafe {
                let head = available.add(2 + at).read_volatile();
                let place =
                    descriptors.add(usize::from(head) + usize::from(SLOT_DESCRIPTORS) - 2).read_volatile();
                memory.at::<u8>(place.address as usize, 1).write_volatile(status);
                used.add(2 + 4 * at).cast::<[u32; 2]>().write_volatile([head.into(), 1]);
            }
        }
        seen = seen.wrapping_add(count);
        used_index.store(seen, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::blk::Access;

    fn load() -> Load {
        Load {
            access: Access { write_percent: 50, random: true },
            polling: true,
            thread_per_queue: false,
            core: None,
            duration: Duration::from_millis(50),
        }
    }

    fn a_core() -> usize {
        core_affinity::get_core_ids().expect("the cores of this machine")[0].id
    }

    #[test]
    fn a_load_runs_and_ends() {
        // on a busy machine one of the two threads may not run at all while it is measured
        let limit = Instant::now() + Duration::from_secs(60);
        let measured = loop {
            let measured = run(8, a_core(), &load()).unwrap();
            if measured.iops > 0.0 {
                break measured;
            }
            assert!(Instant::now() < limit, "no request has ended");
        };
        assert!(measured.p50_us > 0.0, "{measured:?}");
        assert!(measured.p99_us >= measured.p50_us, "{measured:?}");
    }

    #[test]
    fn a_request_that_fails_fails_the_load() {
        let error = run_with_status(8, a_core(), &load(), 1).unwrap_err();
        assert!(error.to_string().contains("status 1"), "{error:#}");
    }
}
