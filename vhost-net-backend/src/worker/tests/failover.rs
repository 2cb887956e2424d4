//! Both halves of a pair with guests that speak TCP, each with numbers of its own, and a client that must not notice.

use std::collections::HashMap;

use super::*;
use crate::packet::{Flags, FlowKey, Kind, Packet};
use crate::test_frames::{CLIENT_PORT, GUEST_PORT, Seen, Tcp, arp, read};

/// How long one side is listened to before the other gets its turn.
const TURN: Duration = Duration::from_millis(1);

/// One end of a connection.
#[derive(Clone, Debug, Default)]
struct Socket {
    /// The next that is expected.
    received: u32,
    /// Acknowledged by the other end.
    acked: u32,
    /// Everything sent from the SYN on; the SYN is one byte.
    sent: Vec<u8>,
    isn: u32,
}

impl Socket {
    fn next(&self) -> u32 {
        self.isn.wrapping_add(self.sent.len() as u32)
    }
}

/// A guest that sends back what it gets.
#[derive(Clone, Debug)]
struct Guest {
    sockets: HashMap<u16, Socket>,
    /// Added to each initial sequence number: two guests that took different paths.
    drift: u32,
    segment_bytes: usize,
}

impl Guest {
    fn new(drift: u32, segment_bytes: usize) -> Self {
        Self { sockets: HashMap::new(), drift, segment_bytes }
    }

    fn isn(&self, port: u16) -> u32 {
        0xffff_ff00u32.wrapping_add(u32::from(port)).wrapping_add(self.drift)
    }

    /// Opens a connection itself.
    fn connect(&mut self, port: u16) -> Vec<Vec<u8>> {
        let isn = self.isn(port);
        self.sockets.insert(port, Socket { isn, sent: vec![0], acked: isn, ..Socket::default() });
        vec![segment(port, isn, None, true, b"")]
    }

    fn takes(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let Some(FlowKey::Ip { transport: crate::packet::Transport::Tcp { remote_port, .. }, .. }) =
            Packet::parse(frame).tcp_flow_to_guest()
        else {
            return Vec::new();
        };
        let port = remote_port - CLIENT_PORT;
        let seen = read(frame);
        let isn = self.isn(port);
        if seen.syn && seen.ack.is_none() && !self.sockets.contains_key(&port) {
            let received = seen.seq.wrapping_add(1);
            self.sockets.insert(port, Socket { received, acked: isn, sent: vec![0], isn });
            return vec![segment(port, isn, Some(received), true, b"")];
        }
        let Some(socket) = self.sockets.get_mut(&port) else {
            panic!("a single host would have reset this: {seen:?}");
        };
        if seen.syn && seen.ack.is_some() && socket.received == 0 {
            socket.received = seen.seq.wrapping_add(1);
        }
        let ack = seen.ack.unwrap_or(socket.acked);
        let acked = ack.wrapping_sub(socket.isn) as usize;
        assert!(acked <= socket.sent.len(), "an acknowledgment of what was never sent: {seen:?}, {socket:?}");
        socket.acked = ack;
        let mut from = socket.sent.len();
        if seen.seq == socket.received && !seen.data.is_empty() {
            socket.received = socket.received.wrapping_add(seen.data.len() as u32);
            socket.sent.extend(&seen.data);
        } else if !seen.data.is_empty() {
            // the client has heard nothing: send again what it has not acknowledged
            from = acked;
        }
        let mut out = Vec::new();
        for piece in socket.sent[from..].chunks(self.segment_bytes) {
            let seq = socket.isn.wrapping_add(from as u32);
            out.push(segment(port, seq, Some(socket.received), false, piece));
            from += piece.len();
        }
        if out.is_empty() && (seen.syn || !seen.data.is_empty()) {
            out.push(segment(port, socket.next(), Some(socket.received), false, b""));
        }
        out
    }
}

