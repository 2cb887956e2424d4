//! The client: connections that send commands and know, byte for byte, what must come back.

use std::collections::VecDeque;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Duration;

use crate::app::{Bytes, Command, Hash, OPENED, echoed};
use crate::datagrams::{self, Datagrams};
use crate::guest::PORT;
use crate::paws::Paws;
use crate::stack::{CLIENT, Frame, GUEST, Stack, socket};
use crate::trace;

/// How often a connection that is idle is probed: smoltcp does not probe a window that closed while it retransmitted.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

/// The maximum segment lifetime here: longer than the LAN keeps a frame. Ports are not used again before, even if a reset
/// has cut TIME-WAIT short.
const QUIET_US: u64 = 6_000_000;
const TX_BYTES: usize = 8192;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// How a connection begins.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Begin {
    /// The client opens it then.
    Opens { at_us: u64 },
    /// The guest opens it, to this port.
    Accepts { port: u16 },
}

/// What one connection is for.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) begin: Begin,
    pub(crate) v6: bool,
    pub(crate) script: VecDeque<Command>,
    /// If not empty, and if the client is the one that ended the connection, another one follows on the same ports.
    pub(crate) again: VecDeque<Command>,
    /// The client breaks the connection off when it has got so many bytes.
    pub(crate) abandons_at: Option<u64>,
    /// Commands that may be unanswered at once.
    pub(crate) pipeline: usize,
    /// The client ends first, as soon as it has sent all, and not as soon as it got all.
    pub(crate) half_close: bool,
    /// Bytes read at once, so that the window closes.
    pub(crate) read_bytes_max: usize,
    pub(crate) rx_bytes: usize,
    pub(crate) timestamps: bool,
}

/// What must come next.
#[derive(Debug)]
enum Expected {
    Bytes(u32, Bytes),
    Echo(u32, Bytes),
    Chance(u32),
    Exactly(VecDeque<u8>),
    /// The hash of all that came before it.
    Digest,
}

#[derive(Debug)]
pub(crate) struct Connection {
    name: usize,
    plan: Plan,
    handle: Option<SocketHandle>,
    to_send: VecDeque<u8>,
    /// Bytes of the command that is being sent.
    body: Option<(u32, Bytes)>,
    expected: VecDeque<Expected>,
    received: Hash,
    received_bytes: u64,
    /// The guest has been asked to break it off.
    aborts: bool,
    done: bool,
}

impl Connection {
    fn new(name: usize, plan: Plan) -> Self {
        Self {
            name,
            plan,
            handle: None,
            to_send: VecDeque::new(),
            body: None,
            expected: VecDeque::new(),
            received: Hash::default(),
            received_bytes: 0,
            aborts: false,
            done: false,
        }
    }

    /// It is done, and no other follows.
    fn is_over(&self, last: State) -> bool {
        let follows = !self.plan.again.is_empty()
            && last == State::TimeWait
            && matches!(self.plan.begin, Begin::Opens { .. });
        self.done && !follows
    }

