//! One vring as the frontend describes it, message by message.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserVringAddr, VhostUserVringAddrFlags};

/// Where the driver's kicks come from. A ring is started by `SET_VRING_KICK` and stopped by `GET_VRING_BASE`.
#[derive(Clone, Debug, Default)]
pub(super) enum Kick {
    /// Not started.
    #[default]
    Stopped,
    /// Nobody kicks, the ring is to be polled.
    Polled,
    /// Kicked through this.
    Eventfd(Arc<OwnedFd>),
}

/// Where the parts of a ring are, in the frontend's address space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// VHOST_VRING_F_LOG: writes to the used ring are to be logged.
    pub(super) log: bool,
}

impl From<VhostUserVringAddr> for Addresses {
    fn from(message: VhostUserVringAddr) -> Self {
        Self {
            descriptors: message.descriptor,
            available: message.available,
            used: message.used,
            log: message.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0,
        }
    }
}

/// What is known of one vring so far.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) size: Option<u16>,
    pub(super) addresses: Option<Addresses>,
    pub(super) next_available: u16,
    pub(super) kick: Kick,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) error: Option<Arc<OwnedFd>>,
    /// `SET_VRING_ENABLE`, which QEMU's network frontend sends before `SET_FEATURES`.
    pub(super) enabled: Option<bool>,
    /// The device has it.
    pub(super) running: bool,
}

impl Vring {
    /// Whether it is started and enabled. Without VHOST_USER_F_PROTOCOL_FEATURES a ring is enabled from the start.
    pub(super) fn wanted(&self, protocol_features: bool) -> bool {
        !matches!(self.kick, Kick::Stopped) && self.enabled.unwrap_or(!protocol_features)
    }
}
