//! What the kernel takes of frames that are written to a tap one after the other, without any device before it. Each has a
//! virtio-net header that asks for nothing, as the frames of a back end have.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::Namespace;
use vhost_net_backend::lan::{Tap, TapOptions};

use super::card::{ETHERNET_BYTES, FROM_GUEST, HEADER_BYTES};
use super::load::on_core;
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
        let taps = Tap::open(TAP, TapOptions { queues: 1, headers: true })?;
        let tap = taps.first().context("One queue")?;
        let mut buffers = vec![0; BUFFERS * STRIDE];
        for frame in buffers.chunks_mut(STRIDE) {
            frame[HEADER_BYTES..][..ETHERNET_BYTES].copy_from_slice(&FROM_GUEST);
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
    namespace.run(|| on_core(core, work))?
}
