//! What the kernel takes of frames that are written to a tap one after the other, without any device before it. Each has a
//! virtio-net header that asks for nothing, as the frames of a back end have.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use colo_lab::Namespace;
use core_affinity::CoreId;
use vhost_net_backend::lan::{Tap, TapOptions};

use super::card::HEADER_BYTES;
use super::server::TAP;

/// Frames between two looks at the clock, each in a buffer of its own: as many as a guest's queue has.
const BUFFERS: usize = 256;
const STRIDE: usize = 2048;

/// Writes frames of `frame_bytes` bytes for so long, on `core`. Returns how many went out a second.
///
/// # Errors
/// There is no tap, or it takes nothing.
pub fn write(namespace: &Namespace, core: usize, frame_bytes: usize, duration: Duration) -> Result<f64> {
    let work = || -> Result<f64> {
        ensure!(core_affinity::set_for_current(CoreId { id: core }), "Core {core} is not ours");
        let taps = Tap::open(TAP, TapOptions { queues: 1, headers: true })?;
        let tap = taps.first().context("One queue")?;
        let mut buffers = vec![0; BUFFERS * STRIDE];
        for frame in buffers.chunks_mut(STRIDE) {
            // the same addresses and type as those of the guest that is no VM
            frame[HEADER_BYTES..][..14]
                .copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 0x88, 0xb5]);
        }
        let (began, mut written) = (Instant::now(), 0u64);
        while began.elapsed() < duration {
            for frame in buffers.chunks(STRIDE) {
                ensure!(tap.write(&frame[..HEADER_BYTES + frame_bytes]), "The tap takes nothing");
            }
            written += BUFFERS as u64;
        }
        #[expect(clippy::cast_precision_loss, reason = "frames of one run")]
        Ok(written as f64 / began.elapsed().as_secs_f64())
    };
    // a thread of its own, which the core is for
    namespace.run(|| {
        std::thread::scope(|scope| scope.spawn(work).join().map_err(|_| anyhow!("The loop panicked"))?)
    })?
}
