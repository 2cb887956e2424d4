//! The one program of ours inside the test guest: what a client needs to see of it that redis and httpd do not show.
//!
//! - UDP port 7: every datagram comes back as it is.
//! - TCP port 7000: one command a line, see [`serve`]. Files are written with fsync before they are acknowledged; the
//!   guest opens connections of its own when told to; the file system is settled for a check or a reboot.
//!
//! What it sends depends on what it received and on nothing else, no clock and no random number: two guests that got
//! the same bytes answer with the same bytes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

const FILES: &str = "/data/files";
const FILE_BYTES_MAX: u64 = 16 << 20;

fn main() -> io::Result<()> {
    fs::create_dir_all(FILES)?;
    let udp = UdpSocket::bind("0.0.0.0:7")?;
    let tcp = TcpListener::bind("0.0.0.0:7000")?;
    thread::spawn(move || echo(&udp));
    thread::spawn(announce);
    for stream in tcp.incoming() {
        let stream = stream?;
        thread::spawn(move || drop(serve(stream)));
    }
    Ok(())
}

fn echo(udp: &UdpSocket) {
    let mut datagram = [0; 65536];
    loop {
        if let Ok((bytes, from)) = udp.recv_from(&mut datagram) {
            // an unreachable sender is the sender's business
            drop(udp.send_to(&datagram[..bytes], from));
        }
    }
}

/// Tells the console when redis serves; whoever waits over the network need not read it.
fn announce() {
    while !redis_answers().unwrap_or(false) {
        thread::sleep(Duration::from_millis(20));
    }
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("GUEST serving after {} s", uptime.split(' ').next().unwrap_or_default());
}

fn redis_answers() -> io::Result<bool> {
    let mut redis = TcpStream::connect("127.0.0.1:6379")?;
    redis.write_all(b"PING\r\n")?;
    let mut answer = [0; 5];
    redis.read_exact(&mut answer)?;
    Ok(&answer == b"+PONG")
}

/// Carries out the commands of one connection:
///
/// | command | answer |
/// |---|---|
/// | `WRITE name bytes`, then the bytes | `OK` once the file is on the disk |
/// | `READ name` | `OK bytes`, then the bytes, read from the disk and not from the cache |
/// | `DIAL address:port` | `OK` once the guest has connected there; see [`converse`] |
/// | `UNMOUNT` | `OK` once redis has ended and the file system is unmounted |
/// | `REBOOT` | the same, and the guest reboots |
fn serve(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    let mut line = String::new();
    while input.read_line(&mut line)? > 0 {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["WRITE", name, bytes] => write_file(name, bytes, &mut input),
            ["READ", name] => read_file(name),
            ["DIAL", address] => dial(address),
            ["UNMOUNT"] => run("/etc/unmount"),
            ["REBOOT"] => run("/etc/unmount"),
            _ => Err(io::Error::other("command not known")),
        };
        let ok = answer.is_ok();
        match answer {
            Ok(bytes) => answers.write_all(&bytes)?,
            Err(error) => answers.write_all(format!("ERROR {error}\n").as_bytes())?,
        }
        if ok && words == ["REBOOT"] {
            run("/etc/reboot")?;
        }
        line.clear();
    }
    Ok(())
}

fn path_of(name: &str) -> io::Result<PathBuf> {
    if name.contains('/') || name.starts_with('.') {
        return Err(io::Error::other("a name is one plain word"));
    }
    Ok(Path::new(FILES).join(name))
}

fn write_file(name: &str, bytes: &str, input: &mut impl Read) -> io::Result<Vec<u8>> {
    let bytes: u64 = bytes.parse().map_err(io::Error::other)?;
    if bytes > FILE_BYTES_MAX {
        return Err(io::Error::other("too long"));
    }
    // the content is taken off the connection whatever the name is: what follows it is the next command
    let mut content = Vec::new();
    if input.take(bytes).read_to_end(&mut content)? as u64 != bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut file = File::create(path_of(name)?)?;
    file.write_all(&content)?;
    file.sync_all()?;
    File::open(FILES)?.sync_all()?;
    Ok(b"OK\n".to_vec())
}

fn read_file(name: &str) -> io::Result<Vec<u8>> {
    let path = path_of(name)?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let content = fs::read(path)?;
    let mut answer = format!("OK {}\n", content.len()).into_bytes();
    answer.extend_from_slice(&content);
    Ok(answer)
}

fn dial(address: &str) -> io::Result<Vec<u8>> {
    let stream = TcpStream::connect(address)?;
    thread::spawn(move || drop(converse(stream)));
    Ok(b"OK\n".to_vec())
}

/// On a connection that the guest opened: sends `1`, and for each line that comes back the next number. The far end sets
/// the pace and sees at once when a line is missing, double or changed.
fn converse(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut output = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    let mut number = 1_u64;
    loop {
        output.write_all(format!("{number}\n").as_bytes())?;
        match lines.next().transpose()? {
            Some(line) if line == number.to_string() => number += 1,
            other => {
                output.write_all(format!("expected {number}, got {other:?}\n").as_bytes())?;
                return Ok(());
            }
        }
    }
}

fn run(script: &str) -> io::Result<Vec<u8>> {
    let output = Command::new("/bin/sh").arg(script).output()?;
    if output.status.success() {
        Ok(b"OK\n".to_vec())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")))
    }
}
