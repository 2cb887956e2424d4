//! The program `colo-filter` between sockets as QEMU's filters have them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use colo::control::{self, Client, command_once};
use etherparse::PacketBuilder;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vhost_net_backend::filter::{DEVICE, Packet, encode};

const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than the program holds a packet before it asks for a checkpoint.
const A_WHILE: Duration = Duration::from_millis(400);

/// The program, and where it is reached.
struct Program {
    child: Child,
    directory: tempfile::TempDir,
    out: UnixListener,
    monitor: UnixListener,
    vnet_hdr: bool,
}

impl Program {
    /// It listens for the inputs and the notifier, and connects for its output.
    fn start(vnet_hdr: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let [out, monitor] = ["out", "qmp"].map(|name| UnixListener::bind(at(name)).unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_colo-filter"));
        let end = |name: &str, options: &str| format!("unix:{}{options}", at(name).display());
        command.args([
            "--primary-in",
            &end("primary", ",server"),
            "--secondary-in",
            &end("secondary", ",server"),
        ]);
        command.args(["--out", &end("out", ""), "--notify", &end("notify", ",server")]);
        command
            .args(["--qmp", &end("qmp", "")])
            .arg("--control-path")
            .arg(at("control"))
            .args(vnet_hdr.then_some("--vnet-hdr"));
        let child = command.spawn().unwrap();
        Self { child, directory, out, monitor, vnet_hdr }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn connect(&self, name: &str) -> End {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(self.path(name)) {
                Ok(stream) => return End::new(stream, self.vnet_hdr && name != "notify"),
                Err(error) => assert!(Instant::now() < deadline, "{name}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn accept(&self) -> End {
        End::new(self.out.accept().unwrap().0, self.vnet_hdr)
    }

    fn status(&self) -> Value {
        command_once(&self.path("control"), DEVICE, &control::Command::Status).unwrap()
    }

    fn await_status(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if holds(&status) {
                return;
            }
            assert!(Instant::now() < deadline, "no {what}: {status:#}");
        }
    }

    /// Time of a processor that it has used.
    fn used(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Our end of a connection.
struct End {
    stream: UnixStream,
    vnet_hdr: bool,
}

impl End {
    fn new(stream: UnixStream, vnet_hdr: bool) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, vnet_hdr }
    }

    fn send(&mut self, frame: &[u8]) {
        let header: &[u8] = if self.vnet_hdr { &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0] } else { &[] };
        let mut bytes = Vec::new();
        encode(Packet { header, frame }, self.vnet_hdr, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    fn number(&mut self) -> usize {
        let mut number = [0; 4];
        self.stream.read_exact(&mut number).unwrap();
        u32::from_be_bytes(number) as usize
    }

    fn receive(&mut self) -> Vec<u8> {
        let bytes = self.number();
        let header_bytes = if self.vnet_hdr { self.number() } else { 0 };
        let mut packet = vec![0; bytes];
        self.stream.read_exact(&mut packet).unwrap();
        if self.vnet_hdr {
            assert_eq!((header_bytes, packet[10]), (12, 7));
        }
        packet.split_off(header_bytes)
    }

    fn is_silent(&mut self) -> bool {
        self.stream.set_read_timeout(Some(A_WHILE)).unwrap();
        let read = self.stream.read(&mut [0; 1]);
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0))
    }
}

fn udp(data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 1])
        .ipv4([10, 0, 0, 9], [10, 0, 0, 1], 64)
        .udp(53, 4000)
        .write(&mut frame, data)
        .unwrap();
    frame
}

#[test]
fn what_differs_waits_for_the_notifiers_checkpoint() {
    for vnet_hdr in [false, true] {
        let program = Program::start(vnet_hdr);
        let [mut primary, mut secondary, mut notify] =
            ["primary", "secondary", "notify"].map(|name| program.connect(name));
        let mut out = program.accept();
        notify.send(b"COLO_USERSPACE_PROXY_INIT");
        assert_eq!(notify.receive(), b"COLO_COMPARE_GET_XEN_INIT");

        primary.send(&udp(b"same"));
        secondary.send(&udp(b"same"));
        assert_eq!(out.receive(), udp(b"same"));
        // what nobody can parse is compared whole
        primary.send(b"?");
        secondary.send(b"?");
        assert_eq!(out.receive(), b"?");

        primary.send(&udp(b"this"));
        secondary.send(&udp(b"that"));
        assert_eq!(notify.receive(), b"DO_CHECKPOINT");
        primary.send(&udp(b"more"));
        assert!(out.is_silent());
        notify.send(b"COLO_CHECKPOINT");
        assert_eq!([out.receive(), out.receive()], [udp(b"this"), udp(b"more")]);
        // and the next
        primary.send(&udp(b"these"));
        assert_eq!(notify.receive(), b"DO_CHECKPOINT");
    }
}

