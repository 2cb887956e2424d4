//! One queue pair's way to the LAN, whatever that is.
#![expect(unsafe_code, reason = "frames are received into guest memory")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use colo::vhost_user::Chain;

use super::{Null, Outgoing, Packet, Sent, Tap};
use crate::frame::Header;
use crate::offload::{FrameHeader, Offloads};

/// One queue pair's way to the LAN.
#[derive(Debug)]
pub enum Port {
    /// A queue of a tap.
    Tap(Tap),
    /// A share of an interface.
    Packet(Box<Packet>),
    /// Nothing is there.
    Null(Null),
}

/// Frames that the LAN had for the guest and that were lost here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Losses {
    /// The kernel had no room for them any more.
    pub(crate) missed: u64,
    /// They had something left to the receiver that neither the guest nor this program does.
    pub(crate) unusable: u64,
}

impl Port {
    /// What tells that there may be a frame for the guest; nothing does for a LAN that is not there.
    pub(crate) fn incoming(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => Some(tap.as_fd()),
            Self::Packet(packet) => packet.incoming(),
            Self::Null(_) => None,
        }
    }

    /// What tells that there is room again for what is [`Sent::Later`].
    pub(crate) fn outgoing(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => Some(tap.as_fd()),
            Self::Packet(packet) => Some(packet.outgoing()),
            Self::Null(_) => None,
        }
    }

    /// Whether there is a frame for the guest that nothing will tell of.
    pub(crate) fn has_frame(&self) -> bool {
        matches!(self, Self::Packet(packet) if packet.has_frame())
    }

    /// How long to sleep at most.
    pub(crate) fn sleep_max(&self) -> Option<Duration> {
        match self {
            Self::Packet(packet) => packet.sleep_max(),
            Self::Tap(_) | Self::Null(_) => None,
        }
    }

    /// Takes one frame that came from the LAN, with its header, into the buffers. Returns its length, header included, and
    /// cuts off what does not fit; less than a header and a frame is none; `None` when there is nothing.
    ///
    /// # Errors
    /// The tap or the interface is gone.
    ///
    /// # Safety
    /// The buffers are mapped and stay so, and no reference to them exists.
    pub(crate) unsafe fn receive(&mut self, buffers: &[libc::iovec]) -> io::Result<Option<usize>> {
        match self {
            // SAFETY: the caller's promise.
            Self::Tap(tap) => unsafe { tap.receive(buffers) },
            // SAFETY: the caller's promise.
            Self::Packet(packet) => unsafe { packet.receive(buffers) },
            Self::Null(_) => Ok(None),
        }
    }

    /// Whether a frame may come that is longer than the LAN's frames are, and than what the guest has negotiated.
    pub(crate) fn may_exceed(&self) -> bool {
        matches!(self, Self::Packet(_))
    }

    /// How far into the buffers the last call has written, where that is not the frame that it has given.
    pub(crate) fn take_touched(&mut self) -> Option<usize> {
        match self {
            Self::Packet(packet) => packet.take_touched(),
            Self::Tap(_) | Self::Null(_) => None,
        }
    }

    /// Sends what can be read of the chain as one frame, with this header.
    pub(crate) fn send(&self, header: &Header, chain: &Chain, outgoing: &mut Outgoing) -> Sent {
        match self {
            Self::Tap(tap) => tap.send(header, chain, outgoing),
            Self::Packet(packet) => packet.send(header, chain, outgoing),
            Self::Null(_) => Sent::Refused,
        }
    }

    /// Takes one frame into memory of our own, as [`Port::receive`].
    ///
    /// # Errors
    /// The tap or the interface is gone.
    pub(crate) fn read(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Self::Tap(tap) => tap.read(frame),
            Self::Packet(packet) => packet.read(frame),
            Self::Null(_) => Ok(None),
        }
    }

    /// Sends one frame that leaves nothing to anybody. Returns false when the kernel does not take it.
    pub(crate) fn write(&self, frame: &[u8]) -> bool {
        self.write_headed(FrameHeader::default(), frame)
    }

    /// The same of one that leaves something to the kernel.
    pub(crate) fn write_headed(&self, header: FrameHeader, frame: &[u8]) -> bool {
        match self {
            Self::Tap(tap) => tap.write_headed(header, frame),
            Self::Packet(packet) => packet.write_headed(header, frame),
            Self::Null(_) => false,
        }
    }

    /// The driver has chosen these offloads.
    ///
    /// # Errors
    /// The tap does not take them.
    pub(crate) fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_offloads(offloads),
            Self::Packet(packet) => {
                packet.set_offloads(offloads);
                Ok(())
            }
            Self::Null(_) => Ok(()),
        }
    }

    /// Whether frames for the guest may be given to this queue.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn set_receiving(&mut self, receiving: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_receiving(receiving),
            Self::Packet(packet) => packet.set_receiving(receiving),
            Self::Null(_) => Ok(()),
        }
    }

    /// The longest packet of the LAN without its Ethernet header, in bytes.
    pub fn mtu(&self) -> u16 {
        match self {
            Self::Tap(tap) => tap.mtu(),
            Self::Packet(packet) => packet.mtu(),
            Self::Null(_) => u16::MAX,
        }
    }

    /// What may be left to the guest and by it.
    pub fn offloads(&self) -> u64 {
        match self {
            Self::Tap(tap) => Offloads::of_linux(tap.segments_udp()),
            Self::Packet(packet) => Offloads::of_linux(packet.segments_udp()),
            Self::Null(_) => 0,
        }
    }

    /// What was lost here until now. Where the kernel drops frames before a tap, the tap's own figures say so.
    pub(crate) fn losses(&mut self) -> Losses {
        match self {
            Self::Packet(packet) => packet.losses(),
            Self::Tap(_) | Self::Null(_) => Losses::default(),
        }
    }
}
