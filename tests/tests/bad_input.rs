//! Bad input gets one clear line that names the thing and the remedy, an exit code, and changes nothing on disk.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::{GuestImage, Pair, PairOptions, Side, program};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("a_missing_configuration", a_missing_configuration),
        ("a_malformed_configuration", a_malformed_configuration),
        ("a_missing_qemu", a_missing_qemu),
        ("a_socket_path_that_is_taken", a_socket_path_that_is_taken),
        ("a_vm_that_runs_already", a_vm_that_runs_already),
        ("a_disk_of_another_length_on_the_secondary", a_disk_of_another_length_on_the_secondary),
        ("a_stranger_at_the_secondarys_port", a_stranger_at_the_secondarys_port),
        ("a_secondary_that_speaks_nonsense", a_secondary_that_speaks_nonsense),
    ])
}

fn prepare() -> Result<Pair> {
    Pair::prepare(&PairOptions::default(), &GuestImage::make()?)
}

/// Changes the configuration, which must contain `from`.
fn change(pair: &Pair, from: &str, to: &str) -> Result<()> {
    let text = fs::read_to_string(pair.config())?;
    ensure!(text.contains(from), "{from} is not in the configuration");
    fs::write(pair.config(), text.replacen(from, to, 1)).context("Cannot write the configuration")
}

/// Length and a digest of what is on both disks.
fn disks(pair: &Pair) -> Result<[(usize, u64); 2]> {
    let digest = |side| -> Result<(usize, u64)> {
        let mut file = fs::File::open(pair.disk(side).path())?;
        let (mut hasher, mut total, mut piece) = (DefaultHasher::new(), 0, vec![0; 1 << 20]);
        loop {
            let bytes = file.read(&mut piece)?;
            if bytes == 0 {
                return Ok((total, hasher.finish()));
            }
            total += bytes;
            hasher.write(&piece[..bytes]);
        }
    };
    Ok([digest(Side::A)?, digest(Side::B)?])
}

/// `colo run` on that side has to end with an error: its last line, which must name all of `words`.
fn fails(pair: &mut Pair, side: Side, words: &[&str]) -> Result<()> {
    let process = pair.process(side)?;
    let status = process.wait(Duration::from_secs(30))?;
    let output = process.output();
    ensure!(status.code().is_some_and(|code| code != 0), "It ended with {status}:\n{output}");
    one_clear_line(&output, "colo: ", words)
}

fn one_clear_line(output: &str, prefix: &str, words: &[&str]) -> Result<()> {
    let errors: Vec<&str> = output.lines().filter(|line| line.starts_with(prefix)).collect();
    ensure!(errors.len() == 1, "Expected one line that starts with {prefix:?}:\n{output}");
    ensure!(output.lines().last() == Some(errors[0]), "Something follows the error:\n{output}");
    println!("  {}", errors[0]);
    for word in words {
        ensure!(errors[0].contains(word), "The error does not say {word:?}: {}", errors[0]);
    }
    Ok(())
}

/// Waits until host-b waits for its primary.
fn await_waiting(pair: &mut Pair) -> Result<()> {
    pair.await_status(Side::B, "waiting side", Duration::from_secs(20), |status| {
        status.text("/role") == "waiting"
    })
    .map(drop)
}

fn a_missing_configuration() -> Result<()> {
    let mut pair = prepare()?;
    fs::remove_file(pair.config())?;
    pair.run(Side::A, &PairOptions::default())?;
    fails(&mut pair, Side::A, &["pair.toml", "No such file"])
}

fn a_malformed_configuration() -> Result<()> {
    let pair = prepare()?;
    for (from, to, words) in [
        ("memory_mib = 256", "memory_mib = \"much\"", vec!["pair.toml", "line "]),
        ("memory_mib = 256", "memory_mib = 256\nmemory = 3", vec!["pair.toml", "unknown field `memory`"]),
        ("port = 7470", "port = 0", vec!["pair.toml", "link.port"]),
    ] {
        change(&pair, from, to)?;
        let mut command = pair.colo(Side::A)?;
        command.args(["run", "--node", "a"]).arg(pair.config());
        let output = pair.lab().host(Side::A).output(command)?;
        ensure!(!output.status.success(), "It accepts {to}");
        one_clear_line(&String::from_utf8_lossy(&output.stderr), "colo: ", &words)?;
        change(&pair, to, from)?;
    }
    Ok(())
}