/// The monitor of a QEMU that the test plays.
struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Greets, and answers the questions that come first.
    fn accept(program: &Program) -> Self {
        let stream = program.monitor.accept().unwrap().0;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut monitor = Self { lines: BufReader::new(stream) };
        monitor.say(&json!({"QMP": {"version": {}, "capabilities": []}}));
        monitor.answer("qmp_capabilities", &json!({}));
        monitor.answer("query-migrate-parameters", &json!({"x-checkpoint-delay": 20_000}));
        monitor
    }

    fn say(&mut self, line: &Value) {
        self.lines.get_mut().write_all(format!("{line}\r\n").as_bytes()).unwrap();
    }

    fn event(&mut self, name: &str) {
        self.say(&json!({"event": name}));
    }

    /// Awaits a command; the answer to others is nothing.
    fn answer(&mut self, command: &str, answer: &Value) {
        loop {
            let mut line = String::new();
            self.lines.read_line(&mut line).unwrap();
            let asked: Value = serde_json::from_str(&line).unwrap();
            let wanted = asked["execute"] == command;
            let answer = if wanted { answer.clone() } else { json!({}) };
            self.say(&json!({"return": answer, "id": asked["id"]}));
            if wanted {
                return;
            }
        }
    }
}

#[test]
fn qemus_own_colo_is_asked_by_its_monitor_and_heard() {
    let program = Program::start(false);
    let (mut primary, mut out, mut monitor) =
        (program.connect("primary"), program.accept(), Monitor::accept(&program));
    primary.send(&udp(b"first"));
    monitor.answer("migrate-set-parameters", &json!({}));
    // an operator's pause
    monitor.event("STOP");
    monitor.answer("query-status", &json!({"status": "paused"}));
    monitor.event("RESUME");
    assert!(out.is_silent());
    // the wish is repeated, and comes true
    monitor.answer("migrate-set-parameters", &json!({}));
    monitor.event("STOP");
    monitor.answer("query-status", &json!({"status": "colo"}));
    assert!(out.is_silent());
    monitor.event("RESUME");
    primary.send(&udp(b"after it"));
    assert_eq!(out.receive(), udp(b"first"));
    assert!(out.is_silent());
    monitor.say(&json!({"event": "COLO_EXIT", "data": {"mode": "primary", "reason": "request"}}));
    assert_eq!(out.receive(), udp(b"after it"));
}

#[test]
fn a_controller_commits_what_was_sent_before_its_marker() {
    let program = Program::start(false);
    let (mut primary, mut out) = (program.connect("primary"), program.accept());
    let (events, heard) = std::sync::mpsc::channel();
    let mut controller = Client::connect_within(&program.path("control"), PATIENCE, move |event| {
        let _ = events.send(event);
    })
    .unwrap();
    let mut order = |command| controller.call(&command, &[], PATIENCE);
    primary.send(&udp(b"before"));
    let event = format!("{:?}", heard.recv_timeout(PATIENCE).unwrap());
    assert!(event.contains("held-too-long"), "{event}");
    assert!(order(control::Command::Marker { epoch: 1 }).is_err());
    order(control::Command::Marker { epoch: 0 }).unwrap();
    primary.send(&udp(b"behind"));
    assert!(out.is_silent());
    order(control::Command::Commit { epoch: 0 }).unwrap();
    assert_eq!(out.receive(), udp(b"before"));
    assert!(out.is_silent());
    order(control::Command::TakeOver).unwrap();
    primary.send(&udp(b"alone"));
    assert_eq!([out.receive(), out.receive()], [udp(b"behind"), udp(b"alone")]);
    order(control::Command::Silence).unwrap();
    primary.send(&udp(b"lost"));
    assert!(out.is_silent());
    assert!(order(control::Command::Link { up: true }).is_err());
}

