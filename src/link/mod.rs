//! The connections between the two hosts of a protected VM: framing and the hello that opens each of them.
//!
//! Each channel (checkpoint, heartbeat, network, block) is a TCP connection of its own, so that a long page stream
//! delays neither a heartbeat nor a packet. `docs/link-protocol.md` describes the bytes.

mod frame;
mod hello;

pub use frame::{
    Decoder, FrameError, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX, encode, read_frame, write_frame,
};
pub use hello::{Channel, Hello, HelloError, PROTOCOL_VERSION, accept_hello, offer_hello};
