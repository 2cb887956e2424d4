//! Two Linux TCP stacks as PVM and SVM, a third as the client, and the proxy between them: what real stacks send is
//! found to be the same without a checkpoint, and the client's connections go on when the first one dies.
//!
//! Each stack is a network namespace of one thread with a tap in it. Needs root and `ip`; skipped otherwise.

#![expect(unsafe_code, reason = "unshare of a network namespace has no safe wrapper")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use vhost_net_backend::compare::CompareStats;
use vhost_net_backend::digest::Key;
use vhost_net_backend::lan::{Tap, TapOptions};
use vhost_net_backend::offload::{FrameHeader, Offloads};
use vhost_net_backend::proxy::{Action, Actions, Buffer, Config, Primary, Secondary};

const GUEST: &str = "10.0.0.9";
const CLIENT: &str = "10.0.0.1";
const ECHO: u16 = 7;
const SOURCE: u16 = 19;
/// Where the client listens for the guest, and the guest's port for that.
const REVERSE: u16 = 7000;
const REVERSE_FROM: u16 = 7001;
const LIMIT: Duration = Duration::from_secs(20);

/// Runs `work` on a thread with a network of its own, whose only way out is the tap that is returned.
fn stack<T: Send + 'static>(
    address: &'static str,
    mac: &'static str,
    offloads: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<(Tap, JoinHandle<T>)> {
    let (made, tap) = channel();
    let thread = spawn(move || {
        // SAFETY: only this thread moves to a new network namespace, which shares nothing with others.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            drop(made);
            return None;
        }
        let ip = |arguments: &str| {
            let done = Command::new("ip").args(arguments.split(' ')).status();
            assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
        };
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let mut tap = Tap::open("eth0", TapOptions { queues: 1, headers: true }).unwrap().remove(0);
        let features = if offloads { Offloads::of_pair(u64::MAX) } else { 0 };
        tap.set_offloads(Offloads::negotiated(features)).unwrap();
        ip(&format!("link set eth0 address {mac}"));
        ip(&format!("addr add {address}/24 dev eth0"));
        made.send(tap).unwrap();
        Some(work())
    });
    let tap = tap.recv().ok()?;
    Some((tap, spawn(move || thread.join().unwrap().unwrap())))
}

/// What a guest runs: an echo, a source of bytes, and a connection that it opens itself.
fn guest() {
    let serve = |port, session: fn(TcpStream) -> std::io::Result<()>| {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                // a session ends when its client does, or with the stack
                spawn(move || drop(session(stream)));
            }
        });
    };
    serve(ECHO, echo);
    serve(SOURCE, source);
    let datagrams = UdpSocket::bind(("0.0.0.0", ECHO)).unwrap();
    spawn(move || echo_datagrams(&datagrams));
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let address = |host: &str, port| SocketAddr::new(host.parse().unwrap(), port);
    bind(&socket, &address(GUEST, REVERSE_FROM)).unwrap();
    connect(&socket, &address(CLIENT, REVERSE)).unwrap();
    drop(echo(TcpStream::from(socket)));
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 50_000];
    loop {
        let bytes = stream.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..bytes])?;
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut buffer = vec![0; 65_536];
    loop {
        let (bytes, from) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(&buffer[..bytes], from).unwrap();
    }
}