fn segment(port: u16, seq: u32, ack: Option<u32>, syn: bool, data: &[u8]) -> Vec<u8> {
    Tcp { client_port_offset: port, seq, ack, syn, data, window: 9999, ..Tcp::default() }.frame()
}

/// The client's end of a connection: it believes nothing that a single host would not have sent.
struct Client {
    port: u16,
    socket: Socket,
    /// What came back.
    got: Vec<u8>,
}

const CLIENT_ISN: u32 = 0x7fff_fff0;

impl Client {
    fn new(port: u16) -> Self {
        let socket = Socket { isn: CLIENT_ISN, acked: CLIENT_ISN, sent: vec![0], ..Socket::default() };
        Self { port, socket, got: Vec::new() }
    }

    fn frame(&self, seq: u32, syn: bool, data: &[u8]) -> Vec<u8> {
        let ack = (self.socket.received != 0).then_some(self.socket.received);
        let port = self.port;
        Tcp {
            from_client: true,
            client_port_offset: port,
            seq,
            ack,
            syn,
            data,
            window: 9999,
            ..Tcp::default()
        }
        .frame()
    }

    /// All that is not acknowledged, again or for the first time.
    fn sends(&self) -> Vec<u8> {
        let from = self.socket.acked.wrapping_sub(self.socket.isn) as usize;
        if from == 0 {
            return self.frame(self.socket.isn, true, b"");
        }
        self.frame(self.socket.acked, false, &self.socket.sent[from..])
    }

    /// Whether everything is acknowledged and has come back.
    fn is_content(&self) -> bool {
        self.socket.acked == self.socket.next() && self.got == self.socket.sent[1..]
    }

    fn says(&mut self, data: &[u8]) {
        self.socket.sent.extend(data);
    }

    fn takes(&mut self, seen: &Seen) -> Option<Vec<u8>> {
        assert!(!seen.rst, "the connection was reset");
        if seen.syn {
            let next = seen.seq.wrapping_add(1);
            assert!(self.socket.received == 0 || self.socket.received == next, "another SYN");
            self.socket.received = next;
            if let Some(ack) = seen.ack {
                self.socket.acked = ack;
                return Some(self.frame(ack, false, b""));
            }
            return Some(self.frame(CLIENT_ISN, true, b""));
        }
        let ack = seen.ack.unwrap();
        let acked = ack.wrapping_sub(self.socket.isn);
        assert!(acked as usize <= self.socket.sent.len(), "an acknowledgment of what was never sent");
        if acked > self.socket.acked.wrapping_sub(self.socket.isn) {
            self.socket.acked = ack;
        }
        let new = self.socket.received.wrapping_sub(seen.seq) as usize;
        if let Some(data) = seen.data.get(new..).filter(|data| !data.is_empty()) {
            self.got.extend(data);
            self.socket.received = self.socket.received.wrapping_add(data.len() as u32);
            return Some(self.frame(self.socket.acked, false, b""));
        }
        None
    }
}

/// One host: a back end and the guest behind it.
struct Host {
    bench: Bench,
    guest: Guest,
}

impl Host {
    fn new(mut bench: Bench, role: Role, link: &UnixStream, guest: Guest) -> Self {
        bench.attach_to(role, link);
        bench.start_rings([0, 0]);
        for _ in 0..SIZE {
            bench.offer_buffer();
        }
        Self { bench, guest }
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        for frame in frames {
            self.bench.guest_sends(frame);
            assert!(self.bench.queues[TX].used(LIMIT).is_some());
        }
    }

    /// What is in the guest's ring, whose buffers it offers again.
    fn receives(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| {
            let frame = self.bench.guest_receives(TURN)?;
            self.bench.offer_buffer();
            Some(frame)
        })
        .collect()
    }

    fn answers(&mut self, frames: &[Vec<u8>]) {
        for frame in frames {
            let answers = self.guest.takes(frame);
            self.send(&answers);
        }
    }

    fn turn(&mut self) {
        let frames = self.receives();
        self.answers(&frames);
    }
}

