//! What can be wrong with a way to the LAN.

use std::io;

/// Why a way to the LAN cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LanError {
    /// Linux allows 15 bytes.
    #[error("{0:?} is no name for an interface: 1 to 15 bytes, no slash, no space")]
    Name(String),
    /// No tun driver, or no right to it.
    #[error("/dev/net/tun cannot be opened: {0}; load the module tun, or run as a user who may use it")]
    Device(io::Error),
    /// What was handed over is none.
    #[error("Descriptor {number} is no tap: {error}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What the system says.
        error: io::Error,
    },
    /// Somebody else has it, or it is something else.
    #[error("Tap {name} cannot be opened: {error}{hint}")]
    Open {
        /// The interface.
        name: String,
        /// What the system says.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// It cannot be brought up.
    #[error("Interface {name} is down and cannot be brought up: {error}; say `ip link set {name} up`")]
    Up {
        /// The interface.
        name: String,
        /// What the system says.
        error: io::Error,
    },
    /// This process may not, or something was wrong with an interface.
    #[error("Interface {name} cannot be used: {error}{hint}")]
    Interface {
        /// The interface.
        name: String,
        /// What the system says.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
}
