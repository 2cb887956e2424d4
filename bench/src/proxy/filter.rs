//! The wire format of QEMU's filters without vnet headers: each frame behind its length, 32 bits, big-endian.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};

/// The longest frame that QEMU takes.
const FRAME_BYTES_MAX: usize = 69_632;
const LENGTH_BYTES: usize = 4;
/// What one read may bring.
const BUFFER_BYTES: usize = 4 * FRAME_BYTES_MAX;

/// Writes what stands before a frame.
#[inline]
pub fn push_length(frame_bytes: usize, to: &mut Vec<u8>) {
    to.extend_from_slice(&(frame_bytes as u32).to_be_bytes());
}

/// Writes a frame.
#[inline]
pub fn push(frame: &[u8], to: &mut Vec<u8>) {
    push_length(frame.len(), to);
    to.extend_from_slice(frame);
}

/// What a read has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// Some bytes.
    Some,
    /// None are there now.
    Nothing,
    /// The other side has closed.
    End,
}

/// Frames that come from a socket.
#[derive(Debug)]
pub struct Incoming {
    stream: UnixStream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    /// Of a socket that does not block.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: vec![0; BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    /// Reads once.
    ///
    /// # Errors
    /// What the system says.
    #[inline]
    pub fn fill(&mut self) -> io::Result<Filled> {
        if self.start > BUFFER_BYTES / 2 || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match self.stream.read(&mut self.buffer[self.end..]) {
            Ok(0) => Ok(Filled::End),
            Ok(bytes) => {
                self.end += bytes;
                Ok(Filled::Some)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Nothing),
            Err(error) => Err(error),
        }
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// It is longer than any may be.
    #[inline]
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>> {
        let bytes = &self.buffer[self.start..self.end];
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        ensure!(length <= FRAME_BYTES_MAX, "A frame of {length} bytes");
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        self.start += LENGTH_BYTES + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn incoming() -> (UnixStream, Incoming) {
        let (writer, reader) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        (writer, Incoming::new(reader))
    }

    #[test]
    fn frames_come_whole_however_they_were_cut() {
        let (mut writer, mut incoming) = incoming();
        let frames: Vec<Vec<u8>> = (0..2000).map(|number| vec![number as u8; 40 + number]).collect();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| push(frame, &mut bytes));
        let mut came = Vec::new();
        for piece in bytes.chunks(4097) {
            writer.write_all(piece).unwrap();
            assert_eq!(incoming.fill().unwrap(), Filled::Some);
            while let Some(frame) = incoming.next_frame().unwrap() {
                came.push(frame.to_vec());
            }
        }
        assert_eq!(incoming.fill().unwrap(), Filled::Nothing);
        assert!(came == frames);
        drop(writer);
        assert_eq!(incoming.fill().unwrap(), Filled::End);
    }

    #[test]
    fn a_frame_that_is_too_long_is_an_error() {
        let (mut writer, mut incoming) = incoming();
        writer.write_all(&(FRAME_BYTES_MAX as u32 + 1).to_be_bytes()).unwrap();
        incoming.fill().unwrap();
        assert!(incoming.next_frame().is_err());
    }
}
