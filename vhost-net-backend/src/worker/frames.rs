//! How a worker moves frames of a pair between the guest's rings, the proxy and the tap: whole, and one by one.

use std::io;

use super::{BATCH_FRAMES, Mode, Worker};
use crate::device::{RX, TX};
use crate::frame::{self, FRAME_BYTES_MIN};
use crate::offload::FrameHeader;
use crate::protection::Lan;

impl Worker {
    /// Puts what waits for the guest into its ring, as far as there are buffers.
    pub(super) fn deliver(&mut self) -> bool {
        let (Some(ring), Mode::Protected(protection)) = (&mut self.rings[RX], &mut self.mode) else {
            return false;
        };
        let (header_bytes, mergeable) = (self.offloads.header_bytes(), self.offloads.mergeable());
        let mut any = false;
        while let Some(frame) = protection.undelivered.front()
            && self.buffers.take(ring, mergeable, header_bytes + frame.len())
        {
            any = true;
            let (mut header, bytes) = (frame.header(), header_bytes + frame.len());
            if bytes > self.buffers.room() {
                self.counters.guest_too_long += 1;
            } else if !self.offloads.accept_frame(&mut header, frame.len()) {
                self.counters.guest_unusable += 1;
            } else {
                self.buffers.write(header, header_bytes, frame);
                self.buffers.give(ring, header_bytes, bytes);
            }
            protection.undelivered.pop();
        }
        ring.signal_used();
        any
    }

    pub(super) fn takes_output(&self) -> bool {
        match &self.mode {
            Mode::Plain | Mode::Closed => false,
            Mode::Protected(protection) => protection.takes_output(),
        }
    }

    pub(super) fn guest_output(&mut self) -> bool {
        let mut any = false;
        for _ in 0..BATCH_FRAMES {
            if !self.takes_output() {
                break;
            }
            let Some(ring) = &mut self.rings[TX] else {
                break;
            };
            if !ring.pop(&mut self.chain) {
                break;
            }
            any = true;
            let Mode::Protected(protection) = &mut self.mode else {
                break;
            };
            let pool = protection.actions.pool();
            let frame = frame::from_guest(&mut self.chain, self.offloads, pool);
            ring.add_used(self.chain.head(), 0);
            let Some(frame) = frame else {
                self.counters.guest_malformed += 1;
                continue;
            };
            self.counters.guest_frames += 1;
            self.counters.guest_bytes += frame.len() as u64;
            protection.guest_output(frame);
            self.carry_out();
        }
        if any && let Mode::Protected(protection) = &mut self.mode {
            protection.guest_pauses();
            self.carry_out();
        }
        if let Some(ring) = &mut self.rings[TX] {
            ring.signal_used();
        }
        any
    }

    pub(super) fn lan(&self) -> Lan {
        match &self.mode {
            Mode::Plain | Mode::Closed => Lan::Ignore,
            Mode::Protected(protection) => protection.lan(),
        }
    }

    pub(super) fn lan_input(&mut self) -> io::Result<bool> {
        if self.rings[RX].is_none() {
            return if self.lan() == Lan::Ignore { self.ignore_lan() } else { Ok(false) };
        }
        let mut any = false;
        for _ in 0..BATCH_FRAMES {
            match self.lan() {
                Lan::Leave => break,
                Lan::Ignore => return self.ignore_lan(),
                Lan::Deliver => {}
            }
            let Some(ring) = &mut self.rings[RX] else {
                break;
            };
            let header_bytes = self.offloads.header_bytes();
            if !self.buffers.take(ring, self.offloads.mergeable(), self.frame_room) {
                break;
            }
            let Some(bytes) = self.port.read(&mut self.frame[..])? else {
                break;
            };
            any = true;
            if bytes < header_bytes + FRAME_BYTES_MIN {
                continue;
            }
            let (header, frame) = self.frame[..bytes].split_at(header_bytes);
            let Some(header) = FrameHeader::read(header) else {
                continue;
            };
            self.counters.lan_frames += 1;
            self.counters.lan_bytes += frame.len() as u64;
            if bytes > self.buffers.room() {
                self.counters.guest_too_long += 1;
                continue;
            }
            // what is mirrored is delivered in the same breath
            if !self.offloads.accept_frame(&mut { header }, frame.len()) {
                self.counters.guest_unusable += 1;
                continue;
            }
            if let Mode::Protected(protection) = &mut self.mode {
                protection.lan_input(header, frame);
            }
            self.carry_out();
            self.deliver();
        }
        if let Some(ring) = &mut self.rings[RX] {
            ring.signal_used();
        }
        Ok(any)
    }

    /// Keeps the tap from filling up with what will be old when this side may use it.
    pub(super) fn ignore_lan(&mut self) -> io::Result<bool> {
        for count in 0..BATCH_FRAMES {
            if self.port.read(&mut self.frame[..])?.is_none() {
                return Ok(count > 0);
            }
            self.counters.lan_ignored += 1;
        }
        Ok(true)
    }
}