/// Sends as many bytes as the eight that it reads first say.
fn source(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    stream.write_all(&pattern(u64::from_be_bytes(bytes) as usize))
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn open(port: u16) -> TcpStream {
    let deadline = Instant::now() + LIMIT;
    loop {
        // the guest may not be listening yet
        match TcpStream::connect((GUEST, port)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                stream.set_nodelay(true).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

fn say(stream: &mut TcpStream, bytes: &[u8]) {
    let mut writer = stream.try_clone().unwrap();
    let sent = bytes.to_vec();
    let writing = spawn(move || writer.write_all(&sent).unwrap());
    let mut got = vec![0; bytes.len()];
    stream.read_exact(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == bytes, "other bytes came back");
}

/// Sends a datagram, which needs several frames, until it comes back.
fn say_in_fragments(bytes: &[u8]) {
    let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
    socket.connect((GUEST, ECHO)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let deadline = Instant::now() + LIMIT;
    let mut got = vec![0; 65_536];
    loop {
        socket.send(bytes).unwrap();
        if let Ok(count) = socket.recv(&mut got) {
            assert!(got[..count] == *bytes, "other bytes came back");
            return;
        }
        assert!(Instant::now() < deadline, "no datagram comes back");
    }
}

/// What the client does; it says when it wants the primary dead, and waits for that.
fn sequence(rounds: usize, listener: &TcpListener, kill: &Sender<()>, killed: &Receiver<()>) {
    let mut streams = vec![listener.accept().unwrap().0];
    streams[0].set_read_timeout(Some(LIMIT)).unwrap();
    for _ in 0..5 {
        streams.push(open(ECHO));
    }
    for round in 0..rounds {
        for stream in &mut streams {
            say(stream, format!("round {round}").as_bytes());
        }
    }
    say(&mut streams[1], &pattern(rounds * 15_000));
    let mut download = open(SOURCE);
    let bytes = rounds * 20_000;
    download.write_all(&(bytes as u64).to_be_bytes()).unwrap();
    let mut got = Vec::new();
    download.read_to_end(&mut got).unwrap();
    assert!(got == pattern(bytes));
    drop(download);
    for round in 0..rounds / 10 {
        say_in_fragments(&pattern(2000 + round * 500));
    }
    for _ in 0..rounds / 4 {
        say(&mut open(ECHO), b"and goodbye");
    }
    kill.send(()).unwrap();
    killed.recv().unwrap();
    let stalled = Instant::now();
    for stream in &mut streams {
        say(stream, b"after the failover");
    }
    println!("first answers after {} ms", stalled.elapsed().as_millis());
    say(&mut streams[2], &pattern(rounds * 5_000));
    say(&mut open(ECHO), b"a new one");
    say_in_fragments(&pattern(5000));
}

/// Many clients at once, who know nothing of the primary's death.
fn turmoil(kill: &Sender<()>, killed: &Receiver<()>, after: Duration) {
    let stop = Arc::new(AtomicBool::new(false));
    let (opens, opened) = channel();
    let workers: Vec<_> = (0..6)
        .map(|number| {
            let (stop, opens) = (stop.clone(), opens.clone());
            spawn(move || {
                let mut stream = open(ECHO);
                opens.send(()).unwrap();
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    match number {
                        0 | 1 => say(&mut stream, &pattern(300_000)),
                        2 | 3 => say(&mut stream, b"ping"),
                        4 => say(&mut open(ECHO), b"hello and goodbye"),
                        _ => {
                            let mut download = open(SOURCE);
                            download.write_all(&500_000u64.to_be_bytes()).unwrap();
                            let mut got = Vec::new();
                            download.read_to_end(&mut got).unwrap();
                            assert!(got == pattern(500_000));
                        }
                    }
                    done += 1;
                }
                done
            })
        })
        .collect();
    // on a busy machine a connection takes longer than some of these deaths
    (0..6).for_each(|_| opened.recv().unwrap());
    std::thread::sleep(after);
    kill.send(()).unwrap();
    killed.recv().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        assert!(worker.join().unwrap() > 0);
    }
}

/// What befalls packets.
#[derive(Clone, Copy, Debug)]
struct Weather {
    /// The SVM's output goes as digests.
    digests: bool,
    /// One of so many is lost between client and guest, in either direction.
    lost_one_of: Option<u64>,
    /// How long a frame is under way between the hosts, each way.
    link_us: u64,
    /// How long the SVM is not served at times.
    svm_naps_us: u64,
    random: u64,
}

impl Weather {
    /// xorshift: the same weather each time.
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    fn loses(&mut self) -> bool {
        self.lost_one_of.is_some_and(|of| self.below(of) == 0)
    }
}

/// The two halves and the wires between them.
struct World {
    primary: Option<Primary>,
    secondary: Secondary,
    pvm: Tap,
    svm: Tap,
    lan: Tap,
    /// To the primary or not, due when, and what.
    link: VecDeque<(bool, u64, u16, u64, Vec<u8>)>,
    /// Of the header before each frame.
    header_bytes: usize,
    /// Frames longer than the LAN's, from the PVM, the SVM and the client.
    large: [u64; 3],
    weather: Weather,
    svm_sleeps_until_us: u64,
    wanted: Vec<String>,
    actions: Actions,
    origin: Instant,
}

/// A frame that a tap has given, behind its header. Counts those that are longer than the LAN's.
fn frame_of(bytes: &[u8], header_bytes: usize, large: &mut u64) -> Buffer {
    let mut frame = Buffer::from(&bytes[header_bytes..]);
    frame.set_header(FrameHeader::read(bytes).unwrap());
    *large += u64::from(frame.len() > 1514);
    frame
}

impl World {
    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    /// Sends a frame with its header.
    fn write(&self, tap: &Tap, frame: &Buffer) {
        let header = &[&frame.header().bytes()[..], &[0; 2]].concat()[..self.header_bytes];
        tap.write(&[header, frame].concat());
    }

    fn carry_out(&mut self, of_primary: bool) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.iter() {
            match action {
                Action::ToLan(frame) => {
                    if !self.weather.loses() {
                        self.write(&self.lan, frame);
                    }
                }
                Action::ToGuest(frame) => {
                    let tap = if of_primary { &self.pvm } else { &self.svm };
                    self.write(tap, frame);
                }
                Action::ToPeer { kind, epoch, payload } => {
                    let due_us = self.now_us() + self.weather.link_us;
                    self.link.push_back((!of_primary, due_us, kind, epoch, payload.to_vec()));
                }
                Action::CheckpointWanted { cause, detail } => {
                    self.wanted.push(format!("{}: {detail}", cause.as_str()));
                }
                Action::MarkerArrived { .. } => unreachable!(),
            }
        }
        actions.clear();
        self.actions = actions;
    }

    /// One pass over everything.
    fn turn(&mut self) {
        let now_us = self.now_us();
        let mut frame = vec![0; 70_000];
        while let Ok(Some(bytes)) = self.lan.read(&mut frame) {
            if self.weather.loses() {
                continue;
            }
            let frame = frame_of(&frame[..bytes], self.header_bytes, &mut self.large[2]);
            let header = frame.header();
            match &mut self.primary {
                Some(primary) => primary.headed_lan_input(header, &frame, now_us, &mut self.actions),
                None => self.secondary.headed_lan_input(header, &frame, now_us, &mut self.actions),
            }
            self.carry_out(self.primary.is_some());
        }
        if let Some(primary) = &mut self.primary {
            while let Ok(Some(bytes)) = self.pvm.read(&mut frame) {
                let frame = frame_of(&frame[..bytes], self.header_bytes, &mut self.large[0]);
                primary.guest_output(frame, now_us, &mut self.actions);
            }
            primary.tick(now_us, &mut self.actions);
            self.carry_out(true);
        }
        if self.svm_sleeps_until_us <= now_us && self.weather.svm_naps_us > 0 && self.weather.below(50) == 0 {
            self.svm_sleeps_until_us = now_us + self.weather.below(self.weather.svm_naps_us);
        }
        while self.svm_sleeps_until_us <= now_us
            && let Ok(Some(bytes)) = self.svm.read(&mut frame)
        {
            let frame = frame_of(&frame[..bytes], self.header_bytes, &mut self.large[1]);
            self.secondary.guest_output(frame, now_us, &mut self.actions);
        }
        self.secondary.flush(&mut self.actions);
        self.secondary.tick(now_us, &mut self.actions);
        self.carry_out(false);
        self.turn_of_link();
    }

    fn turn_of_link(&mut self) {
        let now_us = self.now_us();
        while self.link.front().is_some_and(|frame| frame.1 <= now_us)
            && let Some((to_primary, _, kind, epoch, payload)) = self.link.pop_front()
        {
            if !to_primary {
                self.secondary.peer_frame(kind, epoch, &payload, now_us, &mut self.actions).unwrap();
            } else if let Some(primary) = &mut self.primary {
                primary.peer_frame(kind, epoch, &payload, now_us, &mut self.actions).unwrap();
            }
            self.carry_out(to_primary);
        }
    }

    fn wait(&self) {
        let mut fds = [&self.pvm, &self.svm, &self.lan].map(|tap| PollFd::new(tap, PollFlags::IN));
        let limit = Timespec { tv_sec: 0, tv_nsec: if self.link.is_empty() { 5_000_000 } else { 200_000 } };
        // a dead VM's tap is not looked at
        let first = usize::from(self.primary.is_none());
        poll(&mut fds[first..], Some(&limit)).unwrap();
    }
}

fn play(
    weather: Weather,
    client: impl FnOnce(&TcpListener, &Sender<()>, &Receiver<()>) + Send + 'static,
) -> Option<CompareStats> {
    Some(play_with(false, weather, client)?.0)
}

/// Plays with stacks that leave checksums and segmentation to others, or not. How many frames were large, from whom.
fn play_with(
    offloads: bool,
    weather: Weather,
    client: impl FnOnce(&TcpListener, &Sender<()>, &Receiver<()>) + Send + 'static,
) -> Option<(CompareStats, [u64; 3])> {
    let (kill, wants_kill) = channel();
    let (is_killed, killed) = channel();
    let (listens, listening) = channel();
    let client = stack(CLIENT, "02:00:00:00:00:01", offloads, move || {
        let listener = TcpListener::bind((CLIENT, REVERSE)).unwrap();
        listens.send(()).unwrap();
        client(&listener, &kill, &killed);
    });
    let Some((lan, client)) = client else {
        eprintln!("skipped: network namespaces need root");
        return None;
    };
    // the guests connect once, and both are to find it there
    listening.recv().unwrap();
    let mac = "02:00:00:00:00:09";
    let (pvm, _) = stack(GUEST, mac, offloads, guest).unwrap();
    let (svm, _) = stack(GUEST, mac, offloads, guest).unwrap();
    let mut config = Config::default();
    // a busy machine may keep one stack waiting; what waits for something that never comes waits longer still
    config.compare.held_us_max = 1_000_000;
    config.compare.patient_us_max = 1_000_000;
    let mut world = World {
        primary: Some(Primary::new(&config, 1, 0)),
        secondary: Secondary::new(&config, 1, 0),
        pvm,
        svm,
        lan,
        link: VecDeque::new(),
        header_bytes: Offloads::negotiated(if offloads { Offloads::of_pair(u64::MAX) } else { 0 })
            .header_bytes(),
        large: [0; 3],
        weather,
        svm_sleeps_until_us: 0,
        wanted: Vec::new(),
        actions: Actions::new(),
        origin: Instant::now(),
    };
    if let (true, Some(primary)) = (world.weather.digests, &mut world.primary) {
        primary.want_digests(Key::new(0x0123_4567_89ab_cdef).unwrap(), &mut world.actions);
        world.carry_out(true);
    }
    let mut compared: Option<CompareStats> = None;
    while !client.is_finished() {
        world.turn();
        assert!(world.now_us() < 60_000_000, "the client waits for something that does not come");
        assert!(world.wanted.is_empty(), "{:?}", world.wanted);
        if wants_kill.try_recv().is_ok() {
            // what the dead host had put on the wire arrives up to some point, what was for it does not
            let arrives = world.weather.below(world.link.len() as u64 + 1) as usize;
            world.link.truncate(arrives);
            world.link.retain(|frame| !frame.0);
            for frame in &mut world.link {
                frame.1 = 0;
            }
            world.turn_of_link();
            if let Some(digest) = world.secondary.stats().digest {
                println!("{digest:?}");
            }
            compared = world.primary.take().map(|primary| primary.stats().compare);
            world.secondary.take_over(world.now_us(), &mut world.actions);
            world.carry_out(false);
            is_killed.send(()).unwrap();
        }
        world.wait();
    }
    client.join().unwrap();
    assert!(world.secondary.stats().rewrite.rewritten_out > 0);
    Some((compared?, world.large))
}

const FAIR: Weather =
    Weather { digests: false, lost_one_of: None, link_us: 0, svm_naps_us: 0, random: 0x1234_5678_9abc_def1 };

#[test]
fn linux_says_the_same_twice_and_its_clients_survive() {
    for digests in [false, true] {
        let weather = Weather { digests, ..FAIR };
        let Some(compared) = play(weather, |listener, kill, killed| sequence(200, listener, kill, killed))
        else {
            return;
        };
        assert!(compared.released_by_match > 1000);
        assert_eq!(compared.digests > 500, digests, "{}", compared.digests);
    }
}

#[test]
fn a_lagging_svm_costs_time_and_no_checkpoint() {
    for digests in [false, true] {
        let weather = Weather { digests, link_us: 500, svm_naps_us: 10_000, ..FAIR };
        let Some(compared) = play(weather, |listener, kill, killed| sequence(50, listener, kill, killed))
        else {
            return;
        };
        assert!(compared.waited_us_max > 1000);
    }
}

#[test]
fn a_client_that_loses_packets_gets_them_again() {
    for digests in [false, true] {
        let weather = Weather { digests, lost_one_of: Some(50), link_us: 200, ..FAIR };
        let Some(compared) = play(weather, |listener, kill, killed| sequence(30, listener, kill, killed))
        else {
            return;
        };
        assert!(compared.released_at_once > 0, "retransmissions do not wait");
    }
}

#[test]
fn a_primary_that_dies_under_load_is_not_missed() {
    for (random, after_ms) in [(1, 20), (2, 50), (3, 100), (4, 200)] {
        for digests in [false, true] {
            let weather = Weather { digests, link_us: 300, svm_naps_us: 3000, random, ..FAIR };
            let after = Duration::from_millis(after_ms);
            if play(weather, move |_, kill, killed| turmoil(kill, killed, after)).is_none() {
                return;
            }
        }
    }
}

#[test]
fn large_frames_are_compared_and_rewritten_whole() {
    // a lost frame takes many segments with it
    for lost_one_of in [None, Some(100)] {
        let weather = Weather { link_us: 200, lost_one_of, ..FAIR };
        let Some((compared, large)) =
            play_with(true, weather, |listener, kill, killed| sequence(50, listener, kill, killed))
        else {
            return;
        };
        assert!(compared.released_by_match > 100);
        assert!(large.iter().all(|count| *count > 10), "{large:?}");
    }
}
