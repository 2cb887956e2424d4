//! A card as smoltcp's device: what a guest's driver and its TCP stack are to each other.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::Card;
use super::card::{ETHERNET_BYTES, FRAME_BYTES_MAX, HEADER_BYTES, Queue};
use crate::driver::BATCH;

const MTU: usize = 1500;

/// A card with a stack on it.
pub(crate) struct Nic {
    card: Card,
    /// Frames that have arrived: their slots and lengths.
    arrived: VecDeque<(u16, usize)>,
    /// Slots that may be sent.
    free: Vec<u16>,
    /// What the stack cannot be told.
    error: Option<anyhow::Error>,
}

impl Nic {
    /// Gives the card all buffers to receive into.
    pub(crate) fn new(mut card: Card) -> Result<Self> {
        card.begin(true, 0, FRAME_BYTES_MAX)?;
        let free = (0..card.tx.ring.slots()).collect();
        Ok(Self { card, arrived: VecDeque::new(), free, error: None })
    }

    /// Lets the device see what was sent and given back since.
    ///
    /// # Errors
    /// The device has broken a ring, or cannot be kicked.
    pub(crate) fn publish(&mut self) -> Result<()> {
        self.card.rx.publish()?;
        self.card.tx.publish()?;
        self.error.take().map_or(Ok(()), Err)
    }

    /// Waits until the device has ended a request, at most so long.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<()> {
        let Card { rx, tx, .. } = &self.card;
        // what was sent is of interest only where nothing more can be
        let there = rx.ring.arm() | (self.free.is_empty() && tx.ring.arm());
        if !there && self.arrived.is_empty() {
            let calls = [rx.notifiers.call.as_fd(), tx.notifiers.call.as_fd()];
            let mut fds = calls.map(|call| PollFd::from_borrowed_fd(call, PollFlags::IN));
            let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
            poll(&mut fds, Some(&limit)).context("Waiting for a card")?;
            for (call, fd) in calls.iter().zip(&fds) {
                if !fd.revents().is_empty() {
                    rustix::io::read(call, &mut [0; 8]).context("A card's notification")?;
                }
            }
        }
        rx.ring.quiet();
        tx.ring.quiet();
        Ok(())
    }

    /// Stops the queues.
    ///
    /// # Errors
    /// The server does not answer.
    pub(crate) fn close(self) -> Result<()> {
        self.card.close()
    }

    fn take(&mut self) -> Result<()> {
        let mut ended = [(0, 0); BATCH];
        let Card { rx, tx, .. } = &mut self.card;
        if self.arrived.is_empty() {
            rx.publish()?;
            let count = rx.ring.take(&mut ended, |_| ())?;
            for (slot, bytes) in &ended[..count] {
                let bytes =
                    (*bytes as usize).checked_sub(HEADER_BYTES).context("A buffer without a frame")?;
                self.arrived.push_back((*slot, bytes));
            }
        }
        if self.free.len() < BATCH {
            tx.publish()?;
            let count = tx.ring.take(&mut ended, |_| ())?;
            self.free.extend(ended[..count].iter().map(|(slot, _)| *slot));
        }
        Ok(())
    }

    fn look(&mut self) {
        if let Err(error) = self.take() {
            self.error.get_or_insert(error);
        }
    }
}

/// A frame that has arrived.
pub(crate) struct Arrived<'a> {
    rx: &'a mut Queue,
    slot: u16,
    bytes: usize,
}

/// Room for a frame to be sent.
pub(crate) struct Room<'a> {
    tx: &'a mut Queue,
    slot: u16,
    free: &'a mut Vec<u16>,
}

impl Device for Nic {
    type RxToken<'a> = Arrived<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived<'_>, Room<'_>)> {
        self.look();
        let slot_out = *self.free.last()?;
        let (slot, bytes) = self.arrived.pop_front()?;
        let Card { rx, tx, .. } = &mut self.card;
        Some((Arrived { rx, slot, bytes }, Room { tx, slot: slot_out, free: &mut self.free }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        self.look();
        let slot = *self.free.last()?;
        Some(Room { tx: &mut self.card.tx, slot, free: &mut self.free })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_BYTES + MTU;
        capabilities
    }
}

impl RxToken for Arrived<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, look: F) -> R {
        let result = look(self.rx.bytes(self.slot, self.bytes));
        self.rx.ring.offer(self.slot);
        result
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, write: F) -> R {
        let result = write(self.tx.bytes_mut(self.slot, bytes));
        self.tx.set_buffer(self.slot, bytes, false);
        self.tx.ring.offer(self.slot);
        self.free.pop();
        result
    }
}