struct World {
    a: Option<Host>,
    b: Host,
    clients: Vec<Client>,
    /// Frames on the LAN that are no TCP.
    others: Vec<Vec<u8>>,
}

impl World {
    fn new() -> Self {
        Self::with(|| Bench::start(true), [100, 33])
    }

    /// With such back ends, and guests that send no more at once.
    fn with(bench: impl Fn() -> Bench, segment_bytes: [usize; 2]) -> Self {
        let (to_b, to_a) = UnixStream::pair().unwrap();
        let mut a = Host::new(bench(), Role::Primary, &to_b, Guest::new(0, segment_bytes[0]));
        let mut b = Host::new(bench(), Role::Secondary, &to_a, Guest::new(0x1234_5678, segment_bytes[1]));
        for host in [&mut a, &mut b] {
            host.send(&[arp(1)]);
        }
        assert_eq!(a.bench.lan_receives(LIMIT), Some(arp(1)));
        Self { a: Some(a), b, clients: Vec::new(), others: Vec::new() }
    }

    fn lan(&self) -> &Bench {
        self.a.as_ref().map_or(&self.b.bench, |a| &a.bench)
    }

    /// Moves frames until every client has back what it said.
    fn settle(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while !self.clients.iter().all(Client::is_content) {
            assert!(Instant::now() < deadline, "no answer");
            for host in self.a.iter_mut().chain([&mut self.b]) {
                host.turn();
            }
            while let Some(frame) = self.lan().lan_receives(TURN) {
                let packet = Packet::parse(&frame);
                let Kind::Tcp { segment, .. } = &packet.kind else {
                    self.others.push(frame);
                    continue;
                };
                assert_eq!(segment.source_port, GUEST_PORT);
                let port = segment.destination_port - CLIENT_PORT;
                if segment.flags.has(Flags::SYN) && !segment.flags.has(Flags::ACK) {
                    self.clients.push(Client::new(port));
                }
                let client = self.clients.iter_mut().find(|client| client.port == port).unwrap();
                if let Some(answer) = client.takes(&read(&frame)) {
                    self.lan().lan_sends(&answer);
                }
            }
        }
    }

    fn client_opens(&mut self, port: u16) {
        self.clients.push(Client::new(port));
        self.lan().lan_sends(&self.clients.last().unwrap().sends());
        self.settle();
    }

    fn guest_opens(&mut self, port: u16) {
        for host in self.a.iter_mut().chain([&mut self.b]) {
            let frames = host.guest.connect(port);
            host.send(&frames);
        }
        let count = self.clients.len();
        let deadline = Instant::now() + LIMIT;
        while self.clients.len() == count {
            assert!(Instant::now() < deadline, "no SYN");
            let Some(frame) = self.lan().lan_receives(LIMIT) else { panic!("no SYN") };
            let mut client = Client::new(port);
            let answer = client.takes(&read(&frame)).unwrap();
            self.clients.push(client);
            self.lan().lan_sends(&answer);
        }
        self.settle();
    }

    fn everyone_says(&mut self, data: &[u8]) {
        for client in &mut self.clients {
            client.says(data);
        }
        for client in &self.clients {
            self.lan().lan_sends(&client.sends());
        }
    }

    fn checkpoint(&mut self, epoch: u64) {
        let Self { a: Some(a), b, .. } = self else {
            unreachable!();
        };
        let next = a.bench.stop_rings();
        a.bench.call(&Command::Marker { epoch }).unwrap();
        assert_eq!(b.bench.event(), Event::Marker { epoch });
        let next_b = b.bench.stop_rings();
        // the SVM's RAM becomes the PVM's: what it had not looked at is gone, and what the PVM had not is there twice
        b.receives();
        let pending = a.receives();
        b.guest = Guest { drift: b.guest.drift, segment_bytes: b.guest.segment_bytes, ..a.guest.clone() };
        b.bench.call(&Command::Commit { epoch }).unwrap();
        b.bench.start_rings(next_b);
        a.bench.call(&Command::Commit { epoch }).unwrap();
        a.bench.start_rings(next);
        for host in [a, b] {
            host.answers(&pending);
        }
    }