    fn socket(&self) -> Socket<'static> {
        let mut socket = socket(self.plan.rx_bytes, TX_BYTES, self.plan.timestamps);
        socket.set_keep_alive(Some(KEEP_ALIVE));
        socket
    }

    /// Once nothing of the connection is left, the next one on the same ports begins.
    fn begin_again(&mut self, socket: &Socket<'_>, last: State, now_us: u64) {
        if self.done && !self.is_over(last) && socket.state() == State::Closed {
            *self = Self {
                plan: Plan {
                    begin: Begin::Opens { at_us: now_us + QUIET_US },
                    script: std::mem::take(&mut self.plan.again),
                    ..self.plan.clone()
                },
                ..Self::new(self.name, self.plan.clone())
            };
        }
    }

    /// The next bytes to be sent, if there are any yet.
    fn fill(&mut self) {
        while self.to_send.len() < 2048 {
            if let Some((left, bytes)) = &mut self.body {
                if *left == 0 {
                    self.body = None;
                    continue;
                }
                *left -= 1;
                let byte = bytes.next();
                self.to_send.push_back(byte);
                continue;
            }
            // what the guest has said and the client has not yet got would be lost with a connection that is broken off
            let pipeline =
                if self.plan.script.front() == Some(&Command::Abort) { 1 } else { self.plan.pipeline };
            if self.expected.len() >= pipeline {
                return;
            }
            let Some(command) = self.plan.script.pop_front() else { return };
            self.to_send.extend(command.to_bytes());
            match command {
                Command::Give { bytes, seed } => {
                    self.expected.push_back(Expected::Bytes(bytes, Bytes::of(seed)));
                }
                Command::Chance { bytes } => self.expected.push_back(Expected::Chance(bytes)),
                Command::Digest => self.expected.push_back(Expected::Digest),
                Command::Open { .. } => self.expected.push_back(Expected::Exactly([OPENED].into())),
                Command::Close => {}
                Command::Abort => self.aborts = true,
                Command::Take { bytes, seed } => {
                    let (mut sent, mut hash) = (Bytes::of(seed), Hash::default());
                    (0..bytes).for_each(|_| hash.add(sent.next()));
                    self.expected.push_back(Expected::Exactly(hash.0.to_be_bytes().into()));
                    self.body = Some((bytes, Bytes::of(seed)));
                }
                Command::Echo { bytes, seed } => {
                    self.expected.push_back(Expected::Echo(bytes, Bytes::of(seed)));
                    self.body = Some((bytes, Bytes::of(seed)));
                }
            }
        }
    }

    /// The oracle of the stream: panics unless this byte is what the application says next.
    fn check(&mut self, byte: u8) {
        if let Some(Expected::Digest) = self.expected.front() {
            let digest = self.received.0.to_be_bytes();
            self.expected[0] = Expected::Exactly(digest.into());
        }
        let (wanted, over) = match self.expected.front_mut() {
            None => {
                panic!("connection {}: byte {} came, though all is answered", self.name, self.received_bytes)
            }
            Some(Expected::Digest) => unreachable!("it has been replaced"),
            Some(Expected::Bytes(left, bytes)) => {
                *left -= 1;
                (Some(bytes.next()), *left == 0)
            }
            Some(Expected::Echo(left, bytes)) => {
                *left -= 1;
                (Some(echoed(bytes.next())), *left == 0)
            }
            Some(Expected::Chance(left)) => {
                *left -= 1;
                (None, *left == 0)
            }
            Some(Expected::Exactly(bytes)) => (bytes.pop_front(), bytes.is_empty()),
        };
        if let Some(wanted) = wanted {
            assert_eq!(byte, wanted, "connection {}: byte {} of the stream", self.name, self.received_bytes);
        }
        if over {
            self.expected.pop_front();
        }
        self.received.add(byte);
        self.received_bytes += 1;
    }

    fn has_sent_all(&self) -> bool {
        self.plan.script.is_empty() && self.body.is_none() && self.to_send.is_empty()
    }

    /// Returns whether it has more to do right now.
    fn work(&mut self, socket: &mut Socket<'_>) -> bool {
        let state = socket.state();
        if matches!(state, State::Listen | State::SynSent | State::SynReceived) {
            return false;
        }
        let mut room = self.plan.read_bytes_max;
        while room > 0 && socket.can_recv() {
            let mut bytes = [0; 512];
            let limit = room.min(bytes.len());
            let count = socket.recv_slice(&mut bytes[..limit]).unwrap();
            bytes[..count].iter().for_each(|byte| self.check(*byte));
            room -= count;
        }
        self.fill();
        while socket.can_send() && !self.to_send.is_empty() {
            let count = socket.send_slice(self.to_send.as_slices().0).unwrap();
            self.to_send.drain(..count);
            self.fill();
        }
        let all = self.has_sent_all() && self.expected.is_empty();
        let guest_has_ended =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait)
                && !socket.can_recv();
        if guest_has_ended {
            assert!(all, "connection {}: the guest ended it before its end: {self:?}", self.name);
        }
        if !self.aborts && (all || (self.plan.half_close && self.has_sent_all())) {
            socket.close();
        }
        self.done = socket.state() == State::TimeWait && !socket.can_recv();
        if self.plan.abandons_at.is_some_and(|bytes| self.received_bytes >= bytes) {
            socket.abort();
            self.done = true;
        }
        if self.done {
            trace::add(|| format!("connection {} is done", self.name));
        }
        socket.can_recv()
    }
}

