//! Who is compared: our back end, the daemon with each of its settings, and the bare loops. All of them serve at the
//! same time, and only one of them has work.

use std::time::Duration;

use anyhow::Result;

use super::bare::{Bare, Means};
use super::load::{self, Load};
use super::server::Backing;
use super::{Access, Connection, Disk, Measured, Shape};
use crate::{Place, Server};

/// Bytes of every request of the comparison.
pub const BLOCK_BYTES: usize = 4096;

/// One load that all contenders get.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Which requests.
    pub access: Access,
    /// Number of queues.
    pub queues: u16,
    /// Requests in flight in each queue.
    pub depth: u16,
    /// Whether the client polls, or sleeps on an eventfd.
    pub polling: bool,
}

/// Whose figures these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Our back end.
    Ours,
    /// QEMU's storage daemon.
    Daemon,
    /// A null device on the crate that many devices are made with, for information.
    Stock,
    /// An io_uring loop without vhost-user.
    BareRing,
    /// A loop of pread or pwrite, for information.
    Synchronous,
}

/// One contender, ready to be measured.
#[derive(Debug)]
pub struct Contender {
    /// Whose it is.
    pub group: Group,
    /// Its name, with the settings.
    pub name: String,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Served { server: usize, event_idx: bool },
    Bare { means: Means, direct: bool },
}

/// The contenders of one backing and their servers.
#[derive(Debug)]
pub struct Field<'a> {
    disk: Option<&'a Disk>,
    disk_bytes: u64,
    client_core: usize,
    server_core: usize,
    servers: Vec<Server>,
    contenders: Vec<Contender>,
}

/// What the contenders of a backing are made of.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// Where the servers run.
    pub place: Place<'a>,
    /// The client's core.
    pub client_core: usize,
    /// The image; none is a null device.
    pub disk: Option<&'a Disk>,
    /// Its size.
    pub disk_bytes: u64,
    /// More arguments for our back end.
    pub ours: &'a [String],
}

impl<'a> Field<'a> {
    /// Starts everybody. Those that do I/O must prove it. Settings that the daemon refuses here are told and left out.
    ///
    /// # Errors
    /// Our back end does not start, or a server does something else than its I/O.
    pub fn start(setting: Setting<'a>, seed: u64) -> Result<Self> {
        let mut field = Self::only_ours(setting, 1, seed)?;
        for daemon in daemons(setting) {
            match Server::daemon(setting.place, &daemon.file_name(), &daemon.blockdev, &daemon.iothread, 4) {
                Ok(server) => field.add_server(server, Group::Daemon, &daemon.name, &[true, false], seed)?,
                Err(error) => eprintln!("left out: {}: {error:#}", daemon.name),
            }
        }
        if setting.disk.is_none() {
            let server = Server::stock_null(setting.place, setting.disk_bytes)?;
            field.add_server(server, Group::Stock, "stock vhost-user-backend", &[true, false], seed)?;
        }
        if let Some(disk) = setting.disk {
            for (means, group, what) in [
                (Means::IoUring, Group::BareRing, "bare io_uring"),
                (Means::Synchronous, Group::Synchronous, "bare pread/pwrite"),
            ] {
                for direct in directs(disk) {
                    let name = format!("{what} {}", caching(*direct));
                    field.contenders.push(Contender {
                        group,
                        name,
                        work: Work::Bare { means, direct: *direct },
                    });
                }
            }
        }
        Ok(field)
    }

    /// Starts our back end alone.
    ///
    /// # Errors
    /// It does not start, or does something else than its I/O.
    pub fn only_ours(setting: Setting<'a>, queues: u16, seed: u64) -> Result<Self> {
        let Setting { place, client_core, disk, disk_bytes, ours } = setting;
        let backing = disk.map_or(Backing::Null { bytes: disk_bytes }, Backing::Image);
        let server = Server::ours(place, backing, queues, ours)?;
        let (servers, contenders) = (Vec::new(), Vec::new());
        let mut field = Self { disk, disk_bytes, client_core, server_core: place.core, servers, contenders };
        field.add_server(server, Group::Ours, "vhost-blk-backend", &[true], seed)?;
        Ok(field)
    }

    fn add_server(
        &mut self,
        server: Server,
        group: Group,
        name: &str,
        event_idx: &[bool],
        seed: u64,
    ) -> Result<()> {
        if let Some(disk) = self.disk {
            let shape = Shape { queues: 1, depth: 1, block_bytes: BLOCK_BYTES, event_idx: true };
            let mut connection = Connection::open(server.socket(), shape)?;
            super::content::verify(&mut connection, disk, seed + self.servers.len() as u64)?;
            connection.close()?;
        }
        for &event_idx in event_idx {
            let suffix = if event_idx { "" } else { " no event_idx" };
            let work = Work::Served { server: self.servers.len(), event_idx };
            self.contenders.push(Contender { group, name: format!("{name}{suffix}"), work });
        }
        self.servers.push(server);
        Ok(())
    }