    /// Everything on host a dies.
    fn kill_a(&mut self) {
        let mut a = self.a.take().unwrap();
        a.bench.call(&Command::Silence).unwrap();
        while !matches!(self.b.bench.event(), Event::LinkLost { .. }) {}
        self.b.bench.call(&Command::TakeOver).unwrap();
        // the client's timer fires: nothing may be lost for ever
        for client in &self.clients {
            self.lan().lan_sends(&client.sends());
        }
    }
}

#[test]
fn connections_opened_before_and_after_a_checkpoint_survive_the_primary() {
    let mut world = World::new();
    world.client_opens(0);
    world.everyone_says(b"in the first epoch");
    world.settle();
    world.checkpoint(1);
    world.client_opens(1);
    world.guest_opens(2);
    world.everyone_says(&[7; 400]);
    world.settle();
    world.kill_a();
    world.everyone_says(b"after the failover");
    world.settle();
    world.client_opens(3);
    world.everyone_says(b"as if nothing had been");
    world.settle();
    // the LAN was told where the guest is: by reverse ARP and by ARP
    let ethertypes: Vec<_> = world.others.iter().map(|frame| [frame[12], frame[13]]).collect();
    assert!(ethertypes.starts_with(&[[0x80, 0x35], [8, 6]]), "{ethertypes:02x?}");
}

#[test]
fn digests_change_nothing_for_the_client() {
    for segment_bytes in [[1000, 700], [700, 1000], [1300, 1300]] {
        let mut world = World::with(Bench::start_digesting, segment_bytes);
        world.client_opens(0);
        world.guest_opens(1);
        for epoch in 1..4 {
            for part in 0..5 {
                world.everyone_says(&[16 * epoch as u8 + part; 1400]);
                world.settle();
            }
            world.checkpoint(epoch);
            world.client_opens(1 + epoch as u16);
        }
        let told = world.b.bench.status("/pair/proxy/digest");
        // how many bytes had to be asked for is a matter of this machine's time
        assert!(told["digests"].as_u64() > Some(40) && told["answered"] == told["asked"], "{told}");
        world.kill_a();
        world.everyone_says(&[9; 1400]);
        world.settle();
    }
}

#[test]
fn what_was_never_released_is_said_by_the_survivor() {
    let mut world = World::new();
    world.client_opens(0);
    world.everyone_says(b"heard by both");
    world.settle();
    // the client's words reach both guests, and no answer leaves: the SVM's does not arrive
    world.everyone_says(b"answered by nobody yet");
    let a = world.a.as_mut().unwrap();
    let frame = a.bench.guest_receives(LIMIT).unwrap();
    let answers = a.guest.takes(&frame);
    a.send(&answers);
    assert_eq!(a.bench.lan_receives(MOMENT), None);
    world.kill_a();
    world.settle();
    world.everyone_says(b"and on");
    world.settle();
}

#[test]
fn a_checkpoint_in_the_middle_of_an_answer_costs_the_client_nothing() {
    let mut world = World::new();
    world.client_opens(0);
    for epoch in 1..10 {
        world.everyone_says(&[epoch as u8; 250]);
        let a = world.a.as_mut().unwrap();
        let frame = a.bench.guest_receives(LIMIT).unwrap();
        a.bench.offer_buffer();
        let answers = a.guest.takes(&frame);
        a.send(&answers);
        assert_eq!(a.bench.lan_receives(TURN), None, "held: the SVM has not said it");
        world.checkpoint(epoch);
        world.settle();
    }
    world.kill_a();
    world.everyone_says(b"still there");
    world.settle();
}
