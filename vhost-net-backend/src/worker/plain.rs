//! The way of frames without a peer: between the guest's memory and the LAN, without a copy in between.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};

use super::{BATCH_FRAMES, Mode, Worker};
use crate::device::RX;
use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, LEGACY_HEADER_BYTES};
use crate::lan::{Null, Port};

/// So many answers are made the driver's together.
const PUBLISH_FRAMES: usize = 16;

/// What a frame has besides the LAN's packet: Ethernet's own header and two VLAN tags.
const ETHERNET_BYTES: usize = 14 + 8;

impl Worker {
    pub(super) fn is_plain(&self) -> bool {
        matches!(self.mode, Mode::Plain)
    }

    /// The guest → the LAN.
    pub(super) fn transmit(&mut self) -> bool {
        let [rx, tx] = &mut self.rings;
        let Some(ring) = tx else {
            return false;
        };
        let header_bytes = self.offloads.header_bytes();
        let mut done = 0;
        while done < BATCH_FRAMES {
            // what has no way back stays in the ring
            if let (Port::Null(Null::Reflect), Some(rx)) = (&self.port, &mut *rx)
                && !self.buffers.take(rx, false, 0)
            {
                break;
            }
            if !ring.pop(&mut self.chain) {
                break;
            }
            done += 1;
            let mut header = [0; HEADER_BYTES];
            let whole = self.chain.take_front(&mut header[..header_bytes]);
            let bytes = self.chain.readable_bytes() as usize;
            ring.add_used(self.chain.head(), 0);
            if done % PUBLISH_FRAMES == 0 {
                ring.publish_used();
            }
            if !whole
                || !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes)
                || !self.offloads.admit(&mut header, bytes)
            {
                self.counters.guest_malformed += 1;
                continue;
            }
            self.counters.guest_frames += 1;
            self.counters.guest_bytes += bytes as u64;
            if !self.link_up {
                self.counters.lan_refused += 1;
                continue;
            }
            match (&self.port, &mut *rx) {
                (Port::Tap(tap), _) => {
                    let sent = tap.send(&header[..header_bytes], &self.chain, &mut self.vectors);
                    self.counters.lan_refused += u64::from(!sent);
                }
                (Port::Null(Null::Reflect), Some(rx)) => {
                    let frame = &mut self.frame[..bytes];
                    self.chain.copy_to(frame);
                    header[LEGACY_HEADER_BYTES] = 1;
                    let fits = self.buffers.fill(rx, &[&header[..header_bytes], frame]);
                    self.counters.guest_too_long += u64::from(!fits);
                }
                (Port::Null(_), _) => {}
            }
        }
        ring.signal_used();
        if let (Port::Null(Null::Reflect), Some(rx)) = (&self.port, rx) {
            rx.signal_used();
        }
        done > 0
    }

    /// The LAN → the guest.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        let Some(ring) = &mut self.rings[RX] else {
            return Ok(false);
        };
        let header_bytes = self.offloads.header_bytes();
        let mut any = false;
        for count in 1..=BATCH_FRAMES {
            match &self.port {
                Port::Tap(tap) => {
                    if !self.buffers.take(ring, self.offloads.mergeable(), self.frame_room) {
                        break;
                    }
                    let Some(bytes) = self.buffers.receive(tap, &mut self.frame[..])? else {
                        break;
                    };
                    any = true;
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
                    self.counters.lan_frames += 1;
                    self.counters.lan_bytes += (bytes - header_bytes) as u64;
                    self.buffers.give(ring, header_bytes, bytes);
                }
                Port::Null(Null::Generate(bytes)) => {
                    if !self.buffers.take(ring, false, 0) {
                        break;
                    }
                    any = true;
                    let mut header = [0; HEADER_BYTES];
                    header[LEGACY_HEADER_BYTES] = 1;
                    if !self.buffers.fill(ring, &[&header[..header_bytes], &self.frame[..*bytes]]) {
                        self.counters.guest_too_long += 1;
                        break;
                    }
                    self.counters.lan_frames += 1;
                    self.counters.lan_bytes += *bytes as u64;
                }
                Port::Null(_) => break,
            }
            if count % PUBLISH_FRAMES == 0 {
                ring.publish_used();
            }
        }
        ring.signal_used();
        Ok(any)
    }

    /// Waits for something to do. Returns at once if there is something already.
    pub(super) fn sleep_plain(&mut self) -> io::Result<()> {
        let [rx, tx] = &mut self.rings;
        // A buffer for the guest's next frame is no work, the frame is; so the receive queue is waited for only while it is
        // short.
        let (mergeable, room) = (self.offloads.mergeable(), self.frame_room);
        let can_receive = rx.as_mut().is_some_and(|ring| {
            self.buffers.take(ring, mergeable, room)
                || ring.enable_notification() && self.buffers.take(ring, mergeable, room)
        });
        let can_send = match self.port {
            Port::Null(Null::Generate(_)) if can_receive => return Ok(()),
            Port::Null(Null::Reflect) => can_receive,
            _ => true,
        };
        let tx = tx.as_mut().filter(|_| can_send);
        let mut fds = vec![PollFd::new(&self.orders, PollFlags::IN)];
        if let Some(ring) = tx {
            if ring.enable_notification() {
                return Ok(());
            }
            fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
        }
        match (rx, &self.port) {
            (Some(_), Port::Tap(tap)) if can_receive => fds.push(PollFd::new(tap, PollFlags::IN)),
            (Some(ring), _) if !can_receive => {
                fds.push(PollFd::from_borrowed_fd(ring.kick_fd(), PollFlags::IN));
            }
            _ => {}
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
