//! The application: a server that answers commands in its byte stream. What it says is a function of the bytes that it got,
//! whatever their segmentation, except where a command asks for chance.

use std::collections::VecDeque;

pub(crate) const COMMAND_BYTES: usize = 9;
/// Answer to [`Command::Open`].
pub(crate) const OPENED: u8 = b'o';
/// Input and output that a session keeps at most, apart from the socket's.
const QUEUE_BYTES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Say so many bytes that follow from the seed.
    Give { bytes: u32, seed: u32 },
    /// Take so many bytes and say their hash.
    Take { bytes: u32, seed: u32 },
    /// Say so many bytes as they come, each changed.
    Echo { bytes: u32, seed: u32 },
    /// Say so many bytes that nobody can know: each VM says others.
    Chance { bytes: u32 },
    /// Say the hash of all that was said on this connection.
    Digest,
    /// Open a connection to this port of the client, and say so.
    Open { port: u16, v6: bool },
    /// End the connection.
    Close,
    /// Break the connection off.
    Abort,
}

impl Command {
    pub(crate) fn to_bytes(self) -> [u8; COMMAND_BYTES] {
        let (kind, first, second) = match self {
            Self::Give { bytes, seed } => (0, bytes, seed),
            Self::Take { bytes, seed } => (1, bytes, seed),
            Self::Echo { bytes, seed } => (2, bytes, seed),
            Self::Chance { bytes } => (3, bytes, 0),
            Self::Digest => (4, 0, 0),
            Self::Open { port, v6 } => (5, u32::from(port), u32::from(v6)),
            Self::Close => (6, 0, 0),
            Self::Abort => (7, 0, 0),
        };
        let mut bytes = [kind; COMMAND_BYTES];
        bytes[1..5].copy_from_slice(&first.to_be_bytes());
        bytes[5..].copy_from_slice(&second.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; COMMAND_BYTES]) -> Self {
        let number = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (first, seed) = (number(1), number(5));
        match bytes[0] {
            0 => Self::Give { bytes: first, seed },
            1 => Self::Take { bytes: first, seed },
            2 => Self::Echo { bytes: first, seed },
            3 => Self::Chance { bytes: first },
            4 => Self::Digest,
            5 => Self::Open { port: first as u16, v6: seed != 0 },
            6 => Self::Close,
            7 => Self::Abort,
            kind => panic!(
                "the guest's application got the command {kind}: its input is not what the client sent"
            ),
        }
    }
}

/// Bytes that follow from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Bytes(u32);

impl Bytes {
    pub(crate) fn of(seed: u32) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 24) as u8
    }
}

/// FNV-1a.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hash(pub u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    pub(crate) fn add(&mut self, byte: u8) {
        self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
}

/// What the echo makes of a byte.
pub(crate) fn echoed(byte: u8) -> u8 {
    byte.rotate_left(3) ^ 0x5a
}

#[derive(Debug)]
enum Work {
    Command,
    Give(u32, Bytes),
    Take(u32, Hash),
    Echo(u32),
    Chance(u32),
    Closed,
    Aborted,
}

/// One session of the server.
#[derive(Debug)]
pub(crate) struct Server {
    work: Work,
    pub(crate) input: VecDeque<u8>,
    pub(crate) output: VecDeque<u8>,
    said: Hash,
}

impl Default for Server {
    fn default() -> Self {
        Self { work: Work::Command, input: VecDeque::new(), output: VecDeque::new(), said: Hash::default() }
    }
}

impl Server {
    pub(crate) fn wants_input(&self) -> bool {
        self.input.len() < QUEUE_BYTES_MAX
    }

    /// It has asked for the end.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.work, Work::Closed)
    }

    /// It has asked for a reset.
    pub(crate) fn is_aborted(&self) -> bool {
        matches!(self.work, Work::Aborted)
    }

    fn say(&mut self, byte: u8) {
        self.said.add(byte);
        self.output.push_back(byte);
    }

    fn say_hash(&mut self, hash: Hash) {
        hash.0.to_be_bytes().into_iter().for_each(|byte| self.say(byte));
    }

    /// Works as far as its input and room for its output go. Returns a connection that it wants opened.
    pub(crate) fn work(&mut self, chance: &mut fastrand::Rng) -> Option<(u16, bool)> {
        while self.output.len() < QUEUE_BYTES_MAX {
            match &mut self.work {
                Work::Closed | Work::Aborted => return None,
                Work::Give(0, _) | Work::Echo(0) | Work::Chance(0) => self.work = Work::Command,
                Work::Take(0, hash) => {
                    let hash = *hash;
                    self.work = Work::Command;
                    self.say_hash(hash);
                }
                Work::Give(left, bytes) => {
                    *left -= 1;
                    let byte = bytes.next();
                    self.say(byte);
                }
                Work::Chance(left) => {
                    *left -= 1;
                    let byte = chance.u8(..);
                    self.say(byte);
                }
                Work::Take(left, hash) => {
                    let byte = self.input.pop_front()?;
                    *left -= 1;
                    hash.add(byte);
                }
                Work::Echo(left) => {
                    let byte = self.input.pop_front()?;
                    *left -= 1;
                    self.say(echoed(byte));
                }
                Work::Command => {
                    if self.input.len() < COMMAND_BYTES {
                        return None;
                    }
                    let mut bytes = [0; COMMAND_BYTES];
                    bytes.iter_mut().zip(self.input.drain(..COMMAND_BYTES)).for_each(|(to, byte)| *to = byte);
                    match Command::from_bytes(bytes) {
                        Command::Give { bytes, seed } => self.work = Work::Give(bytes, Bytes::of(seed)),
                        Command::Take { bytes, .. } => self.work = Work::Take(bytes, Hash::default()),
                        Command::Echo { bytes, .. } => self.work = Work::Echo(bytes),
                        Command::Chance { bytes } => self.work = Work::Chance(bytes),
                        Command::Digest => self.say_hash(self.said),
                        Command::Close => self.work = Work::Closed,
                        Command::Abort => self.work = Work::Aborted,
                        Command::Open { port, v6 } => {
                            self.say(OPENED);
                            return Some((port, v6));
                        }
                    }
                }
            }
        }
        None
    }
}
