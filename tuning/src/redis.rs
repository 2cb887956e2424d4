//! A redis client that never reconnects: what it sees of a failover is what any client sees.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::Namespace;
use crate::stall::Stalls;

/// What redis answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`.
    Status(String),
    /// `-ERR …`.
    Error(String),
    /// `:1`.
    Integer(i64),
    /// A value, or none.
    Bulk(Option<Vec<u8>>),
}

/// One TCP connection to a redis server.
#[derive(Debug)]
pub struct Redis {
    input: BufReader<TcpStream>,
}

impl Redis {
    /// Connects from inside `namespace` to redis at `address`, and waits at most `limit` until it serves.
    ///
    /// # Errors
    /// It does not serve in time.
    pub fn connect(namespace: &Namespace, address: &str, limit: Duration) -> Result<Self> {
        let socket: SocketAddr = format!("{address}:6379").parse().context("Address of redis")?;
        let deadline = Instant::now() + limit;
        namespace.run(|| {
            loop {
                let attempt = Self::connect_once(socket);
                if attempt.is_ok() || Instant::now() > deadline {
                    return attempt
                        .with_context(|| format!("redis at {socket} does not serve after {limit:?}"));
                }
                thread::sleep(Duration::from_millis(20));
            }
        })?
    }

    fn connect_once(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_millis(500))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut redis = Self { input: BufReader::new(stream) };
        let reply = redis.command(&[b"PING"])?;
        ensure!(reply == Reply::Status("PONG".into()), "redis says {reply:?}");
        redis.input.get_ref().set_read_timeout(None)?;
        Ok(redis)
    }

    /// One request and its reply. Waits for ever: a stall is no error.
    ///
    /// # Errors
    /// The connection was reset or closed, or what comes is not RESP.
    pub fn command(&mut self, words: &[&[u8]]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.input.get_mut().write_all(&request)?;
        self.reply()
    }

    fn reply(&mut self) -> io::Result<Reply> {
        let malformed = |line: &str| io::Error::other(format!("not RESP: {line:?}"));
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
        }
        let text = line.trim_end();
        let rest = text.get(1..).ok_or_else(|| malformed(text))?;
        let number = || rest.parse::<i64>().map_err(|_| malformed(text));
        match text.as_bytes()[0] {
            b'+' => Ok(Reply::Status(rest.into())),
            b'-' => Ok(Reply::Error(rest.into())),
            b':' => Ok(Reply::Integer(number()?)),
            b'$' => {
                let Ok(bytes) = usize::try_from(number()?) else {
                    return Ok(Reply::Bulk(None));
                };
                let mut value = vec![0; bytes + 2];
                io::Read::read_exact(&mut self.input, &mut value)?;
                value.truncate(bytes);
                Ok(Reply::Bulk(Some(value)))
            }
            _ => Err(malformed(text)),
        }
    }

    /// The integer value of a key; 0 without one.
    ///
    /// # Errors
    /// The connection broke or the value is no number.
    pub fn integer(&mut self, key: &str) -> Result<u64> {
        match self.command(&[b"GET", key.as_bytes()])? {
            Reply::Bulk(None) => Ok(0),
            Reply::Bulk(Some(value)) => {
                String::from_utf8_lossy(&value).parse().with_context(|| format!("{key} is no number"))
            }
            other => bail!("GET {key}: {other:?}"),
        }
    }
}

