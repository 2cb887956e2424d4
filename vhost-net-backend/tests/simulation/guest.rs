//! A VM: a stack, its application, and the log of everything that ever went in. The copy of a VM is another one that is
//! given the same inputs at the same times, since smoltcp does nothing by chance but from its seed.

use std::collections::BTreeSet;
use std::rc::Rc;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::socket::udp;
use smoltcp::time::Duration;
use smoltcp::wire::IpEndpoint;

use crate::app::{Hash, Server, echoed};
use crate::segment::opener;
use crate::stack::{CLIENT, Frame, GUEST, Stack, datagram_socket, socket};

pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The server's port.
pub(crate) const PORT: u16 = 80;
/// The port for datagrams.
pub(crate) const DATAGRAM_PORT: u16 = 53;
/// A connection that the guest opens to port p comes from port p plus this.
pub(crate) const OPENS_FROM: u16 = 20_000;
/// Sockets that listen at the same time, so that no connection is refused.
const BACKLOG: usize = 6;

/// What both VMs have in common: it shows in their SYNs.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) rx_bytes: usize,
    pub(crate) tx_bytes: usize,
    pub(crate) timestamps: bool,
}

/// What two copies of a VM do not have in common: timing, chance, and what else the outside does not see of a state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Personality {
    /// How many numbers to take from the stack's generator, so that later initial sequence numbers differ.
    pub(crate) draws: u32,
    pub(crate) chance: u64,
    pub(crate) ack_delay_us: Option<u64>,
    pub(crate) nagle: bool,
    /// Bytes that the application writes at once.
    pub(crate) write_bytes_max: usize,
    /// How far the guest's clock jumps.
    pub(crate) clock_ms: u32,
    /// Longest segment.
    pub(crate) mss: u16,
    /// How often a connection that is idle is probed, as smoltcp does not always when its window has closed.
    pub(crate) keep_alive_us: u64,
    /// How long the application takes to end a connection.
    pub(crate) close_us: u64,
}

#[derive(Clone)]
enum Input {
    Become(Rc<Personality>),
    Frame(Frame),
    Poll(u64),
}

/// A point in a VM's life at which it can be copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    inputs: usize,
    /// Frames that the host had not taken.
    tx_frames: usize,
    said: Hash,
}

struct Session {
    handle: SocketHandle,
    server: Server,
    /// When it ends the connection.
    closes_us: Option<u64>,
}

impl Session {
    fn new(handle: SocketHandle) -> Self {
        Self { handle, server: Server::default(), closes_us: None }
    }
}

pub(crate) struct Guest {
    seed: u64,
    setup: Setup,
    log: Vec<Input>,
    stack: Stack,
    personality: Rc<Personality>,
    chance: fastrand::Rng,
    clock_ms: u32,
    listeners: Vec<SocketHandle>,
    /// SYNs that a socket has taken: who sent them, and their sequence numbers.
    heard: BTreeSet<(IpEndpoint, i32)>,
    sessions: Vec<Session>,
    datagrams: SocketHandle,
    /// The application has more to write.
    busy: bool,
    /// When it wants to end a connection.
    wakes_us: Option<u64>,
    /// Of all that the VM sent.
    said: Hash,
}

impl Guest {
    /// The first connection's initial sequence number follows from the seed.
    pub(crate) fn new(setup: &Setup, seed: u64, personality: Personality) -> Self {
        let mut guest = Self::empty(setup, seed, Rc::new(Personality { draws: 0, ..personality }));
        guest.become_another(Rc::clone(&guest.personality));
        guest
    }

