//! Servers that people run, in a guest, and their clients, each at work without end: every exchange is checked, and none
//! may break.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::made;
use crate::{Flow, GUEST, GuestImage, Lab, Namespace, iperf3};

/// The guest's address with IPv6.
const GUEST_V6: &str = "fd77::10";
/// The client's.
const CLIENT_V6: &str = "fd77::1";
/// Connections that stay open to the web server.
const KEPT_ALIVE: usize = 1000;
/// What one exchange may take at most. The slowest carry some MiB of which both VMs encrypt each packet otherwise.
const LIMIT: Duration = Duration::from_secs(120);
/// Files small enough that each of a thousand connections can carry one at the same time.
const SMALL_FILES: usize = 20;

/// The guest with the servers, made by `tuning/guest/mkservices.sh`.
#[derive(Clone, Debug)]
pub struct ServicesImage {
    image: GuestImage,
    directory: PathBuf,
}

impl ServicesImage {
    /// Makes it, or finds it made.
    ///
    /// # Errors
    /// Packages are missing, or Debian's mirror cannot be reached.
    pub fn make() -> Result<Self> {
        let base = GuestImage::make()?;
        let directory = made("mkservices.sh", base.kernel.parent().context("The kernel has no directory")?)?;
        let image = GuestImage {
            initrd: directory.join("initrd"),
            arguments: format!("colo.ip6={GUEST_V6}/64"),
            ..base
        };
        Ok(Self { image, directory })
    }

    /// What boots.
    pub fn image(&self) -> &GuestImage {
        &self.image
    }
}

/// With which IP the clients reach the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn guest(self) -> &'static str {
        match self {
            Family::V4 => GUEST,
            Family::V6 => GUEST_V6,
        }
    }

    /// For URLs and the like.
    fn bracketed(self) -> String {
        match self {
            Family::V4 => GUEST.into(),
            Family::V6 => format!("[{GUEST_V6}]"),
        }
    }

    fn tls_port(self) -> u16 {
        match self {
            Family::V4 => 4434,
            Family::V6 => 4436,
        }
    }
}

/// What an exchange needs to know.
#[derive(Clone, Debug)]
struct Place {
    client: Namespace,
    image: PathBuf,
    family: Family,
    scratch: PathBuf,
}

type Exchange = Box<dyn FnMut() -> Result<()> + Send>;

#[derive(Debug)]
struct Worker {
    name: &'static str,
    exchanges: Arc<AtomicU64>,
    failure: Arc<OnceLock<String>>,
    thread: JoinHandle<()>,
}

/// A client of each server, at work: iperf3 both ways, a thousand connections to a web server, TLS, ssh, rsync, DNS.
#[derive(Debug)]
pub struct ServiceClients {
    workers: Vec<Worker>,
    stop: Arc<AtomicBool>,
}

impl ServiceClients {
    /// Sets all of them to work on the guest of `lab`, which has booted from `image`.
    ///
    /// # Errors
    /// The kernel has no IPv6, or the web server does not take its connections.
    pub fn start(lab: &Lab, image: &ServicesImage, family: Family) -> Result<Self> {
        if family == Family::V6 {
            lab.client().enable_ipv6("lan0")?;
            lab.client().ip(&format!("address add {CLIENT_V6}/64 dev lan0 nodad"))?;
        }
        let place = Place {
            client: lab.client().clone(),
            image: image.directory.clone(),
            family,
            scratch: lab.run().directory().join("clients"),
        };
        fs::create_dir_all(&place.scratch).context("Cannot make the clients' directory")?;
        let client = |exchange: fn(&Place) -> Result<()>| -> Exchange {
            let place = place.clone();
            Box::new(move || exchange(&place))
        };
        let web = Web::connect(&place)?;
        let clients: [(&str, Exchange); 8] = [
            ("web", web.into_exchange()),
            ("iperf3", client(iperf_both_ways)),
            ("TLS", client(tls_download)),
            ("ssh to the guest", client(ssh_upload)),
            ("ssh from the guest", client(ssh_download)),
            ("rsync to the guest", client(rsync_upload)),
            ("rsync from the guest", client(rsync_download)),
            ("DNS", client(dns)),
        ];
        let stop = Arc::new(AtomicBool::new(false));
        let workers =
            clients.into_iter().map(|(name, exchange)| Worker::start(name, exchange, &stop)).collect();
        Ok(Self { workers, stop })
    }

