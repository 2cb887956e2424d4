//! What is said with whoever takes the checkpoints, in the words that QEMU's `colo-compare` has for Xen: its `notify_dev`.
//!
//! In the framing of packets, without a virtio-net header. What comes in may have the field for its length all the same:
//! QEMU expects one with `vnet_hdr_support` up to version 10, though it sends none itself.

use super::framing::{Packet, encode};

/// More bytes than any message has.
const MESSAGE_BYTES_MAX: usize = 64;

const INIT: &[u8] = b"COLO_USERSPACE_PROXY_INIT";
const CHECKPOINT: &[u8] = b"COLO_CHECKPOINT";
const READY: &[u8] = b"COLO_COMPARE_GET_XEN_INIT";
const DO_CHECKPOINT: &[u8] = b"DO_CHECKPOINT";

/// What comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The other end is there and wants to hear that we are.
    Init,
    /// A checkpoint is committed, and neither VM runs yet: what is held leaves.
    Checkpoint,
    /// Something that we do not know.
    Unknown,
}

/// Appends the answer to [`Message::Init`].
pub(super) fn encode_ready(out: &mut Vec<u8>) {
    encode(Packet { header: &[], frame: READY }, false, out);
}

/// Appends the wish for a checkpoint.
pub(super) fn encode_wish(out: &mut Vec<u8>) {
    encode(Packet { header: &[], frame: DO_CHECKPOINT }, false, out);
}

/// What makes the connection worthless.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A message of {0} bytes was announced, 1 to {MESSAGE_BYTES_MAX} are possible")]
pub struct NotifyError(u32);

/// Cuts what comes in into messages.
#[derive(Debug, Default)]
pub struct NotifyDecoder {
    bytes: Vec<u8>,
}

impl NotifyDecoder {
    /// Adds what was read. All messages must have been taken out before, so that it does not grow.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if a whole one is there.
    ///
    /// # Errors
    /// The other end does not speak like this.
    pub fn next_message(&mut self) -> Result<Option<Message>, NotifyError> {
        let Some((length, mut rest)) = self.bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        if length == 0 || length as usize > MESSAGE_BYTES_MAX {
            return Err(NotifyError(length));
        }
        // no message begins with zeros
        if let Some(behind) = rest.strip_prefix(&[0; 4]) {
            rest = behind;
        }
        let Some(text) = rest.get(..length as usize) else {
            return Ok(None);
        };
        let message = match text {
            INIT => Message::Init,
            CHECKPOINT => Message::Checkpoint,
            _ => Message::Unknown,
        };
        let taken = self.bytes.len() - rest.len() + text.len();
        self.bytes.drain(..taken);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_understood_with_and_without_a_header_length_and_in_any_pieces() {
        let mut wire = Vec::new();
        for (text, header) in
            [(INIT, false), (CHECKPOINT, true), (b"COLO_NOTHING", false), (CHECKPOINT, false)]
        {
            encode(Packet { header: &[], frame: text }, header, &mut wire);
        }
        for cut in 1..wire.len() {
            let mut decoder = NotifyDecoder::default();
            let mut seen = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [Message::Init, Message::Checkpoint, Message::Unknown, Message::Checkpoint]);
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for length in [0, MESSAGE_BYTES_MAX as u32 + 1, u32::MAX] {
            let mut decoder = NotifyDecoder::default();
            decoder.push(&length.to_be_bytes());
            assert_eq!(decoder.next_message(), Err(NotifyError(length)));
        }
    }

    #[test]
    fn what_goes_out_is_what_colo_compare_sends() {
        let mut wire = Vec::new();
        encode_ready(&mut wire);
        encode_wish(&mut wire);
        assert_eq!(wire, b"\0\0\0\x19COLO_COMPARE_GET_XEN_INIT\0\0\0\x0dDO_CHECKPOINT");
    }
}