    fn empty(setup: &Setup, seed: u64, personality: Rc<Personality>) -> Self {
        let mut stack = Stack::new(MAC, GUEST, seed);
        let datagrams = stack.sockets.add(datagram_socket(DATAGRAM_PORT));
        Self {
            seed,
            setup: setup.clone(),
            log: Vec::new(),
            stack,
            datagrams,
            chance: fastrand::Rng::with_seed(0),
            personality,
            clock_ms: 0,
            listeners: Vec::new(),
            heard: BTreeSet::new(),
            sessions: Vec::new(),
            busy: true,
            wakes_us: None,
            said: Hash::default(),
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot { inputs: self.log.len(), tx_frames: self.stack.card.tx.len(), said: self.said }
    }

    /// A copy of this VM as it was then, which goes on in its own way.
    pub(crate) fn copy(&self, at: Snapshot, personality: Personality) -> Self {
        let mut copy = Self::empty(&self.setup, self.seed, Rc::clone(&self.personality));
        for input in &self.log[..at.inputs] {
            copy.apply(input.clone());
            let taken = copy.stack.card.tx.len().saturating_sub(at.tx_frames);
            copy.stack.card.tx.drain(..taken);
        }
        assert_eq!(
            copy.said, at.said,
            "the copy of a VM does not do what the VM did: the simulation is at fault"
        );
        copy.become_another(Rc::new(personality));
        copy
    }

    pub(crate) fn become_another(&mut self, personality: Rc<Personality>) {
        self.apply(Input::Become(personality));
    }

    /// A frame arrives at the card.
    pub(crate) fn receive(&mut self, frame: Frame) {
        self.apply(Input::Frame(frame));
    }

    /// The VM gets the processor.
    pub(crate) fn poll(&mut self, now_us: u64) {
        self.apply(Input::Poll(now_us));
    }

    /// When it wants the processor without being woken by a frame.
    pub(crate) fn poll_at(&mut self, now_us: u64) -> Option<u64> {
        if self.busy {
            return Some(now_us);
        }
        self.stack.poll_at(now_us).into_iter().chain(self.wakes_us).min()
    }

    /// What the VM has sent and the host has not taken.
    pub(crate) fn next_output(&mut self) -> Option<Frame> {
        self.stack.card.tx.pop_front()
    }

    /// The same, which stays.
    pub(crate) fn peek_output(&self) -> Option<Frame> {
        self.stack.card.tx.front().cloned()
    }

    /// Its connections, for whoever has to find out why.
    pub(crate) fn describe(&self) -> String {
        let describe = |session: &Session| {
            let socket = self.stack.sockets.get::<Socket>(session.handle);
            let (remote, queue) = (socket.remote_endpoint(), socket.send_queue());
            format!("\n  {remote:?} {} has {queue} bytes to send, {:?}", socket.state(), session.server)
        };
        self.sessions.iter().map(describe).collect()
    }

    fn apply(&mut self, input: Input) {
        self.log.push(input.clone());
        match input {
            Input::Become(personality) => self.change(personality),
            Input::Frame(frame) => self.stack.card.rx.push_back(frame),
            Input::Poll(now_us) => self.run(now_us),
        }
    }

    fn change(&mut self, personality: Rc<Personality>) {
        for _ in 0..personality.draws {
            // to open a connection takes a number; it is forgotten before it sends anything
            let mut unused = socket(64, 64, false);
            unused.connect(self.stack.interface.context(), (CLIENT[0], 1), 1).unwrap();
        }
        self.chance = fastrand::Rng::with_seed(personality.chance);
        self.clock_ms = self.clock_ms.wrapping_add(personality.clock_ms);
        self.stack.card.mss = personality.mss;
        self.personality = personality;
        let handles =
            self.listeners.iter().copied().chain(self.sessions.iter().map(|session| session.handle));
        for handle in handles {
            behave(self.stack.sockets.get_mut(handle), &self.personality);
        }
    }

    fn run(&mut self, now_us: u64) {
        let clock_ms = self.clock_ms.wrapping_add((now_us / 1000) as u32);
        let sent_before = self.stack.card.tx.len();
        self.listen();
        for frame in std::mem::take(&mut self.stack.card.rx) {
            let Some((endpoint, number)) = opener(&frame) else {
                self.stack.card.rx.push_back(frame);
                continue;
            };
            // otherwise another socket would listen to a SYN that comes twice
            self.stack.poll(now_us, clock_ms);
            if !self.has_heard_of(endpoint) && !self.heard.contains(&(endpoint, number)) {
                self.stack.card.rx.push_back(frame);
                self.stack.poll(now_us, clock_ms);
                if self.has_heard_of(endpoint) {
                    self.heard.insert((endpoint, number));
                }
            }
        }
        self.stack.poll(now_us, clock_ms);
        self.accept();
        self.serve(now_us);
        self.stack.poll(now_us, clock_ms);
        self.sessions.retain(|session| {
            let ended = self.stack.sockets.get::<Socket>(session.handle).state() == State::Closed;
            if ended {
                self.stack.sockets.remove(session.handle);
            }
            !ended
        });
        for frame in self.stack.card.tx.iter().skip(sent_before) {
            frame.iter().for_each(|byte| self.said.add(*byte));
        }
    }

    fn answer_datagrams(&mut self) {
        let socket = self.stack.sockets.get_mut::<udp::Socket>(self.datagrams);
        while socket.can_send()
            && let Ok((question, from)) = socket.recv()
        {
            let answer: Vec<u8> = question.iter().copied().map(echoed).collect();
            // what finds no room is lost, as datagrams are
            let _ = socket.send_slice(&answer, from);
        }
    }

    fn socket(&self) -> Socket<'static> {
        let mut socket = socket(self.setup.rx_bytes, self.setup.tx_bytes, self.setup.timestamps);
        behave(&mut socket, &self.personality);
        socket
    }