/// What a [`RedisLoad`] has seen up to now.
#[derive(Clone, Debug, Default)]
pub struct RedisProgress {
    /// INCRs that redis has acknowledged.
    pub increments: u64,
    /// The last acknowledged value of each key.
    pub values: BTreeMap<String, String>,
    /// When replies came, and how long requests took.
    pub stalls: Stalls,
    /// What went wrong, if anything: a broken connection, or a counter that does not fit.
    pub failure: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<RedisProgress>,
    stop: AtomicBool,
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, RedisProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes without end over one connection: in turn an INCR of one counter and a SET of one of a hundred keys. Each
/// request waits for the reply to the one before, so at any time at most one is not acknowledged.
#[derive(Debug)]
pub struct RedisLoad {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Redis>>,
}

impl RedisLoad {
    /// Starts on a connected client, with `pause` between requests.
    ///
    /// # Errors
    /// The counter cannot be set to 0.
    pub fn start(mut redis: Redis, pause: Duration) -> Result<Self> {
        let reply = redis.command(&[b"SET", b"counter", b"0"])?;
        ensure!(reply == Reply::Status("OK".into()), "redis says {reply:?}");
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !theirs.stop.load(Ordering::Relaxed) {
                if let Err(error) = turn(&mut redis, &theirs) {
                    theirs.progress().failure = Some(error.to_string());
                    break;
                }
                thread::sleep(pause);
            }
            redis
        });
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What it has seen.
    pub fn progress(&self) -> RedisProgress {
        self.shared.progress().clone()
    }

    /// Waits until redis has acknowledged `more` INCRs from now on.
    ///
    /// # Errors
    /// It has not within `limit`, or the connection broke.
    pub fn await_increments(&self, more: u64, limit: Duration) -> Result<()> {
        let (enough, deadline) = (self.progress().increments + more, Instant::now() + limit);
        loop {
            let RedisProgress { increments, failure, .. } = self.progress();
            if increments >= enough {
                return Ok(());
            }
            if let Some(failure) = failure {
                bail!("The client's connection did not last: {failure}");
            }
            ensure!(Instant::now() < deadline, "{increments} increments after {limit:?}, not {enough}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends after the request in flight and gives the connection back with what was seen.
    ///
    /// # Errors
    /// The request in flight gets no reply within `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<(Redis, RedisProgress)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("stopped once")?;
        let deadline = Instant::now() + limit;
        while !thread.is_finished() {
            ensure!(Instant::now() < deadline, "The request in flight has no reply after {limit:?}");
            thread::sleep(Duration::from_millis(2));
        }
        let redis = thread.join().map_err(|_| anyhow::anyhow!("The client panicked"))?;
        Ok((redis, self.shared.progress().clone()))
    }
}

impl Drop for RedisLoad {
    fn drop(&mut self) {
        // the thread ends at its next reply or when the guest is gone; nobody waits for it
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn turn(redis: &mut Redis, shared: &Shared) -> Result<()> {
    let began = Instant::now();
    let expected = shared.progress().increments + 1;
    let reply = redis.command(&[b"INCR", b"counter"])?;
    ensure!(
        reply == Reply::Integer(expected.cast_signed()),
        "INCR number {expected} was answered with {reply:?}: a write was lost or done twice"
    );
    {
        let mut progress = shared.progress();
        progress.increments = expected;
        progress.stalls.record(began);
    }
    let (key, value) = (format!("key:{}", expected % 100), format!("value:{expected}"));
    let began = Instant::now();
    let reply = redis.command(&[b"SET", key.as_bytes(), value.as_bytes()])?;
    ensure!(reply == Reply::Status("OK".into()), "SET {key}: {reply:?}");
    let mut progress = shared.progress();
    progress.values.insert(key, value);
    progress.stalls.record(began);
    Ok(())
}

impl RedisProgress {
    /// Asks redis for everything that was acknowledged: each write must be there, and each exactly once.
    ///
    /// # Errors
    /// What differs.
    pub fn verify(&self, redis: &mut Redis) -> Result<()> {
        if let Some(failure) = &self.failure {
            bail!("The client's connection did not last: {failure}");
        }
        let counter = redis.integer("counter")?;
        ensure!(
            counter == self.increments,
            "{} INCRs were acknowledged, the counter is {counter}",
            self.increments
        );
        for (key, value) in &self.values {
            let reply = redis.command(&[b"GET", key.as_bytes()])?;
            ensure!(
                reply == Reply::Bulk(Some(value.clone().into_bytes())),
                "{key} was acknowledged as {value:?} and is {reply:?}"
            );
        }
        Ok(())
    }
}