    /// Waits until each has ended an exchange that began after now.
    ///
    /// # Errors
    /// One failed, or takes too long.
    pub fn await_exchanges(&self) -> Result<()> {
        let count = |worker: &Worker| worker.exchanges.load(Ordering::Relaxed);
        // the first to end has begun before
        let wanted: Vec<u64> = self.workers.iter().map(|worker| count(worker) + 2).collect();
        let deadline = Instant::now() + 2 * LIMIT;
        loop {
            self.check()?;
            let late = self.workers.iter().zip(&wanted).find(|(worker, wanted)| count(worker) < **wanted);
            let Some((late, _)) = late else {
                return Ok(());
            };
            ensure!(Instant::now() < deadline, "The client of {} stands still", late.name);
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn check(&self) -> Result<()> {
        let failures = self.workers.iter().filter_map(|worker| Some((worker.name, worker.failure.get()?)));
        let failures: Vec<String> = failures.map(|(name, failure)| format!("{name}: {failure}")).collect();
        ensure!(failures.is_empty(), "Clients that failed: {}", failures.join("; "));
        Ok(())
    }

    /// Ends them after their exchanges under way. Returns how many each has done, for a person to read.
    ///
    /// # Errors
    /// An exchange failed: a connection broke, or carried something else than it should.
    pub fn stop(self) -> Result<String> {
        self.stop.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + 2 * LIMIT;
        while let Some(late) = self.workers.iter().find(|worker| !worker.thread.is_finished()) {
            ensure!(Instant::now() < deadline, "The client of {} does not end", late.name);
            thread::sleep(Duration::from_millis(5));
        }
        self.check()?;
        let done = self.workers.into_iter().map(|Worker { name, exchanges, thread, .. }| {
            thread.join().map_err(|_| anyhow!("The client of {name} panicked"))?;
            Ok(format!("{name} {}", exchanges.load(Ordering::Relaxed)))
        });
        Ok(done.collect::<Result<Vec<_>>>()?.join(", "))
    }
}

impl Worker {
    fn start(name: &'static str, mut exchange: Exchange, stop: &Arc<AtomicBool>) -> Self {
        let exchanges = Arc::new(AtomicU64::new(0));
        let failure = Arc::new(OnceLock::new());
        let (count, failed, stop) = (Arc::clone(&exchanges), Arc::clone(&failure), Arc::clone(stop));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Err(error) = exchange() {
                    // nobody else sets it
                    drop(failed.set(format!("{error:#}")));
                    break;
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { name, exchanges, failure, thread }
    }
}

impl Place {
    fn served(&self, path: &str) -> PathBuf {
        self.image.join("srv").join(path)
    }

    /// A program on the client's host, with an end in any case.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args([&LIMIT.as_secs().to_string(), program]).env("HOME", &self.scratch);
        command
    }

    /// Runs it to its end. Returns what it prints.
    fn run(&self, mut command: Command, input: Stdio) -> Result<Vec<u8>> {
        command.stdin(input);
        let output = self.client.run(|| command.output())?.with_context(|| format!("{command:?}"))?;
        ensure!(
            output.status.success(),
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output.stdout)
    }

    fn ssh(&self, words: &str) -> Command {
        let mut command = self.command("dbclient");
        // its host key is not known to anybody
        command.args(["-T", "-y", "-y", "-i"]).arg(self.image.join("id"));
        command.arg(format!("root@{}", self.family.guest())).arg(words);
        command
    }
}

/// A thousand connections that stay.
struct Web {
    connections: Vec<BufReader<TcpStream>>,
    pages: Vec<(String, Vec<u8>)>,
}

impl Web {
    fn connect(place: &Place) -> Result<Self> {
        let address =
            format!("{}:8080", place.family.bracketed()).parse().context("Address of the server")?;
        let connect = || -> Result<BufReader<TcpStream>> {
            let stream = TcpStream::connect_timeout(&address, LIMIT)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_nodelay(true)?;
            Ok(BufReader::new(stream))
        };
        let all = || (0..KEPT_ALIVE).map(|_| connect()).collect::<Result<Vec<_>>>();
        let connections = place.client.run(all)?.context("The web server")?;
        let page = |n: usize| -> Result<(String, Vec<u8>)> {
            let path = format!("tree/{}/{n}", n % 7);
            let content = fs::read(place.served(&path)).with_context(|| path.clone())?;
            Ok((path, content))
        };
        Ok(Self { connections, pages: (1..=SMALL_FILES).map(page).collect::<Result<_>>()? })
    }

    fn into_exchange(mut self) -> Exchange {
        Box::new(move || {
            // all at once
            for (connection, (path, _)) in self.connections.iter_mut().zip(self.pages.iter().cycle()) {
                let request = format!("GET /{path} HTTP/1.1\r\nHost: guest\r\n\r\n");
                connection.get_mut().write_all(request.as_bytes()).context("A request")?;
            }
            for (connection, (path, content)) in self.connections.iter_mut().zip(self.pages.iter().cycle()) {
                ensure!(answer(connection).context("An answer")? == *content, "{path} has another content");
            }
            Ok(())
        })
    }
}

/// Reads one answer of HTTP/1.1 with a length.
fn answer(connection: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut length = None;
    let mut line = String::new();
    connection.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "The web server says {line:?}");
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = Some(value.parse()?),
            Some(_) => {}
            None => break,
        }
    }
    let mut content = vec![0; length.context("An answer without a length")?];
    connection.read_exact(&mut content)?;
    Ok(content)
}

