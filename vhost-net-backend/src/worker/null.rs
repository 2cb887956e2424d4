//! The way of frames to and from a LAN that is not there: what the rings alone cost.

use colo::vhost_user::Chain;

use super::{BATCH_FRAMES, Worker};
use crate::device::RX;
use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::lan::Null;

/// The frame that is generated is nothing but zeros.
static ZEROS: [u8; FRAME_BYTES_MAX] = [0; FRAME_BYTES_MAX];

impl Worker {
    /// Takes what the guest sends, as a LAN would, and reflects it if that is asked for.
    pub(super) fn transmit_to_null(&mut self, null: Null) -> bool {
        let [rx, Some(ring)] = &mut self.rings else {
            return false;
        };
        let mut back = rx.as_deref_mut().filter(|_| null == Null::Reflect);
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
            let mut header = [0; HEADER_BYTES];
            let whole = self.chain.take_front(&mut header[..header_bytes]);
            let bytes = self.chain.readable_bytes() as usize;
            let sound = whole
                && (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes)
                && self.offloads.admit(&mut header, bytes);
            let mut reflected = false;
            if sound {
                self.counters.guest_frames += 1;
                self.counters.guest_bytes += bytes as u64;
                let frame = &mut self.frame[..bytes];
                self.chain.copy_to(frame);
                if let Some(back) = back.as_mut().filter(|_| self.link_up) {
                    header[LEGACY_HEADER_BYTES] = 1;
                    reflected = fill(&self.back, &[&header[..header_bytes], frame]);
                    if reflected {
                        back.add_used(self.back.head(), (header_bytes + bytes) as u32);
                    } else {
                        self.counters.guest_too_long += 1;
                    }
                }
            } else {
                self.counters.guest_malformed += 1;
            }
            if let Some(back) = back.as_mut().filter(|_| !reflected) {
                back.undo_pop(&self.back);
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
        let mut header = [0; HEADER_BYTES];
        header[LEGACY_HEADER_BYTES] = 1;
        let mut done = 0;
        while done < BATCH_FRAMES && ring.pop(&mut self.chain) {
            if !fill(&self.chain, &[&header[..header_bytes], &ZEROS[..bytes]]) {
                self.counters.guest_too_long += 1;
                ring.undo_pop(&self.chain);
                break;
            }
            ring.add_used(self.chain.head(), (header_bytes + bytes) as u32);
            done += 1;
        }
        ring.signal_used();
        self.counters.lan_frames += done as u64;
        self.counters.lan_bytes += (done * bytes) as u64;
        done > 0
    }
}

/// Whether all parts fit, and were written then.
#[inline]
fn fill(chain: &Chain, parts: &[&[u8]]) -> bool {
    let bytes: usize = parts.iter().map(|part| part.len()).sum();
    chain.writable_bytes() as usize >= bytes && chain.fill(parts) == bytes
}
