//! The client: TCP of the kernel, in the namespace with the tap.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::Namespace;

use super::REQUEST_BYTES;
use super::guest::{ECHO_PORT, SINK_PORT, SOURCE_PORT};
use crate::Histogram;
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::net::GUEST;

/// How long to wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);
/// What is written or read at once.
const BLOCK_BYTES: usize = 128 << 10;
/// What the guest is asked for at a time; two such requests are under way.
const ASKED_BYTES: u64 = 4 << 20;
/// Requests before those that are measured.
const WARM_UP: Duration = Duration::from_millis(100);

fn connect(namespace: &Namespace, port: u16) -> Result<TcpStream> {
    let address = (Ipv4Addr::from(GUEST), port).into();
    let stream = namespace.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
    let stream = stream.with_context(|| format!("The guest's port {port}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends as fast as the guest takes it. Returns bytes a second.
pub(super) fn to_guest(namespace: &Namespace, duration: Duration) -> Result<f64> {
    let mut stream = connect(namespace, SINK_PORT)?;
    let block = vec![0x5a; BLOCK_BYTES];
    let (began, mut bytes) = (Instant::now(), 0u64);
    while began.elapsed() < duration {
        stream.write_all(&block).context("To the guest")?;
        bytes += BLOCK_BYTES as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut taken = [0; size_of::<u64>()];
    stream.read_exact(&mut taken).context("What the guest has taken")?;
    let rate = bytes as f64 / began.elapsed().as_secs_f64();
    ensure!(u64::from_be_bytes(taken) == bytes, "The guest has taken {taken:?}, not {bytes} bytes");
    end(stream)?;
    Ok(rate)
}

/// What the guest has said.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said {
    pub(super) bytes: u64,
    pub(super) bytes_per_s: f64,
}

/// Has the guest send as fast as it can.
pub(super) fn from_guest(namespace: &Namespace, duration: Duration) -> Result<Said> {
    let mut stream = connect(namespace, SOURCE_PORT)?;
    let mut block = vec![0; BLOCK_BYTES];
    let ask = |mut stream: &TcpStream| stream.write_all(&ASKED_BYTES.to_be_bytes()).context("A request");
    let began = Instant::now();
    (0..2).try_for_each(|_| ask(&stream))?;
    let (mut bytes, mut asked) = (0, 2 * ASKED_BYTES);
    while bytes < asked {
        let count = stream.read(&mut block).context("From the guest")?;
        ensure!(count > 0, "The guest has ended after {bytes} bytes");
        bytes += count as u64;
        if asked - bytes <= ASKED_BYTES && began.elapsed() < duration {
            ask(&stream)?;
            asked += ASKED_BYTES;
        }
    }
    let bytes_per_s = bytes as f64 / began.elapsed().as_secs_f64();
    stream.shutdown(Shutdown::Write)?;
    end(stream)?;
    Ok(Said { bytes, bytes_per_s })
}

/// Makes requests, each when the reply to the one before is here. Returns the median time of a reply in microseconds.
pub(super) fn requests(namespace: &Namespace, duration: Duration) -> Result<f64> {
    let mut stream = connect(namespace, ECHO_PORT)?;
    request(&mut stream, WARM_UP)?;
    let latencies = request(&mut stream, duration)?;
    stream.shutdown(Shutdown::Write)?;
    end(stream)?;
    Ok(latencies.percentile(50.0) as f64 / ticks_per_nanosecond() / 1e3)
}

fn request(stream: &mut TcpStream, duration: Duration) -> Result<Histogram> {
    let mut latencies = Histogram::default();
    let end = ticks() + ticks_in(duration);
    let mut number = 0u64;
    loop {
        let began = ticks();
        if began >= end {
            return Ok(latencies);
        }
        let mut request = [0; REQUEST_BYTES];
        request[..size_of::<u64>()].copy_from_slice(&number.to_be_bytes());
        number += 1;
        stream.write_all(&request).context("A request")?;
        let mut reply = [0; REQUEST_BYTES];
        stream.read_exact(&mut reply).context("A reply")?;
        ensure!(reply == request, "Another reply than the request");
        latencies.record(ticks() - began);
    }
}

/// Waits until the guest has closed too, so that nothing of it is under way.
fn end(mut stream: TcpStream) -> Result<()> {
    let more = stream.read(&mut [0]).context("The guest's end of the connection")?;
    ensure!(more == 0, "The guest says more than it was asked for");
    Ok(())
}
