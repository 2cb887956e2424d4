//! What is on the other side of the guest's network card: a tap, or nothing, to measure.

mod null;
mod tap;

use std::io;

pub use null::Null;
pub(crate) use tap::{IOVECS_MAX, Outgoing};
pub use tap::{Tap, TapError, TapOptions};

use crate::offload::Offloads;

/// One queue pair's way to the LAN.
#[derive(Debug)]
pub enum Port {
    /// A queue of a tap.
    Tap(Tap),
    /// Nothing is there.
    Null(Null),
}

impl Port {
    /// The tap, where frames pass whole and one by one.
    pub(crate) fn tap(&self) -> Option<&Tap> {
        match self {
            Self::Tap(tap) => Some(tap),
            Self::Null(_) => None,
        }
    }

    /// The driver has chosen these offloads.
    ///
    /// # Errors
    /// The tap does not take them.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_offloads(offloads),
            Self::Null(_) => Ok(()),
        }
    }

    /// Whether frames for the guest may be given to this queue.
    ///
    /// # Errors
    /// The tap refuses.
    pub(crate) fn set_receiving(&self, receiving: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_receiving(receiving),
            Self::Null(_) => Ok(()),
        }
    }

    /// The longest packet of the LAN without its Ethernet header, in bytes.
    pub fn mtu(&self) -> u16 {
        match self {
            Self::Tap(tap) => tap.mtu(),
            Self::Null(_) => u16::MAX,
        }
    }
}