fn iperf_both_ways(place: &Place) -> Result<()> {
    for flow in [Flow::ToGuest, Flow::FromGuest] {
        iperf3(&place.client, place.family.guest(), flow, Duration::from_secs(2))?;
    }
    Ok(())
}

fn tls_download(place: &Place) -> Result<()> {
    let request = place.scratch.join("request");
    fs::write(&request, "GET /big HTTP/1.0\r\n\r\n").context("A request")?;
    let mut command = place.command("openssl");
    command.args(["s_client", "-quiet", "-verify_quiet", "-verify_return_error", "-connect"]);
    command.arg(format!("{}:{}", place.family.bracketed(), place.family.tls_port()));
    command.arg("-CAfile").arg(place.image.join("certificate"));
    let said = place.run(command, File::open(&request)?.into())?;
    let content = said.windows(4).position(|end| end == b"\r\n\r\n").map(|end| &said[end + 4..]);
    ensure!(content == Some(&fs::read(place.served("big"))?[..]), "TLS: {} bytes, or others", said.len());
    Ok(())
}

fn ssh_upload(place: &Place) -> Result<()> {
    let file = place.served("tree/1/99");
    let stored =
        place.run(place.ssh("cat >/data/in/upload; cat /data/in/upload"), File::open(&file)?.into())?;
    ensure!(stored == fs::read(&file)?, "ssh has stored {} bytes, or others", stored.len());
    Ok(())
}

fn ssh_download(place: &Place) -> Result<()> {
    let got = place.run(place.ssh("cat /srv/tree/2/100"), Stdio::null())?;
    ensure!(got == fs::read(place.served("tree/2/100"))?, "ssh has brought {} bytes, or others", got.len());
    Ok(())
}

fn rsync(place: &Place, options: &[&str], from: &str, to: &str) -> Result<Vec<u8>> {
    let mut command = place.command("rsync");
    command.args(options).args([from, to]);
    place.run(command, Stdio::null())
}

fn with_slash(path: &Path) -> String {
    format!("{}/", path.display())
}

fn rsync_upload(place: &Place) -> Result<()> {
    let (tree, guest) =
        (with_slash(&place.served("tree")), format!("rsync://{}/in/tree/", place.family.bracketed()));
    rsync(place, &["-rt", "--ignore-times", "--whole-file"], &tree, &guest)?;
    // what would have to be sent, by checksums
    let differs = rsync(place, &["-rcni"], &tree, &guest)?;
    ensure!(differs.is_empty(), "rsync has stored other files: {}", String::from_utf8_lossy(&differs));
    Ok(())
}

fn rsync_download(place: &Place) -> Result<()> {
    let (tree, here) = (place.served("tree"), place.scratch.join("tree"));
    rsync(place, &["-rt"], &format!("rsync://{}/tree/", place.family.bracketed()), &with_slash(&here))?;
    let mut diff = place.command("diff");
    diff.arg("-r").args([&tree, &here]);
    place.run(diff, Stdio::null()).context("What rsync has brought")?;
    fs::remove_dir_all(&here).context("A client's directory")
}

/// Asks for the address of a name, as a resolver does: again when no answer comes.
fn dns(place: &Place) -> Result<()> {
    static QUERIES: AtomicU64 = AtomicU64::new(0);
    let id = QUERIES.fetch_add(1, Ordering::Relaxed) as u16;
    // RFC 1035 §4.1: recursion desired, one question of type A, class IN
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in [format!("host{id}").as_str(), "test", ""] {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 1, 0, 1]);
    let any = match place.family {
        Family::V4 => "0.0.0.0:0",
        Family::V6 => "[::]:0",
    };
    let socket = place.client.run(|| UdpSocket::bind(any))?.context("Cannot open a UDP socket")?;
    socket.connect(format!("{}:53", place.family.bracketed()))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    for _ in 0..40 {
        // a port that is closed for a moment is asked again as well
        if socket.send(&query).is_err() {
            continue;
        }
        let mut answer = [0; 512];
        if let Ok(bytes) = socket.recv(&mut answer) {
            ensure!(answer[..2] == query[..2], "An answer to another question");
            ensure!(answer[..bytes].ends_with(&[0, 4, 192, 0, 2, 1]), "DNS says {:?}", &answer[..bytes]);
            return Ok(());
        }
    }
    bail!("DNS: no answer")
}
