//! The proxy of one VM's network: packets, orders and times in, actions out. It does no I/O and knows no clock.

mod actions;

pub use actions::{Action, Actions, Cause};
