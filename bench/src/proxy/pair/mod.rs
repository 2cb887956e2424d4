//! A protected pair without emulation: two test guests behind a primary and a secondary back end, whose link is a cable
//! between two namespaces, and a client in the primary's, over its tap. And one such guest behind a plain back end.
//!
//! The guests say the same bytes, so no checkpoint is needed; one would have to copy the guest's state. Here it is only
//! counted how often one is asked for.

mod client;
mod guest;

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command as Process;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use colo::control::{Client, Command, Event, Role};
use colo_lab::{Namespace, program};
use serde_json::Value;

use crate::clock::ticks_per_nanosecond;
use crate::net::{Card, set_address};
use crate::{Place, Server};
use guest::Guest;

/// Of a request and its reply.
const REQUEST_BYTES: usize = 64;
/// Buffers in each queue of a card.
const DEPTH: u16 = 256;
const TAP: &str = "pair0";
/// The cable between the hosts.
const LINK: &str = "link0";
const LINK_ADDRESSES: [&str; 2] = ["10.99.0.1", "10.99.0.2"];
/// How long a back end may take for a command.
const PATIENCE: Duration = Duration::from_secs(5);
/// The epoch in which protection begins.
const EPOCH: u64 = 1;

/// What a client got, and what it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Bulk data to the guest, in bytes a second.
    pub to_guest: f64,
    /// Bulk data from the guest, in bytes a second.
    pub from_guest: f64,
    /// Median time of a reply to a request, in microseconds.
    pub reply_us: f64,
}

/// What protection took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Toll {
    /// Bytes on the link from the secondary for each that the guest said, while it sent bulk data.
    pub link_share: f64,
    /// How long packets were held while requests were made, on average, in microseconds.
    pub held_us: f64,
    /// How much later the SVM replied to a request than the PVM, on average, in microseconds.
    pub lag_us: f64,
    /// Whether a checkpoint was asked for.
    pub checkpoint_wanted: bool,
}

/// The two hosts.
pub struct Hosts<'a> {
    namespaces: [&'a Namespace; 2],
    directory: &'a Path,
}

impl<'a> Hosts<'a> {
    /// Makes their taps and the cable between them.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new(namespaces: [&'a Namespace; 2], directory: &'a Path) -> Result<Self> {
        let [primary, secondary] = namespaces;
        primary.ip(&format!("link add {LINK} type veth peer name {LINK} netns {}", secondary.name()))?;
        for (namespace, address) in namespaces.into_iter().zip(LINK_ADDRESSES) {
            namespace.ip(&format!("address add {address}/24 dev {LINK}"))?;
            namespace.ip(&format!("link set {LINK} up"))?;
            namespace.ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr"))?;
            namespace.ip(&format!("link set {TAP} up"))?;
        }
        set_address(primary, TAP)?;
        Ok(Self { namespaces, directory })
    }

    /// One guest, unprotected.
    ///
    /// # Errors
    /// Something does not start, or the guest does not serve.
    pub fn unprotected(&self, duration: Duration) -> Result<Figures> {
        let server = self.back_end(0, None)?;
        let guest = Guest::start(Card::open(server.socket(), DEPTH)?, 1)?;
        let client = self.namespaces[0];
        let measure = || -> Result<Figures> {
            Ok(Figures {
                to_guest: client::to_guest(client, duration)?,
                from_guest: client::from_guest(client, duration)?.bytes_per_s,
                reply_us: client::requests(client, duration)?,
            })
        };
        let figures = measure().with_context(|| server.output())?;
        guest.end().with_context(|| server.output())?;
        Ok(figures)
    }

    /// A protected pair.
    ///
    /// # Errors
    /// Something does not start, the guest does not serve, or the link is lost.
    pub fn protected(&self, duration: Duration) -> Result<(Figures, Toll)> {
        let roles = [Role::Primary, Role::Secondary];
        let servers = [self.back_end(0, Some(Role::Primary))?, self.back_end(1, Some(Role::Secondary))?];
        let said = || servers.each_ref().map(Server::output).join("\n");
        let mut pair = Pair::new(self)?;
        for (control, (role, link)) in pair.controls.iter_mut().zip(roles.into_iter().zip(self.link()?)) {
            control.call(&Command::Attach { role, epoch: EPOCH }, &[link.as_fd()], PATIENCE)?;
        }
        let [pvm, svm] = [&servers[0], &servers[1]].map(|server| Card::open(server.socket(), DEPTH));
        // seeds of different initial sequence numbers
        let (svm, pvm) = (Guest::start(svm?, 2)?, Guest::start(pvm?, 1)?);
        let measured = pair.measure(self, duration);
        let (figures, mut toll) = measured.with_context(|| format!("{}\n{}", said(), pair.status()))?;
        let (pvm, svm) = (pvm.end().with_context(said)?, svm.end().with_context(said)?);
        let behind = |(pvm, svm): (&u64, &u64)| svm.saturating_sub(*pvm);
        let lag: u64 = pvm.iter().zip(&svm).map(behind).sum();
        toll.lag_us = lag as f64 / pvm.len().min(svm.len()).max(1) as f64 / ticks_per_nanosecond() / 1e3;
        Ok((figures, toll))
    }

    fn control(&self, host: usize) -> std::path::PathBuf {
        self.directory.join(format!("pair{host}.control"))
    }

    fn back_end(&self, host: usize, role: Option<Role>) -> Result<Server> {
        let socket = self.directory.join(format!("pair{host}.sock"));
        let mut command = Process::new(program("vhost-net-backend")?);
        command.arg("--socket-path").arg(&socket).args(["--tap", TAP]);
        if role.is_some() {
            command.arg("--protected").arg("--control-path").arg(self.control(host));
        }
        let place = Place { namespace: self.namespaces[host], directory: self.directory, core: 0 };
        Server::start(place, command, socket, &format!("pair{host}"))
    }

    /// The two ends of a connection between the hosts.
    fn link(&self) -> Result<[TcpStream; 2]> {
        let [primary, secondary] = self.namespaces;
        let listener = secondary.run(|| TcpListener::bind((LINK_ADDRESSES[1], 0)))?.context("The link")?;
        let address = listener.local_addr().context("The link")?;
        let ours = primary.run(|| TcpStream::connect(address))?.context("The link")?;
        let theirs = listener.accept().context("The link")?.0;
        for end in [&ours, &theirs] {
            end.set_nodelay(true).context("The link")?;
        }
        Ok([ours, theirs])
    }

    /// Bytes that the secondary's host has sent on the cable.
    fn link_bytes(&self) -> Result<u64> {
        let text = self.namespaces[1].run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        // behind the name: eight figures of what came, and then those of what was sent (proc(5))
        let line = text.lines().find_map(|line| line.trim().strip_prefix(LINK)?.strip_prefix(':'));
        let sent = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
        sent.with_context(|| format!("No figures of {LINK}: {text}"))
    }
}