#[test]
fn what_is_sent_behind_the_news_of_a_checkpoint_belongs_to_the_next_epoch() {
    let program = Program::start(false);
    let (mut primary, mut notify, mut out) =
        (program.connect("primary"), program.connect("notify"), program.accept());
    primary.send(&udp(b"before"));
    assert_eq!(notify.receive(), b"DO_CHECKPOINT");
    // it hears of all of it at once
    let pid = Pid::from_child(&program.child);
    kill_process(pid, Signal::STOP).unwrap();
    notify.send(b"COLO_CHECKPOINT");
    primary.send(&udp(b"behind"));
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(out.receive(), udp(b"before"));
    assert!(out.is_silent());
    assert_eq!(notify.receive(), b"DO_CHECKPOINT");
}

#[test]
fn a_malformed_stream_ends_its_connection_and_nothing_else() {
    let program = Program::start(false);
    let [mut primary, mut secondary, mut notify] =
        ["primary", "secondary", "notify"].map(|name| program.connect(name));
    let mut out = program.accept();
    primary.send(&udp(b"held"));
    assert_eq!(notify.receive(), b"DO_CHECKPOINT");
    notify.send(b"COLO_CHECKPOINT");
    assert_eq!(out.receive(), udp(b"held"));

    secondary.stream.write_all(&70_000_u32.to_be_bytes()).unwrap();
    assert!(secondary.is_closed());
    let status = program.status();
    let trouble = status["secondary_in"]["trouble"].as_str().unwrap_or_default();
    assert!(trouble.contains("70000") && trouble.contains("vnet_hdr_support"), "{status:#}");
    assert_eq!(status["secondary_in"]["malformed"], 1);
    // what it said may be lost: a checkpoint makes the two the same again
    let mut secondary = program.connect("secondary");
    assert_eq!(notify.receive(), b"DO_CHECKPOINT");
    primary.send(&udp(b"again"));
    secondary.send(&udp(b"again"));
    assert_eq!(out.receive(), udp(b"again"));

    notify.stream.write_all(&[0xff; 4]).unwrap();
    assert!(notify.is_closed());
    // the wish that it may not have got
    assert_eq!(program.connect("notify").receive(), b"DO_CHECKPOINT");
}

#[test]
fn what_may_leave_waits_for_a_way_out_and_nothing_of_it_is_lost() {
    let program = Program::start(false);
    let [mut primary, mut secondary] = ["primary", "secondary"].map(|name| program.connect(name));
    let out = program.accept();
    let frame = |number: u32| udp(&[&number.to_be_bytes()[..], &[0; 1400]].concat());
    // more than the socket takes
    for number in 0..2000 {
        primary.send(&frame(number));
        secondary.send(&frame(number));
    }
    program.await_status("comparison of all", |status| status["secondary_in"]["packets"] == 2000);
    let mut out = out;
    for number in 0..7 {
        assert_eq!(out.receive(), frame(number));
    }
    out.number();
    drop(out);
    // what the socket had taken is gone with it, as on any LAN; from there on nothing is missing
    let mut out = program.accept();
    let first = out.receive();
    let first = u32::from_be_bytes(first[42..46].try_into().unwrap());
    assert!((8..2000).contains(&first), "{first}");
    for number in first + 1..2000 {
        assert_eq!(out.receive(), frame(number));
    }
}

#[test]
fn it_sleeps_when_there_is_nothing_to_do() {
    let program = Program::start(false);
    // nobody is there; then what has ended is not read any more
    let primary = program.connect("primary");
    let out = program.accept();
    command_once(&program.path("control"), DEVICE, &control::Command::Marker { epoch: 0 }).unwrap();
    drop(primary);
    program.await_status("pause", |status| status["paused"] == true);
    let before = program.used();
    std::thread::sleep(Duration::from_millis(700));
    let used = program.used() - before;
    assert!(used <= 2, "{used} ticks of a processor");
    drop(out);
}

#[test]
fn a_socket_file_that_is_left_is_replaced_and_one_in_use_is_not() {
    let program = Program::start(false);
    drop(program.connect("primary"));
    let other = |path: &Path| {
        let end = format!("unix:{},server", path.display());
        Command::new(env!("CARGO_BIN_EXE_colo-filter"))
            .args(["--primary-in", &end, "--secondary-in", "tcp:127.0.0.1:1", "--out", "tcp:127.0.0.1:1"])
            .args(["--notify", "unix:none"])
            .output()
            .unwrap()
    };
    let refused = other(&program.path("primary"));
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("taken by a running program"));
}