    fn has_heard_of(&self, opener: IpEndpoint) -> bool {
        let handles =
            self.listeners.iter().copied().chain(self.sessions.iter().map(|session| session.handle));
        handles
            .into_iter()
            .any(|handle| self.stack.sockets.get::<Socket>(handle).remote_endpoint() == Some(opener))
    }

    fn listen(&mut self) {
        let state = |handle: &&SocketHandle| self.stack.sockets.get::<Socket>(**handle).state();
        let listening = self.listeners.iter().filter(|handle| state(handle) == State::Listen).count();
        for _ in listening..BACKLOG {
            let mut socket = self.socket();
            socket.listen(PORT).unwrap();
            self.listeners.push(self.stack.sockets.add(socket));
        }
    }

    fn accept(&mut self) {
        for handle in std::mem::take(&mut self.listeners) {
            match self.stack.sockets.get::<Socket>(handle).state() {
                State::Listen | State::SynReceived => self.listeners.push(handle),
                _ => self.sessions.push(Session::new(handle)),
            }
        }
    }

    fn serve(&mut self, now_us: u64) {
        self.busy = false;
        self.wakes_us = None;
        let mut wanted = Vec::new();
        for Session { handle, server, closes_us } in &mut self.sessions {
            let socket = self.stack.sockets.get_mut::<Socket>(*handle);
            if matches!(socket.state(), State::SynSent | State::SynReceived | State::Closed) {
                continue;
            }
            let mut room = self.personality.write_bytes_max;
            loop {
                if server.wants_input() && socket.can_recv() {
                    let mut bytes = [0; 1024];
                    let count = socket.recv_slice(&mut bytes).unwrap();
                    server.input.extend(&bytes[..count]);
                }
                wanted.extend(server.work(&mut self.chance));
                let (next, _) = server.output.as_slices();
                let next = &next[..next.len().min(room)];
                if next.is_empty() || !socket.can_send() {
                    break;
                }
                let count = socket.send_slice(next).unwrap();
                server.output.drain(..count);
                room -= count;
            }
            self.busy |= room == 0 && !server.output.is_empty() && socket.can_send();
            self.busy |= server.wants_input() && socket.can_recv();
            let client_has_ended = socket.state() == State::CloseWait && !socket.can_recv();
            if server.output.is_empty() && (server.is_closed() || client_has_ended) {
                let closes_us = *closes_us.get_or_insert(now_us + self.personality.close_us);
                if closes_us <= now_us {
                    socket.close();
                } else {
                    self.wakes_us = Some(self.wakes_us.unwrap_or(u64::MAX).min(closes_us));
                }
            }
            if server.is_aborted() {
                socket.abort();
            }
        }
        self.answer_datagrams();
        for (port, v6) in wanted {
            let mut socket = self.socket();
            let remote = (CLIENT[usize::from(v6)], port);
            socket.connect(self.stack.interface.context(), remote, port + OPENS_FROM).unwrap();
            let handle = self.stack.sockets.add(socket);
            self.sessions.push(Session::new(handle));
        }
    }
}

fn behave(socket: &mut Socket<'_>, personality: &Personality) {
    socket.set_ack_delay(personality.ack_delay_us.map(Duration::from_micros));
    socket.set_keep_alive(Some(Duration::from_micros(personality.keep_alive_us)));
    socket.set_nagle_enabled(personality.nagle);
}
