//! The client's side of the guest's agent: files with fsync, connections that the guest opens, unmount and reboot.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::{CLIENT, Namespace};

/// A connection to the guest's agent. It stalls when the guest does and never reconnects.
#[derive(Debug)]
pub struct Agent {
    input: BufReader<TcpStream>,
}

impl Agent {
    /// Connects from inside `namespace`.
    ///
    /// # Errors
    /// Nobody answers within some seconds.
    pub fn connect(namespace: &Namespace, address: &str) -> Result<Self> {
        let socket = format!("{address}:7000").parse().context("Address of the agent")?;
        let stream = namespace
            .run(|| TcpStream::connect_timeout(&socket, Duration::from_secs(10)))?
            .with_context(|| format!("No agent at {socket}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { input: BufReader::new(stream) })
    }

    fn command(&mut self, line: &str, body: &[u8]) -> Result<String> {
        let mut request = format!("{line}\n").into_bytes();
        request.extend_from_slice(body);
        self.input.get_mut().write_all(&request).with_context(|| line.to_owned())?;
        let mut answer = String::new();
        self.input.read_line(&mut answer).with_context(|| line.to_owned())?;
        match answer.trim_end().split_once(' ') {
            None if answer.trim_end() == "OK" => Ok(String::new()),
            Some(("OK", rest)) => Ok(rest.to_owned()),
            _ => bail!("The guest's agent answers {line:?} with {answer:?}"),
        }
    }

    /// Writes a file; returns when it is on the guest's disk.
    ///
    /// # Errors
    /// The connection broke or the guest could not.
    pub fn write(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.command(&format!("WRITE {name} {}", content.len()), content).map(drop)
    }

    /// Reads a file from the guest's disk.
    ///
    /// # Errors
    /// The connection broke or there is no such file.
    pub fn read(&mut self, name: &str) -> Result<Vec<u8>> {
        let bytes = self.command(&format!("READ {name}"), b"")?;
        let mut content = vec![0; bytes.parse().context("Length of a file")?];
        self.input.read_exact(&mut content).context("Content of a file")?;
        Ok(content)
    }

    /// Ends redis and unmounts the guest's disk: what is on it then must be sound without a repair.
    ///
    /// # Errors
    /// The connection broke or the guest could not.
    pub fn unmount(&mut self) -> Result<()> {
        self.command("UNMOUNT", b"").map(drop)
    }

    /// Unmounts and reboots.
    ///
    /// # Errors
    /// The connection broke or the guest could not.
    pub fn reboot(mut self) -> Result<()> {
        self.command("REBOOT", b"").map(drop)
    }

    /// Has the guest open a connection to the client's host, see [`GuestConnection`].
    ///
    /// # Errors
    /// The guest cannot connect.
    pub fn dial(&mut self, namespace: &Namespace) -> Result<GuestConnection> {
        let listener = namespace.run(|| TcpListener::bind((CLIENT, 0)))?.context("Cannot listen")?;
        let address = listener.local_addr()?;
        let accepting = thread::spawn(move || listener.accept());
        self.command(&format!("DIAL {address}"), b"")?;
        let (stream, _) = accepting.join().map_err(|_| anyhow!("accept panicked"))?.context("accept")?;
        GuestConnection::start(stream)
    }
}

/// A connection that the guest opened to a server on the client's host. The guest sends numbers; each is checked and sent
/// back, which asks for the next.
#[derive(Debug)]
pub struct GuestConnection {
    numbers: Arc<AtomicU64>,
    failure: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl GuestConnection {
    fn start(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        let numbers = Arc::new(AtomicU64::new(0));
        let failure = Arc::new(Mutex::new(None));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, failed, stopping) = (Arc::clone(&numbers), Arc::clone(&failure), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let result = converse(stream, &count, &stopping);
            *failed.lock().unwrap_or_else(PoisonError::into_inner) =
                result.err().map(|error| error.to_string());
        });
        Ok(Self { numbers, failure, stop, thread })
    }

    /// How many numbers have come, each once and in order.
    pub fn numbers(&self) -> u64 {
        self.numbers.load(Ordering::Relaxed)
    }

    /// Ends it.
    ///
    /// # Errors
    /// The connection was reset or closed, or carried something else than the next number.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("The server panicked"))?;
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(self.numbers.load(Ordering::Relaxed)),
            Some(failure) => bail!("The connection that the guest opened: {failure}"),
        }
    }
}

fn converse(stream: TcpStream, count: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let mut output = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    let mut line = String::new();
    while !stop.load(Ordering::Relaxed) {
        line.clear();
        ensure!(input.read_line(&mut line)? > 0, "The guest closed it");
        let expected = count.load(Ordering::Relaxed) + 1;
        ensure!(line.trim_end() == expected.to_string(), "Expected {expected}, got {line:?}");
        count.store(expected, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(10));
        output.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Writes files with fsync without end, eight names in turn, and knows what each must hold.
#[derive(Debug)]
pub struct FileLoad {
    acknowledged: Arc<Mutex<Acknowledged>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Agent>>>,
}

#[derive(Clone, Debug, Default)]
struct Acknowledged {
    writes: u64,
    /// Number of the last write to each file.
    files: BTreeMap<String, u64>,
}

impl FileLoad {
    /// Starts writing, with `pause` between files.
    pub fn start(mut agent: Agent, pause: Duration) -> Self {
        let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopping) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut number = 0;
            while !stopping.load(Ordering::Relaxed) {
                number += 1;
                let name = format!("file{}", number % 8);
                agent.write(&name, &content(number))?;
                let mut acknowledged = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                acknowledged.writes = number;
                acknowledged.files.insert(name, number);
                drop(acknowledged);
                thread::sleep(pause);
            }
            Ok(agent)
        });
        Self { acknowledged, stop, thread: Some(thread) }
    }

    /// How many writes have been acknowledged.
    pub fn writes(&self) -> u64 {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).writes
    }

    /// Ends after the write in flight, and reads every file back. Returns the agent and the number of writes.
    ///
    /// # Errors
    /// The connection did not last, or a file is not what was acknowledged.
    pub fn stop_and_verify(mut self, limit: Duration) -> Result<(Agent, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("stopped once")?;
        let deadline = Instant::now() + limit;
        while !thread.is_finished() {
            ensure!(Instant::now() < deadline, "The write in flight is not acknowledged after {limit:?}");
            thread::sleep(Duration::from_millis(2));
        }
        let mut agent = thread.join().map_err(|_| anyhow!("The client panicked"))??;
        let acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (name, number) in &acknowledged.files {
            ensure!(
                agent.read(name)? == content(*number),
                "{name} does not hold what write {number} put there, which was acknowledged"
            );
        }
        Ok((agent, acknowledged.writes))
    }
}

impl Drop for FileLoad {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What write `number` puts into its file: some blocks that no other write's blocks equal, of changing length.
fn content(number: u64) -> Vec<u8> {
    let words = 512 + (number * 977 % 4096);
    (0..words).flat_map(|word| (number << 20 | word).to_le_bytes()).collect()
}
