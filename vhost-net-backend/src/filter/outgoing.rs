//! What waits to be sent on a connection, and what of it is sent again on the next one: a packet of which only a part was
//! sent has not arrived.

use std::io::{self, Write};

/// What was sent is given up in steps of so many bytes.
const SENT_BYTES_MAX: usize = 1 << 20;

/// Framed packets that wait.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Begins with a packet.
    bytes: Vec<u8>,
    sent: usize,
    /// Bytes in front of a packet: its length, and perhaps its header's.
    prefix_bytes: usize,
}

impl Outgoing {
    pub(super) fn new(vnet_hdr: bool) -> Self {
        Self { bytes: Vec::new(), sent: 0, prefix_bytes: if vnet_hdr { 8 } else { 4 } }
    }

    /// Gives up all that waits.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    /// Where to append whole packets.
    pub(super) fn queue(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Sends as much as the connection takes.
    ///
    /// # Errors
    /// The connection is gone.
    pub(super) fn send(&mut self, stream: &mut impl Write) -> io::Result<()> {
        while self.sent < self.bytes.len() {
            match stream.write(&self.bytes[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > SENT_BYTES_MAX {
            self.forget_sent();
        }
        Ok(())
    }

    /// The connection has ended: the next one begins with the packet that was not sent whole.
    pub(super) fn rewind(&mut self) {
        self.forget_sent();
        self.sent = 0;
    }

    /// Gives up the packets that were sent whole.
    fn forget_sent(&mut self) {
        let mut whole = 0;
        while let Some(length) = self.bytes.get(whole..).and_then(|rest| rest.first_chunk::<4>()) {
            let next = whole + self.prefix_bytes + u32::from_be_bytes(*length) as usize;
            if next > self.sent {
                break;
            }
            whole = next;
        }
        self.bytes.drain(..whole);
        self.sent -= whole;
    }
}

#[cfg(test)]
mod tests {
    use super::super::framing::{Decoder, Packet, encode};
    use super::*;

    /// Takes so many bytes and then no more.
    struct Narrow(usize, Vec<u8>);

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0).min(70_000);
            self.0 -= taken;
            self.1.extend_from_slice(&bytes[..taken]);
            if taken == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_packet_that_was_sent_in_part_is_sent_again_whole_and_no_other() {
        for vnet_hdr in [false, true] {
            let header: &[u8] = if vnet_hdr { &[0; 12] } else { &[] };
            let mut outgoing = Outgoing::new(vnet_hdr);
            for number in 0..40_u8 {
                encode(Packet { header, frame: &vec![number; 50_000] }, vnet_hdr, outgoing.queue());
            }
            let mut next = 0;
            for room in [0, 3, 4, 50_003, 120_000, 1_300_000, 50_020, usize::MAX] {
                let mut stream = Narrow(room, Vec::new());
                outgoing.send(&mut stream).unwrap();
                outgoing.rewind();
                let mut decoder = Decoder::new(vnet_hdr);
                let mut left = &stream.1[..];
                while !left.is_empty() {
                    decoder.fill(&mut left).unwrap();
                    while let Some(packet) = decoder.next_packet().unwrap() {
                        assert_eq!(packet.frame, vec![next; 50_000]);
                        next += 1;
                    }
                }
            }
            assert_eq!((next, outgoing.len()), (40, 0));
        }
    }
}
