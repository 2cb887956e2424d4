//! The proxy of one VM's network: packets, orders and times in, actions out. It does no I/O and knows no clock.
//!
//! Times are microseconds of any clock that does not go back. Frames are Ethernet frames with whole checksums, without
//! a virtio-net header.

mod actions;
mod announce;
mod buffer;
mod primary;
mod secondary;

pub use actions::{Action, Actions, Cause};
pub use announce::GuestAddresses;
pub(crate) use announce::rarp_request;
pub use buffer::{Buffer, Pool};
pub use primary::{Primary, PrimaryStats};
pub use secondary::{Secondary, SecondaryStats};

use serde::Serialize;

/// What the proxy keeps within.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Limits of the primary's comparison.
    pub compare: crate::compare::Limits,
    /// Limits of the secondary's rewriter.
    pub rewrite: crate::rewrite::Limits,
    /// How single flows are treated.
    pub policy: crate::policy::Policy,
    /// Whether the secondary sends digests of what its guest sends.
    pub digest: DigestMode,
}

/// Whether the secondary sends digests of what its guest sends in place of the bytes. The primary decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DigestMode {
    /// Unless the peer is on the same host, where copying costs less
    #[default]
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

impl Config {
    /// A checkpoint is asked for when a frame is held for longer than `held_ms_max` milliseconds, or more than
    /// `held_bytes_max` bytes are held.
    pub fn holding(held_ms_max: u64, held_bytes_max: usize) -> Self {
        let mut config = Self::default();
        config.compare.held_us_max = held_ms_max.saturating_mul(1000);
        config.compare.patient_us_max = config.compare.patient_us_max.max(config.compare.held_us_max);
        config.compare.held_bytes_max = held_bytes_max;
        // the guest is slowed down only well after a checkpoint was asked for
        config.compare.held_bytes_full = config.compare.held_bytes_full.max(held_bytes_max.saturating_mul(2));
        config
    }
}

/// An order that does not fit what goes on. The controller and this side have lost each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The order names another epoch than the one that is running.
    #[error("{order} for epoch {epoch}, but epoch {running} is running")]
    Epoch {
        /// Which order.
        order: &'static str,
        /// The epoch it names.
        epoch: u64,
        /// The one that is running.
        running: u64,
    },
    /// The order makes sense only as long as the pair is one.
    #[error("{order} while {mode:?}")]
    Mode {
        /// Which order.
        order: &'static str,
        /// How things stand.
        mode: Mode,
    },
}

/// How things stand with the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The peer is there.
    Protected,
    /// The peer is lost and nothing is decided: nothing gets out.
    Detached,
    /// This side has won: everything gets out.
    Alone,
    /// This side has lost: nothing gets out, for ever.
    Silent,
}

/// How often tables are looked through for what has aged, in microseconds.
const HOUSEKEEPING_US: u64 = 1_000_000;

#[cfg(test)]
mod digest_tests;
#[cfg(test)]
mod tests;
