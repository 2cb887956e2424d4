//! The first exchange on every connection between the hosts: who is there, for which VM, for which channel.
//!
//! The primary's `colo run` connects and offers; the secondary's answers with its own hello or a refusal. After that
//! the connection belongs to its channel: those of the devices are handed to the back ends as file descriptors.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use super::frame::{FrameError, read_frame, write_frame};

/// Version of everything that is said on the links. Peers of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 2;

const HELLO: u16 = 0;
const REFUSED: u16 = 1;

/// What a connection between the hosts is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Dirty pages, device state, commit.
    Checkpoint,
    /// Signs of life.
    Heartbeat,
    /// Mirrored packets one way, the secondary's output the other; of the network card of this number.
    Network(usize),
    /// The primary's disk writes.
    Block,
}

/// What each side says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the speaker.
    pub protocol: u32,
    /// Name of the VM.
    pub vm: String,
    /// Name of the node that speaks.
    pub node: String,
    /// What the connection is for.
    pub channel: Channel,
    /// The VM's generation as the speaker knows it.
    pub generation: u64,
    /// Facts that must be equal on both sides, as name and value (disk length, RAM blocks, QEMU version).
    pub facts: Vec<(String, String)>,
}

/// Why a connection did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The peer speaks something else, or the connection broke.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The frame is sound, what it says is not.
    #[error("The peer's hello cannot be understood: {0}")]
    Malformed(String),
    /// The peer said no.
    #[error("The peer refuses: {0}")]
    Refused(String),
    /// We said no.
    #[error("{0}")]
    Mismatch(String),
}

impl Hello {
    /// What of `peer` does not fit us, as a sentence that says what to do.
    fn objection(&self, peer: &Hello) -> Option<String> {
        if self.protocol != peer.protocol {
            return Some(format!(
                "Link protocol {} on node {}, {} on node {}: install the same COLO version on both hosts",
                self.protocol, self.node, peer.protocol, peer.node
            ));
        }
        if self.vm != peer.vm {
            return Some(format!(
                "Node {} runs VM {:?}, node {} runs {:?}: give each VM its own link port in the configuration",
                self.node, self.vm, peer.node, peer.vm
            ));
        }
        if self.node == peer.node {
            return Some(format!(
                "Both sides call themselves node {:?}: start each with its own --node",
                self.node
            ));
        }
        if self.channel != peer.channel {
            return Some(format!("Channel {:?} was asked for, {:?} answers", self.channel, peer.channel));
        }
        if self.generation != peer.generation {
            return Some(format!(
                "Generation {} on node {}, {} on node {}: the side with the lower one has missed a failover and holds old data",
                self.generation, self.node, peer.generation, peer.node
            ));
        }
        for (name, ours) in &self.facts {
            match peer.facts.iter().find(|(other, _)| other == name) {
                Some((_, theirs)) if theirs == ours => {}
                theirs => {
                    return Some(format!(
                        "{name} differs: {ours} on node {}, {} on node {}; both must be the same",
                        self.node,
                        theirs.map_or("not told", |(_, value)| value),
                        peer.node
                    ));
                }
            }
        }
        None
    }
}

fn read_hello(stream: &mut impl Read) -> Result<Hello, HelloError> {
    let mut payload = Vec::new();
    let header = read_frame(stream, &mut payload)?;
    match header.kind {
        HELLO => serde_json::from_slice(&payload).map_err(|e| HelloError::Malformed(e.to_string())),
        REFUSED => Err(HelloError::Refused(String::from_utf8_lossy(&payload).into_owned())),
        kind => Err(HelloError::Malformed(format!("kind {kind} in its place"))),
    }
}

fn write_hello(stream: &mut impl Write, hello: &Hello) -> Result<(), HelloError> {
    let json = serde_json::to_vec(hello).map_err(|e| HelloError::Malformed(e.to_string()))?;
    write_frame(stream, HELLO, 0, &[&json]).map_err(FrameError::from)?;
    Ok(())
}

/// The connecting side: says `ours` and returns the peer's answer. Set a read timeout on the stream before.
///
/// # Errors
/// The peer refuses, does not fit, or does not speak the protocol.
pub fn offer_hello<S: Read + Write>(stream: &mut S, ours: &Hello) -> Result<Hello, HelloError> {
    write_hello(stream, ours)?;
    let theirs = read_hello(stream)?;
    match ours.objection(&theirs) {
        None => Ok(theirs),
        Some(objection) => Err(HelloError::Mismatch(objection)),
    }
}

/// The listening side: reads the peer's hello, answers with what `ours` makes for that channel, or refuses.
/// Set a read timeout on the stream before.
///
/// # Errors
/// The peer does not fit (it has been told why) or does not speak the protocol.
pub fn accept_hello<S: Read + Write>(
    stream: &mut S,
    ours: impl FnOnce(Channel) -> Hello,
) -> Result<Hello, HelloError> {
    let theirs = read_hello(stream)?;
    let ours = ours(theirs.channel);
    if let Some(objection) = ours.objection(&theirs) {
        write_frame(stream, REFUSED, 0, &[objection.as_bytes()]).map_err(FrameError::from)?;
        return Err(HelloError::Mismatch(objection));
    }
    write_hello(stream, &ours)?;
    Ok(theirs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn hello(node: &str) -> Hello {
        Hello {
            protocol: PROTOCOL_VERSION,
            vm: "vm".into(),
            node: node.into(),
            channel: Channel::Block,
            generation: 3,
            facts: vec![("disk length".into(), "4096".into())],
        }
    }

    fn meet(a: &Hello, b: Hello) -> (Result<Hello, HelloError>, Result<Hello, HelloError>) {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let accepting = scope.spawn(move || accept_hello(&mut right, |_| b));
            let offered = offer_hello(&mut left, a);
            (offered, accepting.join().unwrap())
        })
    }

    #[test]
    fn peers_that_fit_learn_of_each_other() {
        let (offered, accepted) = meet(&hello("a"), hello("b"));
        assert_eq!(offered.unwrap().node, "b");
        assert_eq!(accepted.unwrap().node, "a");
    }

    #[test]
    fn each_difference_is_named_on_both_sides() {
        type Change = fn(&mut Hello);
        let cases: [(Change, &str); 5] = [
            (|h| h.protocol = 9, "same COLO version"),
            (|h| h.vm = "other".into(), "own link port"),
            (|h| h.node = "a".into(), "own --node"),
            (|h| h.generation = 2, "missed a failover"),
            (|h| h.facts[0].1 = "8192".into(), "disk length differs"),
        ];
        for (change, sentence) in cases {
            let mut other = hello("b");
            change(&mut other);
            let (offered, accepted) = meet(&hello("a"), other);
            let offered = offered.unwrap_err().to_string();
            assert!(offered.contains(sentence), "{offered}");
            let accepted = accepted.unwrap_err().to_string();
            assert!(accepted.contains(sentence), "{accepted}");
        }
    }

    #[test]
    fn nonsense_is_an_error() {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        left.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").unwrap();
        let error = accept_hello(&mut right, |_| hello("b")).unwrap_err();
        assert!(error.to_string().contains("does not speak the COLO link"), "{error}");
    }
}