    /// Everybody.
    pub fn contenders(&self) -> &[Contender] {
        &self.contenders
    }

    /// Measures one of them. A bare loop has one queue, and a synchronous one no depth.
    ///
    /// # Errors
    /// A request fails, or the server breaks.
    pub fn measure(&self, contender: &Contender, test: &Test, duration: Duration) -> Result<Measured> {
        match contender.work {
            Work::Served { server, event_idx } => {
                let server = &self.servers[server];
                let Test { access, queues, depth, polling } = *test;
                let shape = Shape { queues, depth, block_bytes: BLOCK_BYTES, event_idx };
                let mut connection = Connection::open(server.socket(), shape)?;
                let core = Some(self.client_core);
                let load = Load { access, polling, thread_per_queue: false, core, duration };
                let measured = load::run(&mut connection, &load, || server.cpu_time())?;
                connection.close()?;
                Ok(measured)
            }
            Work::Bare { means, direct } => {
                let disk = self.disk.expect("bare loops are made for images only");
                let (depth, access, core) = (test.depth * test.queues, test.access, self.server_core);
                let bare = Bare { means, direct, depth, access, core, duration };
                bare.run(disk, self.disk_bytes / BLOCK_BYTES as u64)
            }
        }
    }

    /// Processor time in percent that our server uses while a guest is connected and has nothing to do.
    ///
    /// # Errors
    /// The server breaks.
    pub fn idle_cpu_percent(&self, duration: Duration) -> Result<f64> {
        let server = &self.servers[0];
        let shape = Shape { queues: 1, depth: 32, block_bytes: BLOCK_BYTES, event_idx: true };
        let mut connection = Connection::open(server.socket(), shape)?;
        // the server has just had work, so that it is polling now
        let load = Load {
            access: Access::READ,
            polling: true,
            thread_per_queue: false,
            core: Some(self.client_core),
            duration: Duration::from_millis(100),
        };
        load::run(&mut connection, &load, || server.cpu_time())?;
        std::thread::sleep(AFTER_POLLING);
        let before = server.cpu_time()?;
        // idle time can only be waited for
        std::thread::sleep(duration);
        let used = server.cpu_time()?.saturating_sub(before);
        connection.close()?;
        Ok(used.as_secs_f64() / duration.as_secs_f64() * 100.0)
    }
}

/// Longer than any polling window.
const AFTER_POLLING: Duration = Duration::from_millis(200);

/// With O_DIRECT or not: an image that must stay out of the page cache leaves no choice.
fn directs(disk: &Disk) -> &'static [bool] {
    if disk.is_direct() { &[true] } else { &[true, false] }
}

fn caching(direct: bool) -> &'static str {
    if direct { "direct" } else { "buffered" }
}

/// One setting of the daemon.
struct Daemon {
    name: String,
    blockdev: String,
    iothread: String,
}

impl Daemon {
    fn file_name(&self) -> String {
        self.name.replace([' ', '='], "-")
    }
}

/// All settings of the daemon that could be the best for a backing.
fn daemons(setting: Setting<'_>) -> Vec<Daemon> {
    let mut kinds = Vec::new();
    match setting.disk {
        None => {
            let size = setting.disk_bytes;
            kinds.push(("null-co".to_owned(), format!("driver=null-co,size={size},read-zeroes=off")));
        }
        Some(disk) => {
            for &direct in directs(disk) {
                for aio in ["native", "io_uring", "threads"] {
                    // native is refused without O_DIRECT
                    if aio == "native" && !direct {
                        continue;
                    }
                    let on = if direct { "on" } else { "off" };
                    // ours locks the image, and they all serve the same
                    let blockdev = format!(
                        "driver=file,filename={},aio={aio},cache.direct={on},locking=off",
                        disk.path().display()
                    );
                    kinds.push((format!("aio={aio} {}", caching(direct)), blockdev));
                }
            }
        }
    }
    // 32768 is the daemon's default
    let polling = [("", ",poll-max-ns=32768"), (" no polling", ",poll-max-ns=0")];
    let daemon = |(kind, blockdev): &(String, String)| {
        polling.map(|(suffix, iothread)| Daemon {
            name: format!("qemu-storage-daemon {kind}{suffix}"),
            blockdev: blockdev.clone(),
            iothread: iothread.into(),
        })
    };
    kinds.iter().flat_map(daemon).collect()
}
