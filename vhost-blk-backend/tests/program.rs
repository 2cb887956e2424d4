//! The program: what it inherits, what it is told while it runs, how it refuses.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-blk-backend");
const LIMIT: Duration = Duration::from_secs(20);

/// Ends with the value.
struct Running(Child);

impl Running {
    /// Starts the program with `socket` as its descriptor 3.
    fn with(socket: impl Into<OwnedFd>, arguments: &[&str]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@" 3<&0 </dev/null"#, PROGRAM]).args(arguments);
        command.stdin(Stdio::from(socket.into())).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn ended_well(mut self) -> bool {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the program does not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// It has to end with one line on stderr that says all of `words`.
fn refuses(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    let errors: Vec<_> = said.lines().filter(|line| line.starts_with("vhost-blk-backend: ")).collect();
    assert!(errors.len() == 1 && said.lines().last() == Some(errors[0]), "{arguments:?}: {said}");
    assert!(words.iter().all(|word| errors[0].contains(word)), "{arguments:?}: {said}");
}

/// GET_FEATURES, and whether VIRTIO_F_VERSION_1 is in the answer.
fn answers(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let message = [1u32, 1, 0].map(u32::to_le_bytes).concat(); // request, version, no payload
    stream.write_all(&message).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    let features = u64::from_le_bytes(reply[12..].try_into().unwrap());
    reply[..4] == 1u32.to_le_bytes() && features & 1 << 32 != 0
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn capabilities_are_printed_whatever_else_is_given() {
    for more in [&[][..], &["--nonsense", "--queues", "x"], &["--blk-file", "/nonexistent"]] {
        let output = run(&[more, &["--print-capabilities"]].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let capabilities: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(capabilities["type"], "block");
        assert_eq!(capabilities["features"], serde_json::json!(["read-only", "blk-file"]));
    }
}

#[test]
fn an_inherited_connection_is_served_until_it_ends() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let running = Running::with(theirs, &["--fd", "3", "--null", "1M"]);
    assert!(answers(&mut ours));
    drop(ours);
    assert!(running.ended_well());
}

#[test]
fn a_connection_that_brings_nonsense_is_a_failure() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let running = Running::with(theirs, &["--fd", "3", "--null", "1M"]);
    ours.write_all(&[0xff; 64]).unwrap();
    assert!(!running.ended_well());
}

#[test]
fn an_inherited_listening_socket_is_served_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let _running = Running::with(listener, &["--fd", "3", "--null", "1M"]);
    for _ in 0..3 {
        assert!(answers(&mut UnixStream::connect(&path).unwrap()));
    }
}

#[test]
fn a_running_back_end_is_resized_and_tells_its_figures() {
    let directory = tempfile::tempdir().unwrap();
    let [disk, socket, control] = ["disk", "socket", "control"].map(|name| directory.path().join(name));
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let listener = UnixListener::bind(&control).unwrap();
    let serve = ["--control-fd", "3", "--blk-file", text(&disk), "--socket-path", text(&socket)];
    let _running = Running::with(listener, &serve);
    let order = |arguments: &[&str]| {
        let output = run(&[arguments, &["--control-path", text(&control)]].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(order(&["resize", "3M"]), "3145728\n");
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 3 << 20);
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(4 << 20).unwrap();
    assert_eq!(order(&["resize"]), "4194304\n");
    let status: Value = serde_json::from_str(&order(&["status"])).unwrap();
    assert_eq!((&status["disk_bytes"], &status["role"]), (&(4u64 << 20).into(), &"alone".into()));
    refuses(&["resize", "--control-path", text(&control), "1M"], &["only enlarged", text(&disk)]);
    refuses(&["resize", "--control-path", text(&control), "5000000"], &["multiple of 512"]);
    let busy = UnixStream::connect(&control).unwrap();
    refuses(&["status", "--control-path", text(&control)], &["another controller"]);
    drop(busy);
    order(&["status"]);
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let [socket, disk] = ["socket", "disk"].map(|name| directory.path().join(name));
    std::fs::File::create(&disk).unwrap().set_len(4096 + 512).unwrap();
    let socket = text(&socket);
    refuses(&["--fd", "99999", "--null", "1M"], &["--fd", "Descriptor 99999", "not open"]);
    refuses(&["--fd", "0", "--null", "1M"], &["--fd", "standard"]);
    refuses(&["--socket-path", socket, "--null", "1000"], &["null", "multiple of 512"]);
    refuses(
        &["--socket-path", socket, "--blk-file", text(&disk), "--block-size", "4096"],
        &[text(&disk), "4608 bytes", "multiple of 4096"],
    );
    let memory = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
    memory.as_file().set_len(4096).unwrap();
    refuses(
        &["--socket-path", socket, "--blk-file", text(memory.path()), "--direct", "on"],
        &["in memory", "--direct auto"],
    );
    refuses(&["status", "--control-path", text(&disk)], &["Control socket", text(&disk)]);
    assert!(!Path::new(socket).exists());
}
