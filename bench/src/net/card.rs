//! The guest's side of a network card: a queue pair, each slot of it with one buffer for a frame and its header.
#![expect(unsafe_code, reason = "buffers in guest memory are reached through raw pointers only")]

use std::path::Path;

use anyhow::{Context, Result, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};

use crate::driver::{self, Descriptor, Memory, Notifiers, Place, Ring, WRITABLE};

/// The header of virtio 1.0 (virtio 1.2 §5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// The hardware addresses of a guest that is no VM, and of the other end.
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
pub(super) const TAP_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Addresses and type of a frame: of the type for experiments (IEEE 802, 0x88b5).
pub(super) const ETHERNET_BYTES: usize = 14;
pub(super) const FROM_GUEST: [u8; ETHERNET_BYTES] = ethernet(TAP_MAC, GUEST_MAC);
pub(super) const TO_GUEST: [u8; ETHERNET_BYTES] = ethernet(GUEST_MAC, TAP_MAC);
const fn ethernet(to: [u8; 6], from: [u8; 6]) -> [u8; ETHERNET_BYTES] {
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (to, from);
    [a, b, c, d, e, f, g, h, i, j, k, l, 0x88, 0xb5]
}
const FROM_GUEST_WORDS: [u64; 2] = {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = FROM_GUEST;
    [u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, 0, 0])]
};
/// A buffer's place: room for the longest frame of Ethernet.
const STRIDE: usize = 2048;
/// The longest frame that fits.
pub(super) const FRAME_BYTES_MAX: usize = STRIDE - HEADER_BYTES;

/// One queue with its buffers.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) ring: Ring<1>,
    pub(super) notifiers: Notifiers,
    place: Place,
    buffers: *mut u8,
    buffers_at: usize,
}

// SAFETY: the pointer leads into the memory that `ring` keeps, and only the owner uses it on this side.
unsafe impl Send for Queue {}

impl Queue {
    fn new(memory: &std::sync::Arc<Memory>, place: Place, depth: u16) -> Result<Self> {
        let buffers = memory.at(place.end, STRIDE * usize::from(depth));
        let ring = Ring::new(memory, &place, depth, false);
        Ok(Self { ring, notifiers: Notifiers::new()?, place, buffers, buffers_at: place.end })
    }

    /// Says how long a slot's buffer is, and whose it is to write.
    pub(super) fn set_buffer(&mut self, slot: u16, frame_bytes: usize, writable: bool) {
        assert!(frame_bytes <= FRAME_BYTES_MAX);
        let address = (self.buffers_at + STRIDE * usize::from(slot)) as u64;
        let (bytes, flags) = ((HEADER_BYTES + frame_bytes) as u32, if writable { WRITABLE } else { 0 });
        self.ring.set_descriptor(slot, 0, Descriptor { address, bytes, flags, next: 0 });
    }