/// The client's host.
pub(crate) struct Client {
    stack: Stack,
    connections: Vec<Connection>,
    states: Vec<State>,
    datagrams: Datagrams,
    paws: Paws,
    busy: bool,
}

impl Client {
    pub(crate) fn new(seed: u64, plans: Vec<Plan>, datagrams: datagrams::Plan) -> Self {
        let mut stack = Stack::new(MAC, CLIENT, seed);
        let mut connections = Vec::new();
        for (name, plan) in plans.into_iter().enumerate() {
            let mut connection = Connection::new(name, plan);
            if let Begin::Accepts { port } = connection.plan.begin {
                let mut socket = connection.socket();
                socket.listen(port).unwrap();
                connection.handle = Some(stack.sockets.add(socket));
            }
            connections.push(connection);
        }
        let states = vec![State::Listen; connections.len()];
        let datagrams = Datagrams::new(datagrams, &mut stack.sockets);
        Self { stack, connections, states, datagrams, paws: Paws::default(), busy: true }
    }

    pub(crate) fn receive(&mut self, frame: Frame) {
        if self.paws.takes(&frame) {
            self.stack.card.rx.push_back(frame);
        } else {
            trace::add(|| "  which is too old".into());
        }
    }

    pub(crate) fn next_output(&mut self) -> Option<Frame> {
        let frame = self.stack.card.tx.pop_front()?;
        self.paws.sent(&frame);
        Some(frame)
    }

    pub(crate) fn poll(&mut self, now_us: u64) {
        let clock_ms = (now_us / 1000) as u32;
        self.stack.poll(now_us, clock_ms);
        self.busy = false;
        for connection in &mut self.connections {
            let index = connection.name;
            let handle = match (connection.handle, connection.plan.begin) {
                (Some(handle), _) => handle,
                (None, Begin::Opens { at_us }) if at_us <= now_us => {
                    let mut socket = connection.socket();
                    let remote = (GUEST[usize::from(connection.plan.v6)], PORT);
                    socket.connect(self.stack.interface.context(), remote, 40_000 + index as u16).unwrap();
                    self.states[index] = State::SynSent;
                    *connection.handle.insert(self.stack.sockets.add(socket))
                }
                _ => continue,
            };
            let socket = self.stack.sockets.get_mut::<Socket>(handle);
            if connection.done {
                connection.begin_again(socket, self.states[index], now_us);
                continue;
            }
            assert!(
                socket.state() != State::Closed
                    || (connection.aborts && connection.to_send.is_empty())
                    || matches!(self.states[index], State::LastAck | State::Closing),
                "connection {index}: it was reset in {}: {connection:?}",
                self.states[index]
            );
            connection.done |= socket.state() == State::Closed;
            if !connection.done {
                self.busy |= connection.work(socket);
            }
            self.states[index] = socket.state();
        }
        self.datagrams.work(now_us, &mut self.stack.sockets);
        self.stack.poll(now_us, clock_ms);
    }

    pub(crate) fn poll_at(&mut self, now_us: u64) -> Option<u64> {
        if self.busy {
            return Some(now_us);
        }
        let opens = self.connections.iter().filter_map(|connection| match connection.plan.begin {
            Begin::Opens { at_us } if connection.handle.is_none() => Some(at_us),
            _ => None,
        });
        let datagram = self.datagrams.next_us();
        self.stack.poll_at(now_us).into_iter().chain(opens).chain(datagram).min()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.datagrams.is_done()
            && self.connections.iter().all(|connection| connection.is_over(self.states[connection.name]))
    }

    /// The connections that are not done, for whoever has to find out why.
    pub(crate) fn unfinished(&self) -> String {
        let unfinished =
            self.connections.iter().filter(|connection| !connection.is_over(self.states[connection.name]));
        unfinished.map(|connection| format!("\n  {} {connection:?}", self.states[connection.name])).collect()
    }
}
