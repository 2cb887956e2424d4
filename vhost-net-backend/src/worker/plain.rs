//! The way of frames without a peer: between the guest's memory and a tap.

use std::io;

use colo::vhost_user::Ring;
use rustix::event::{PollFd, PollFlags, poll};

use super::{BATCH_FRAMES, Mode, Worker};
use crate::device::{RX, TX};
use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use crate::lan::{Null, Port};
use crate::proxy::rarp_request;

/// So many answers are made the driver's together.
const PUBLISH_FRAMES: usize = 16;

/// The shortest frame of Ethernet, without its checksum (IEEE 802.3).
const ETHERNET_FRAME_BYTES_MIN: usize = 60;

/// What a frame has besides the LAN's packet: Ethernet's own header and two VLAN tags.
const ETHERNET_BYTES: usize = 14 + 8;

impl Worker {
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.mode, Mode::Plain)
    }

    /// The guest → the LAN.
    pub(super) fn transmit(&mut self) -> bool {
        let tap = match &self.port {
            Port::Tap(tap) => tap,
            Port::Null(null) => return self.transmit_to_null(*null),
        };
        let Some(ring) = &mut self.rings[TX] else {
            return false;
        };
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES && ring.pop(&mut self.chain) {
            done += 1;
            if let Some(header) = self.offloads.take_header(&mut self.chain) {
                self.counters.guest_frames += 1;
                self.counters.guest_bytes += u64::from(self.chain.readable_bytes());
                let sent = self.link_up && tap.send(&header[..header_bytes], &self.chain, &mut self.outgoing);
                self.counters.lan_refused += u64::from(!sent);
            } else {
                self.counters.guest_malformed += 1;
            }
            ring.add_used(self.chain.head(), 0);
            if done % PUBLISH_FRAMES == 0 {
                ring.publish_used();
            }
        }
        ring.signal_used();
        done > 0
    }

    /// The LAN → the guest.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        if !self.receives {
            return Ok(false);
        }
        let tap = match &self.port {
            Port::Tap(tap) => tap,
            Port::Null(Null::Generate(bytes)) => return Ok(self.generate(*bytes)),
            Port::Null(_) => return Ok(false),
        };
        let Some(ring) = &mut self.rings[RX] else {
            return Ok(false);
        };
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES && self.buffers.take(ring, self.offloads.mergeable(), self.frame_room) {
            let Some(bytes) = self.buffers.receive(tap, &mut self.frame[..])? else {
                break;
            };
            done += 1;
            if bytes < header_bytes + FRAME_BYTES_MIN {
                continue;
            }
            if !self.link_up {
                self.counters.lan_ignored += 1;
                continue;
            }
            if bytes > self.buffers.room() {
                // the ring is short of buffers, they are too small, or the LAN's frames have become longer
                self.counters.guest_too_long += 1;
                self.frame_room = frame_room(&self.port, self.offloads);
                continue;
            }
            if let Some(filter) = &self.filter
                && !self.buffers.are_wanted(filter, header_bytes, bytes)
            {
                self.counters.lan_filtered += 1;
                self.buffers.mark(bytes);
                continue;
            }
            self.counters.lan_frames += 1;
            self.counters.lan_bytes += (bytes - header_bytes) as u64;
            self.buffers.give(ring, header_bytes, bytes);
            if done % PUBLISH_FRAMES == 0 {
                ring.publish_used();
            }
        }
        ring.signal_used();
        Ok(done > 0)
    }

    /// Sends a RARP request (RFC 903) from the guest's address, by which switches learn the port. The halves of a pair know
    /// better when to: a guest of theirs does not migrate.
    pub(super) fn announce(&self, mac: [u8; 6]) {
        if let Some(tap) = self.port.tap().filter(|_| self.is_plain() && self.link_up) {
            let mut frame = vec![0; self.offloads.header_bytes()];
            frame.extend(rarp_request(mac));
            frame.resize(self.offloads.header_bytes() + ETHERNET_FRAME_BYTES_MIN, 0);
            tap.write(&frame);
        }
    }

    /// Waits for something to do. Returns at once if there is something already.
    pub(super) fn sleep_plain(&mut self) -> io::Result<()> {
        let [rx, tx] = &mut self.rings;
        let can_send = tx.as_mut().is_some_and(|ring| ring.enable_notification());
        let (mergeable, room) = (self.offloads.mergeable(), self.frame_room);
        // A buffer for the guest's next frame is no work, the frame is; so the receive queue is waited for only while it is
        // short.
        let enough = |ring: &mut Box<Ring>| {
            self.buffers.take(ring, mergeable, room)
                || ring.enable_notification() && self.buffers.take(ring, mergeable, room)
        };
        let mut rx = rx.as_mut().filter(|_| self.receives);
        let (ready, tap) = match (&self.port, rx.as_deref_mut()) {
            (Port::Tap(tap), rx) => (can_send, rx.is_some_and(enough).then_some(tap)),
            (Port::Null(Null::Drop), _) => (can_send, None),
            (Port::Null(null), rx) => {
                let can_receive = rx.is_some_and(|ring| ring.enable_notification());
                let ready = match null {
                    Null::Reflect => can_receive && can_send,
                    _ => can_receive && self.link_up || can_send,
                };
                (ready, None)
            }
        };
        if ready {
            return Ok(());
        }
        let mut fds = vec![PollFd::new(&self.orders, PollFlags::IN)];
        match (tap, rx) {
            (Some(tap), _) => fds.push(PollFd::new(tap, PollFlags::IN)),
            (None, Some(ring)) => fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN)),
            (None, None) => {}
        }
        if let Some(ring) = tx {
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if fds[0].revents().contains(PollFlags::IN) {
            self.orders.rearm();
        }
        Ok(())
    }
}

/// How much room a frame may need with its header.
pub(super) fn frame_room(port: &Port, offloads: crate::offload::Offloads) -> usize {
    let frame =
        if offloads.receives_large() { FRAME_BYTES_MAX } else { usize::from(port.mtu()) + ETHERNET_BYTES };
    frame + offloads.header_bytes()
}
