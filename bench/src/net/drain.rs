//! Out of a tap: how fast frames are taken that wait in it already. The bridge fills the tap's queue while nobody reads,
//! and only the reading is measured: a sender at the same time would take a third core.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use colo_lab::Namespace;
use vhost_net_backend::lan::Tap;

use super::card::{ETHERNET_BYTES, FROM_GUEST, HEADER_BYTES, TO_GUEST};
use super::load::{PATIENCE, on_core, pin, received};
use super::server::{SOURCE_TAP, TAP};
use super::{Card, bare};
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};

/// Frames that wait in the tap's queue each time. The queue is a little longer ([`super::add_lan`]).
pub(super) const FRAMES: usize = 16_384;

/// A tap that leads to the measured one by a bridge.
struct Source {
    tap: Tap,
    frame: Vec<u8>,
}

impl Source {
    fn open(namespace: &Namespace, frame_bytes: usize) -> Result<Self> {
        let tap = bare::open(namespace, SOURCE_TAP)?;
        namespace.await_port(TAP)?;
        let mut frame = vec![0; HEADER_BYTES + frame_bytes];
        frame[HEADER_BYTES..][..ETHERNET_BYTES].copy_from_slice(&TO_GUEST);
        Ok(Self { tap, frame })
    }

    fn fill(&self) -> Result<()> {
        for _ in 0..FRAMES {
            ensure!(self.tap.write(&self.frame), "The tap {SOURCE_TAP} takes nothing");
        }
        Ok(())
    }
}

/// Has a device take frames of `frame_bytes` bytes out of its tap until that has taken `duration`. Fills the tap and
/// drives the guest on `core`. Returns frames a second.
///
/// # Errors
/// Frames are lost, or the device breaks a ring.
pub fn device(
    card: &mut Card,
    namespace: &Namespace,
    core: usize,
    frame_bytes: usize,
    duration: Duration,
) -> Result<f64> {
    let source = Source::open(namespace, frame_bytes)?;
    on_core(core, || {
        ticks_per_nanosecond();
        // one frame goes out, so that the bridge knows where the guest is
        card.begin(false, 1, frame_bytes)?;
        let slots = card.rx.ring.slots();
        let (wanted, patience) = (ticks_in(duration), ticks_in(PATIENCE));
        let (mut taken, mut spent) = (0, 0);
        // buffers for exactly the frames that are there, so that none is taken while the tap is filled again
        let mut buffers = FRAMES + card.buffers_kept();
        // the first time is not counted
        let mut warm = false;
        while spent < wanted {
            source.fill()?;
            let began = ticks();
            let mut offered = 0;
            for slot in 0..slots {
                if !card.rx.ring.is_in_flight(slot) {
                    card.rx.ring.offer(slot);
                    offered += 1;
                }
            }
            card.rx.publish()?;
            let (mut arrived, mut progress) = (0, began);
            while arrived < FRAMES {
                let count = received(&mut card.rx, buffers - offered)?;
                arrived += count;
                offered = buffers.min(offered + count);
                if count > 0 {
                    progress = ticks();
                }
                ensure!(
                    ticks() - progress < patience,
                    "{arrived} frames of {FRAMES} have come out of the tap"
                );
            }
            buffers = FRAMES;
            if std::mem::replace(&mut warm, true) {
                spent += ticks() - began;
                taken += FRAMES;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "counts and ticks of one run")]
        Ok(taken as f64 / (spent as f64 / ticks_per_nanosecond() / 1e9))
    })
}

/// The same for a loop of reads on the second core, and nothing else.
///
/// # Errors
/// Frames are lost.
pub fn bare(
    namespace: &Namespace,
    (core, server_core): (usize, usize),
    frame_bytes: usize,
    duration: Duration,
) -> Result<f64> {
    let tap = bare::open(namespace, TAP)?;
    let source = Source::open(namespace, frame_bytes)?;
    on_core(core, || {
        let mut first = vec![0; HEADER_BYTES + frame_bytes];
        first[HEADER_BYTES..][..ETHERNET_BYTES].copy_from_slice(&FROM_GUEST);
        ensure!(tap.write(&first), "The tap {TAP} takes nothing");
        // as many buffers as a guest's queue has
        let mut buffers = vec![[0; 2048]; 256];
        let (mut taken, mut spent) = (0, Duration::ZERO);
        let mut warm = false;
        while spent < duration {
            // the core that fills the tap is another one than that which empties it, as with a device
            pin(core)?;
            source.fill()?;
            pin(server_core)?;
            let began = Instant::now();
            for at in 0..FRAMES {
                let read = tap.read(&mut buffers[at % 256])?;
                ensure!(read == Some(HEADER_BYTES + frame_bytes), "Frame {at} of {FRAMES} is not there");
            }
            if std::mem::replace(&mut warm, true) {
                spent += began.elapsed();
                taken += FRAMES;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "frames of one run")]
        Ok(taken as f64 / spent.as_secs_f64())
    })
}
