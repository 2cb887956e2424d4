//! The way of frames without a peer: between the guest's memory and a tap or an interface.

use std::io;

use colo::vhost_user::Ring;
use rustix::event::{PollFd, PollFlags};

use super::{BATCH_FRAMES, Mode, Worker, sleep_until_any};
use crate::device::{RX, TX};
use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use crate::lan::{Null, Port, Sent};
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
        if let Port::Null(null) = &self.port {
            return self.transmit_to_null(*null);
        }
        self.port_full = false;
        let Some(ring) = &mut self.rings[TX] else {
            return false;
        };
        let mut done = 0;
        while done < BATCH_FRAMES && ring.pop(&mut self.chain) {
            if let Some(header) = self.offloads.take_header(&mut self.chain) {
                let sent = if self.link_up {
                    self.port.send(&header, &self.chain, &mut self.outgoing)
                } else {
                    Sent::Refused
                };
                if sent == Sent::Later {
                    ring.undo_pop(&self.chain);
                    self.port_full = true;
                    break;
                }
                self.counters.guest_frames += 1;
                self.counters.guest_bytes += u64::from(self.chain.readable_bytes());
                self.counters.lan_refused += u64::from(sent == Sent::Refused);
            } else {
                self.counters.guest_malformed += 1;
            }
            ring.add_used(self.chain.head(), 0);
            done += 1;
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
        match &self.port {
            Port::Tap(_) | Port::Packet(_) => {}
            Port::Null(Null::Generate(bytes)) => return Ok(self.generate(*bytes)),
            Port::Null(_) => return Ok(false),
        }
        let Some(ring) = &mut self.rings[RX] else {
            return Ok(false);
        };
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES && self.buffers.take(ring, self.offloads.mergeable(), self.frame_room) {
            let Some(bytes) = self.buffers.receive(&mut self.port, &mut self.frame[..], self.frame_room)?
            else {
                break;
            };
            done += 1;
            let is_given = if bytes < header_bytes + FRAME_BYTES_MIN {
                false
            } else if !self.link_up {
                self.counters.lan_ignored += 1;
                false
            } else if bytes > self.buffers.room() {
                // the ring is short of buffers, they are too small, or the LAN's frames have become longer
                self.counters.guest_too_long += 1;
                self.frame_room = frame_room(&self.port, self.offloads);
                false
            } else if let Some(filter) = &self.filter
                && !self.buffers.are_wanted(filter, header_bytes, bytes)
            {
                self.counters.lan_filtered += 1;
                false
            } else {
                true
            };
            if !is_given {
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
        if self.is_plain() && self.link_up {
            let mut frame = rarp_request(mac);
            frame.resize(ETHERNET_FRAME_BYTES_MIN, 0);
            self.port.write(&frame);
        }
    }

    /// Waits for something to do. Returns at once if there is something already.
    pub(super) fn sleep_plain(&mut self) -> io::Result<()> {
        let [rx, tx] = &mut self.rings;
        let can_send = !self.port_full && tx.as_mut().is_some_and(|ring| ring.enable_notification());
        let (mergeable, room) = (self.offloads.mergeable(), self.frame_room);
        // A buffer for the guest's next frame is no work, the frame is; so the receive queue is waited for only while it is
        // short.
        let enough = |ring: &mut Box<Ring>| {
            self.buffers.take(ring, mergeable, room)
                || ring.enable_notification() && self.buffers.take(ring, mergeable, room)
        };
        let mut rx = rx.as_mut().filter(|_| self.receives);
        let (ready, incoming) = match (&self.port, rx.as_deref_mut()) {
            (Port::Tap(_) | Port::Packet(_), rx) => {
                let can_receive = rx.is_some_and(enough);
                let incoming = self.port.incoming().filter(|_| can_receive);
                (can_send || can_receive && self.port.has_frame(), incoming)
            }
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
        match (incoming, rx) {
            (Some(incoming), _) => fds.push(PollFd::from_borrowed_fd(incoming, PollFlags::IN)),
            (None, Some(ring)) => fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN)),
            (None, None) => {}
        }
        match (tx, self.port.outgoing().filter(|_| self.port_full)) {
            (_, Some(outgoing)) => fds.push(PollFd::from_borrowed_fd(outgoing, PollFlags::OUT)),
            (Some(ring), None) => fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN)),
            (None, None) => {}
        }
        if sleep_until_any(&mut fds, self.port.sleep_max())? {
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