    /// Lets the device see what was offered, and kicks it if it wants that.
    #[inline]
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.ring.publish() { self.notifiers.kick() } else { Ok(()) }
    }

    #[inline]
    fn frame(&self, slot: u16) -> *mut u8 {
        assert!(slot < self.ring.slots());
        self.buffers.wrapping_add(STRIDE * usize::from(slot) + HEADER_BYTES)
    }

    /// Writes the addresses and the type of a slot's frame, as a driver's stack has just done, and a number behind them.
    #[inline]
    pub(super) fn write_frame(&mut self, slot: u16, number: u64) {
        debug_assert!(!self.ring.is_in_flight(slot));
        let frame = self.frame(slot).cast::<u64>();
        let [head, rest] = FROM_GUEST_WORDS;
        // SAFETY: 24 bytes of the slot's buffer, which is longer and lies at a multiple of four; the device has no request
        // with it.
        unsafe {
            frame.write_unaligned(head);
            frame.add(1).write_unaligned(rest);
            frame.add(2).write_unaligned(number);
        }
    }

    /// Writes a whole frame into a slot's buffer.
    #[inline]
    pub(super) fn write_bytes(&mut self, slot: u16, bytes: &[u8]) {
        assert!(bytes.len() <= FRAME_BYTES_MAX);
        debug_assert!(!self.ring.is_in_flight(slot));
        // SAFETY: as many bytes of the slot's buffer as there are; the device has no request with it.
        unsafe { self.frame(slot).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The first bytes of a slot's frame.
    pub(super) fn bytes(&self, slot: u16, bytes: usize) -> &[u8] {
        assert!(bytes <= FRAME_BYTES_MAX && !self.ring.is_in_flight(slot));
        // SAFETY: inside the slot's buffer. The device has no request with it, nor gets one as long as we are borrowed.
        unsafe { std::slice::from_raw_parts(self.frame(slot), bytes) }
    }

    /// The same, to be written.
    pub(super) fn bytes_mut(&mut self, slot: u16, bytes: usize) -> &mut [u8] {
        assert!(bytes <= FRAME_BYTES_MAX && !self.ring.is_in_flight(slot));
        // SAFETY: as above, and nobody else borrows us.
        unsafe { std::slice::from_raw_parts_mut(self.frame(slot), bytes) }
    }

    /// A byte of a slot's frame.
    #[inline]
    pub(super) fn byte(&self, slot: u16, at: usize) -> u8 {
        assert!(at < FRAME_BYTES_MAX);
        // SAFETY: inside the slot's buffer; the device has ended its request.
        unsafe { self.frame(slot).add(at).read() }
    }

    /// Reads the beginning of a slot's frame, as a driver's stack does.
    #[inline]
    pub(super) fn read_frame(&self, slot: u16) -> u64 {
        // SAFETY: 8 bytes of the slot's buffer; the device has ended its request.
        unsafe { self.frame(slot).cast::<u64>().read_unaligned() }
    }
}

/// What a driver takes that receives large frames in several buffers.
pub const MERGED: u64 =
    1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

/// A running card, seen from the guest.
pub struct Card {
    frontend: Frontend,
    pub(super) rx: Queue,
    pub(super) tx: Queue,
    merged: bool,
}

impl Card {
    /// Connects to the vhost-user-net server at `socket` and starts a queue pair with `depth` buffers each.
    ///
    /// # Errors
    /// The server refuses something.
    pub fn open(socket: &Path, depth: u16) -> Result<Self> {
        Self::open_with(socket, depth, 0)
    }

    /// The same for a driver with more features than it needs to receive one frame in one buffer, such as [`MERGED`].
    ///
    /// # Errors
    /// The server refuses something.
    pub fn open_with(socket: &Path, depth: u16, features: u64) -> Result<Self> {
        ensure!((1..=1024).contains(&depth), "A depth of {depth}: choose 1 to 1024");
        // not MQ: for a card that counts pairs with some servers and queues with others
        let wanted = VhostUserProtocolFeatures::REPLY_ACK;
        let (mut frontend, offered) = driver::connect(socket, 2, wanted)?;
        let rx = Place::new(0, depth);
        let tx = Place::new(rx.end + STRIDE * usize::from(depth), depth);
        let memory = Memory::new(tx.end + STRIDE * usize::from(depth))?;
        driver::set_memory(&frontend, offered, 1 << VIRTIO_F_VERSION_1 | features, &memory)?;
        let (rx, tx) = (Queue::new(&memory, rx, depth)?, Queue::new(&memory, tx, depth)?);
        for (index, queue) in [&rx, &tx].into_iter().enumerate() {
            driver::start_queue(&mut frontend, index, &memory, &queue.place, &queue.notifiers)?;
        }
        Ok(Self { frontend, rx, tx, merged: features & MERGED == MERGED })
    }

    /// How many buffers a device may keep without a frame in them: it takes none before there is room for the largest, an IP
    /// packet with its headers.
    pub(super) fn buffers_kept(&self) -> usize {
        let largest = HEADER_BYTES + ETHERNET_BYTES + 8 + 65_535;
        if self.merged { largest / STRIDE } else { 0 }
    }

    /// Gives the device all buffers for what the guest receives, if it receives at all, and sends that many frames,
    /// numbered from 1 on.
    ///
    /// # Errors
    /// The device cannot be kicked.
    pub fn begin(&mut self, receives: bool, frames: u16, frame_bytes: usize) -> Result<()> {
        let Self { rx, tx, .. } = self;
        for slot in 0..rx.ring.slots() {
            rx.set_buffer(slot, FRAME_BYTES_MAX, true);
            tx.set_buffer(slot, frame_bytes, false);
        }
        if receives {
            for slot in 0..rx.ring.slots() {
                rx.ring.offer(slot);
            }
            rx.publish()?;
        }
        for slot in 0..frames {
            tx.write_frame(slot, u64::from(slot) + 1);
            tx.ring.offer(slot);
        }
        tx.publish()
    }

    /// Stops the queues as a VMM does.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn close(self) -> Result<()> {
        for index in 0..2 {
            self.frontend
                .get_vring_base(index)
                .with_context(|| format!("GET_VRING_BASE of queue {index}"))?;
        }
        Ok(())
    }
}
