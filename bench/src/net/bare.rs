//! What the kernel takes of frames that are written to a tap one after the other, without any device before it. Each has a
//! virtio-net header that asks for nothing, as the frames of a back end have.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::Namespace;
use vhost_net_backend::lan::{Tap, TapOptions};
use vhost_net_backend::offload::Offloads;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::card::{ETHERNET_BYTES, FROM_GUEST, HEADER_BYTES};
use super::load::on_core;
use super::server::TAP;

/// Frames between two looks at the clock, each in a buffer of its own: as many as a guest's queue has.
const BUFFERS: usize = 256;
const STRIDE: usize = 2048;

/// Opens a tap, a port of the bridge, as a back end does for a driver of today.
///
/// # Errors
/// There is no tap of that name.
pub(super) fn open(namespace: &Namespace, name: &str) -> Result<Tap> {
    let taps = namespace.run(|| Tap::open(name, TapOptions { queues: 1, headers: true }))??;
    let mut tap = taps.into_iter().next().context("One queue")?;
    tap.set_offloads(Offloads::negotiated(1 << VIRTIO_F_VERSION_1))?;
    namespace.await_port(name)?;
    Ok(tap)
}

/// Writes frames of `frame_bytes` bytes for so long, on `core`. Returns how many went out a second.
///
/// # Errors
/// There is no tap, or it takes nothing.
pub fn write(namespace: &Namespace, core: usize, frame_bytes: usize, duration: Duration) -> Result<f64> {
    let tap = open(namespace, TAP)?;
    on_core(core, || {
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
    })
}
