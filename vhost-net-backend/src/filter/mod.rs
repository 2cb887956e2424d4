//! QEMU's filters as input: this takes the place of QEMU's `colo-compare` object, outside of QEMU.
//!
//! The primary's filter-redirector hands over what the PVM sends, the secondary's what the SVM sends, which its
//! filter-rewriter has rewritten; what may leave goes back to the primary's QEMU. All of it travels over sockets in the
//! framing of [`Packet`]. What is asked of whoever takes checkpoints, and what it answers, is in [`Message`] and
//! `docs/control-protocol.md`.

pub mod arguments;
mod comparison;
mod control;
mod endpoint;
mod framing;
mod monitor;
mod notify;
mod outgoing;
mod serve;
mod socket;
mod syn;

pub use comparison::{Comparison, Wish};
pub use control::{FilterHandler, Order};
pub use endpoint::{Address, Endpoint};
pub use framing::{Decoder, FramingError, PACKET_BYTES_MAX, Packet, encode};
pub use notify::{Message, NotifyDecoder, NotifyError};
pub use serve::{Ends, Filter};

/// What this program is called in the greeting on its control socket.
pub const DEVICE: &str = "qemu-filter";