fn a_missing_qemu() -> Result<()> {
    let mut pair = prepare()?;
    change(&pair, "[vm]", "[vm]\nqemu = \"qemu-system-nowhere\"")?;
    let before = disks(&pair)?;
    pair.run(Side::A, &PairOptions::default())?;
    fails(&mut pair, Side::A, &["qemu-system-nowhere", "install QEMU"])?;
    ensure!(disks(&pair)? == before, "A disk was changed");
    Ok(())
}

fn a_socket_path_that_is_taken() -> Result<()> {
    let pair = prepare()?;
    let host = pair.lab().host(Side::A);
    let before = disks(&pair)?;
    let socket = host.directory().join("taken");
    let _somebody = UnixListener::bind(&socket)?;
    let mut block = Command::new(program("vhost-blk-backend")?);
    block.arg("--blk-file").arg(pair.disk(Side::A).path());
    let mut net = Command::new(program("vhost-net-backend")?);
    net.args(["--tap", "vm0"]);
    for (mut command, prefix) in [(block, "vhost-blk-backend: "), (net, "vhost-net-backend: ")] {
        command.arg("--socket-path").arg(&socket);
        let output = host.output(command)?;
        ensure!(output.status.code().is_some_and(|code| code != 0), "It ended with {}", output.status);
        one_clear_line(&String::from_utf8_lossy(&output.stderr), prefix, &["taken"])?;
    }
    ensure!(disks(&pair)? == before, "A disk was changed");
    Ok(())
}

fn a_vm_that_runs_already() -> Result<()> {
    let mut pair = prepare()?;
    pair.run(Side::B, &PairOptions::default())?;
    await_waiting(&mut pair)?;
    let mut command = pair.colo(Side::B)?;
    command.args(["run", "--node", "b"]).arg(pair.config());
    let output = pair.lab().host(Side::B).output(command)?;
    ensure!(!output.status.success(), "A second colo run for the same VM runs");
    one_clear_line(&String::from_utf8_lossy(&output.stderr), "colo: ", &["demo"])?;
    ensure!(pair.process(Side::B)?.ended()?.is_none(), "The first one has ended");
    Ok(())
}

fn a_disk_of_another_length_on_the_secondary() -> Result<()> {
    let mut pair = prepare()?;
    fs::File::options().write(true).open(pair.disk(Side::B).path())?.set_len(129 << 20)?;
    let before = disks(&pair)?;
    for side in [Side::B, Side::A] {
        pair.run(side, &PairOptions::default())?;
    }
    for side in [Side::A, Side::B] {
        fails(&mut pair, side, &["disk", "length", "135266304", "134217728"])?;
    }
    ensure!(disks(&pair)? == before, "A disk was changed");
    Ok(())
}

/// A port scanner must not end a secondary: the stranger is refused, with a line in the log, and the wait goes on.
fn a_stranger_at_the_secondarys_port() -> Result<()> {
    let mut pair = prepare()?;
    let before = disks(&pair)?;
    pair.run(Side::B, &PairOptions::default())?;
    await_waiting(&mut pair)?;
    let address = format!("{}:7470", Side::B.link_address());
    let mut stream = pair.lab().host(Side::A).namespace().run(|| TcpStream::connect(&address))??;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")?;
    let process = pair.process(Side::B)?;
    let refusals =
        |output: &str| output.lines().filter(|line| line.contains("does not speak the COLO link")).count();
    let log = process.log().to_owned();
    process.until("refusal", Duration::from_secs(20), || {
        fs::read_to_string(&log).ok().filter(|output| refusals(output) == 1)
    })?;
    await_waiting(&mut pair)?;
    ensure!(disks(&pair)? == before, "A disk was changed");
    Ok(())
}

fn a_secondary_that_speaks_nonsense() -> Result<()> {
    let mut pair = prepare()?;
    let before = disks(&pair)?;
    let address = format!("{}:7470", Side::B.link_address());
    let listener = pair.lab().host(Side::B).namespace().run(|| TcpListener::bind(&address))??;
    listener.set_nonblocking(true)?;
    let primary = pair.run(Side::A, &PairOptions::default())?;
    let accept = || listener.accept().ok();
    let (mut stream, _) = primary.until("connection to its peer", Duration::from_secs(20), accept)?;
    stream.write_all(b"220 mail.example ESMTP\r\n250 whatever you say, at some length\r\n")?;
    fails(&mut pair, Side::A, &["COLO link"])?;
    let _ = stream.read(&mut [0; 100]);
    ensure!(disks(&pair)? == before, "A disk was changed");
    Ok(())
}
