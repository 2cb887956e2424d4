//! One side of a protected VM: its programs, its connections to the peer, and the loop that runs them.
//!
//! `colo run` is [`run`]. A [`Side`] starts QEMU and both back ends, meets its peer, and is then primary or secondary
//! until the link is lost; the arbiter then makes it go on alone or stop.

mod alone;
mod backends;
mod connect;
mod event;
mod inbox;
pub mod operator;
mod primary;
mod secondary;
mod side;
mod status;

pub use backends::find_program;
pub use side::{End, Options, qemu_config, run};
pub use status::Status;
