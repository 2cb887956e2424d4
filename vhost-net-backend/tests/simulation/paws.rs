//! What a client's stack does and smoltcp does not: protection against wrapped sequence numbers (RFC 7323 §5). A segment whose
//! timestamp is older than the last is thrown away.

use std::collections::BTreeMap;

use crate::segment::{Flow, Segment};

#[derive(Default)]
pub(crate) struct Paws {
    connections: BTreeMap<Flow, Connection>,
}

#[derive(Default)]
struct Connection {
    /// TS.Recent.
    recent: Option<u32>,
    /// Last.ACK.sent.
    acked: Option<u32>,
}

fn is_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

impl Paws {
    /// Whether the client takes this frame.
    pub(crate) fn takes(&mut self, frame: &[u8]) -> bool {
        let Some(segment) = Segment::of_guest_if_whole(frame) else { return true };
        let connection = self.connections.entry(segment.flow).or_default();
        let Some((value, _)) = segment.timestamps else { return true };
        if connection.recent.is_some_and(|recent| is_before(value, recent)) {
            return segment.rst;
        }
        if connection.acked.is_none_or(|acked| !is_before(acked, segment.seq)) {
            connection.recent = Some(value);
        }
        true
    }

    /// The client has sent this frame.
    pub(crate) fn sent(&mut self, frame: &[u8]) {
        let Some(segment) = Segment::of_guest(frame) else { return };
        let flow = Flow { guest: segment.flow.remote, remote: segment.flow.guest };
        let connection = self.connections.entry(flow).or_default();
        if segment.syn {
            *connection = Connection::default();
        }
        connection.acked = segment.ack;
    }
}
