//! The way of frames to and from a LAN that is not there: what the rings alone cost.

use super::{BATCH_FRAMES, Worker};
use crate::device::RX;
use crate::frame::{self, FRAME_BYTES_MAX};
use crate::lan::Null;

/// The frame that is generated is nothing but zeros.
static ZEROS: [u8; FRAME_BYTES_MAX] = [0; FRAME_BYTES_MAX];

impl Worker {
    /// Takes what the guest sends, as a LAN would, and reflects it if that is asked for.
    pub(super) fn transmit_to_null(&mut self, null: Null) -> bool {
        let [rx, Some(ring)] = &mut self.rings else {
            return false;
        };
        let mut back = rx.as_deref_mut().filter(|_| null == Null::Reflect && self.receives);
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES {
            // what has no way back stays in the ring
            if null == Null::Reflect && !back.as_mut().is_some_and(|back| back.pop(&mut self.back)) {
                break;
            }
            if !ring.pop(&mut self.chain) {
                if let Some(back) = &mut back {
                    back.undo_pop(&self.back);
                }
                break;
            }
            done += 1;
            let mut reflected = None;
            if self.offloads.take_header(&mut self.chain).is_some() {
                let bytes = self.chain.readable_bytes() as usize;
                self.counters.guest_frames += 1;
                self.counters.guest_bytes += bytes as u64;
                let frame = &mut self.frame[..bytes];
                self.chain.copy_to(frame);
                if back.is_some() && self.link_up {
                    // nothing is left to such a LAN, so the header says nothing
                    reflected = frame::to_guest(&self.back, header_bytes, frame);
                    self.counters.guest_too_long += u64::from(reflected.is_none());
                }
            } else {
                self.counters.guest_malformed += 1;
            }
            match (&mut back, reflected) {
                (Some(back), Some(bytes)) => back.add_used(self.back.head(), bytes),
                (Some(back), None) => back.undo_pop(&self.back),
                (None, _) => {}
            }
            ring.add_used(self.chain.head(), 0);
        }
        ring.signal_used();
        if let Some(back) = back {
            back.signal_used();
        }
        done > 0
    }

    /// Fills the guest's buffers with frames of so many bytes.
    pub(super) fn generate(&mut self, bytes: usize) -> bool {
        let Some(ring) = self.rings[RX].as_mut().filter(|_| self.link_up) else {
            return false;
        };
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES && ring.pop(&mut self.chain) {
            let Some(used) = frame::to_guest(&self.chain, header_bytes, &ZEROS[..bytes]) else {
                self.counters.guest_too_long += 1;
                ring.undo_pop(&self.chain);
                break;
            };
            ring.add_used(self.chain.head(), used);
            done += 1;
        }
        ring.signal_used();
        self.counters.lan_frames += done as u64;
        self.counters.lan_bytes += (done * bytes) as u64;
        done > 0
    }
}