/// The controller of both back ends, which takes no checkpoints.
struct Pair {
    controls: [Client; 2],
    /// What the back ends said, except for markers.
    events: Arc<Mutex<Vec<Event>>>,
}

impl Pair {
    fn new(hosts: &Hosts<'_>) -> Result<Self> {
        let events = Arc::new(Mutex::new(Vec::new()));
        let connect = |host| {
            let events = events.clone();
            let keep = move |event: Option<Event>| {
                events.lock().unwrap_or_else(PoisonError::into_inner).extend(event);
            };
            Client::connect_within(&hosts.control(host), PATIENCE, keep)
        };
        Ok(Self { controls: [connect(0)?, connect(1)?], events })
    }

    fn measure(&mut self, hosts: &Hosts<'_>, duration: Duration) -> Result<(Figures, Toll)> {
        let client = hosts.namespaces[0];
        let to_guest = client::to_guest(client, duration)?;
        let before = hosts.link_bytes()?;
        let said = client::from_guest(client, duration)?;
        let link_bytes = hosts.link_bytes()? - before;
        let before = self.held()?;
        let reply_us = client::requests(client, duration)?;
        let held = self.held()?;
        let packets = held.packets - before.packets;
        let mut toll = Toll {
            link_share: link_bytes as f64 / said.bytes as f64,
            held_us: (held.us - before.us) as f64 / packets.max(1) as f64,
            ..Toll::default()
        };
        for event in self.events.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            match event {
                Event::CheckpointWanted { cause, detail } => {
                    eprintln!("A checkpoint is wanted: {cause}: {detail}");
                    toll.checkpoint_wanted = true;
                }
                Event::LinkLost { reason } => anyhow::bail!("The link is lost: {reason}"),
                Event::Marker { .. } => {}
            }
        }
        Ok((Figures { to_guest, from_guest: said.bytes_per_s, reply_us }, toll))
    }

    /// How things stand, for somebody who looks for the cause of a failure.
    fn status(&mut self) -> String {
        let events = format!("{:?}", self.events.lock().unwrap_or_else(PoisonError::into_inner));
        let status = |control: &mut Client| match control.call(&Command::Status, &[], PATIENCE) {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let [primary, secondary] = &mut self.controls;
        format!("{events}\n{}\n{}", status(primary), status(secondary))
    }

    /// What the primary has held so far.
    fn held(&mut self) -> Result<Held> {
        let status = self.controls[0].call(&Command::Status, &[], PATIENCE)?;
        let figure = |name: &str| {
            let pointer = format!("/pair/proxy/compare/{name}");
            let value = status.pointer(&pointer).and_then(Value::as_u64);
            value.with_context(|| format!("No {pointer} in {status}"))
        };
        Ok(Held { packets: figure("released_by_match")?, us: figure("waited_us")? })
    }
}

/// Packets that were held, and how long together.
struct Held {
    packets: u64,
    us: u64,
}
