//! A side from its start to its end.

use std::fs;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossbeam_channel::{Sender, unbounded};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::backends::{Backends, Sockets};
use super::connect::{accept, connect};
use super::event::{Device, Event};
use super::inbox::Inbox;
use super::operator::Request;
use super::status::{Failover, Shared};
use super::{alone, operator, primary, secondary};
use crate::config::Config;
use crate::failover::{Arbiter, ArbiterError, Heartbeat, open_arbiter};
use crate::link::{Channel, Hello, PROTOCOL_VERSION};
use crate::vm::Vm;
use crate::vm::qemu::{Disk, Nic, QemuConfig, QemuVm};

/// Time between two attempts to reach an arbiter that does not answer.
const ARBITER_RETRY: Duration = Duration::from_millis(100);

/// What `colo run` was told beside its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which of the two nodes this is.
    pub node: String,
    /// Compare all memory after each checkpoint.
    pub verify: bool,
    /// Directory for sockets.
    pub runtime_dir: PathBuf,
}

/// How a side ended, when it did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// In order: the guest switched itself off, or somebody asked.
    Ended(String),
    /// The peer goes on with the VM.
    Lost(String),
}

/// How being primary or secondary ended.
pub(super) enum Turn {
    /// The peer is lost: the arbiter decides.
    PeerLost(String),
    /// The VM is no longer wanted here.
    Ended(String),
}

/// Everything of one side.
pub(super) struct Side {
    pub(super) config: Config,
    pub(super) node: String,
    pub(super) verify: bool,
    pub(super) inbox: Inbox,
    pub(super) sender: Sender<Event>,
    pub(super) vm: QemuVm,
    pub(super) backends: Backends,
    pub(super) status: Shared,
    arbiter: Box<dyn Arbiter>,
    generation: u64,
}

/// Runs this node's side of a VM until it ends.
///
/// # Errors
/// Something that this side needs is not there or has failed. If the pair was protected, the peer goes on.
pub fn run(config: Config, options: &Options) -> anyhow::Result<End> {
    let node = &config.node[&options.node];
    let directory = socket_directory(options, &config.vm.name);
    fs::create_dir_all(&directory)
        .with_context(|| format!("The runtime directory {} cannot be made", directory.display()))?;
    let operator = crate::vhost_user::bind_unix(&directory.join("operator.sock"))
        .with_context(|| format!("VM {} cannot be started", config.vm.name))?;
    let (sender, receiver) = unbounded();
    let status = Shared::default();
    {
        let mut status = status.lock();
        status.vm.clone_from(&config.vm.name);
        status.node.clone_from(&options.node);
        config.other(&options.node).clone_into(&mut status.peer);
    }
    status.set("starting", "starting QEMU and the back ends");
    let cleanup = Cleanup(directory.clone());
    operator::serve(operator, status.clone(), sender.clone())?;
    forward_signals(sender.clone(), status.clone(), directory.clone())?;

    let faults = crate::check::faults(&config, &options.node);
    if !faults.is_empty() {
        bail!("{}", faults.join("; "));
    }
    let arbiter = open_arbiter(&config.arbiter).context(
        "Both hosts must see the directory arbiter.directory; create it, or correct the configuration",
    )?;
    let generation = arbiter.current(&config.vm.name)?;
    status.lock().generation = generation.number;
    let is_primary = generation.owner.as_ref().unwrap_or(&config.link.primary) == &options.node;
    let listener = if is_primary { None } else { Some(listen(&config, &options.node)?) };

    let sockets = Sockets::in_directory(&directory);
    let ram_pages = config.vm.memory_mib * 256;
    let backends = Backends::start(&config, node, &sockets, ram_pages, &sender)?;
    let vm = QemuVm::launch(&qemu_config(&config, &options.node, &directory))?;
    watch_end(&vm, sender.clone())?;
    status.lock().pages = vm.pages();
    let cards = config.vm.mac.len();
    let devices = (0..cards).map(Device::Net).chain([Device::Block]).collect();
    let mut side = Side {
        node: options.node.clone(),
        verify: options.verify,
        inbox: Inbox::new(receiver, devices),
        sender,
        vm,
        backends,
        status,
        arbiter,
        generation: generation.number,
        config,
    };
    let hello = side.hello()?;
    let turn = match listener {
        None => {
            let to = side.config.link_address(side.config.other(&side.node));
            side.status.set("waiting", format!("for the secondary at {to}"));
            let limit = side.config.link.connect_limit_s;
            let links = connect(to, &hello, cards, (limit > 0).then(|| Duration::from_secs(limit)))?;
            primary::run(&mut side, links)?
        }
        Some(listener) => {
            side.status.set("waiting", format!("for the primary on {}", listener.local_addr()?));
            let links = accept(&listener, &hello, cards)?;
            drop(listener);
            secondary::run(&mut side, links)?
        }
    };
    let end = match turn {
        Turn::Ended(why) => End::Ended(why),
        Turn::PeerLost(reason) => match side.decide(&reason)? {
            None => alone::run(&mut side)?,
            Some(end) => end,
        },
    };
    drop(cleanup);
    Ok(end)
}

/// The directory of a side's sockets.
pub(super) fn socket_directory(options: &Options, vm: &str) -> PathBuf {
    options.runtime_dir.join(format!("{vm}@{}", options.node))
}

/// Removes the sockets at the end.
struct Cleanup(PathBuf);

impl Drop for Cleanup {
    fn drop(&mut self) {
        // Best effort: a socket file that is left is replaced at the next start.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn listen(config: &Config, node: &str) -> anyhow::Result<TcpListener> {
    let address = config.link_address(node);
    TcpListener::bind(address).with_context(|| {
        format!(
            "The link address {address} of node {node} cannot be used: is it this host's, and the port free?"
        )
    })
}

fn forward_signals(sender: Sender<Event>, status: Shared, directory: PathBuf) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            // Before the pair has met nothing needs an orderly end; children die with us.
            if matches!(status.lock().role.as_str(), "starting" | "waiting") {
                drop(Cleanup(directory));
                std::process::exit(128 + signal);
            }
            if sender.send(Event::Terminate).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// What QEMU is started with on a node, with the sockets of the back ends in `directory`.
pub fn qemu_config(config: &Config, node: &str, directory: &Path) -> QemuConfig {
    let sockets = Sockets::in_directory(directory);
    let vm = &config.vm;
    QemuConfig {
        binary: vm.qemu.clone(),
        name: vm.name.clone(),
        memory_bytes: vm.memory_mib << 20,
        vcpus: vm.vcpus,
        machine: vm.machine.clone(),
        accelerator: vm.accel.parse().expect("checked when the configuration was loaded"),
        cpu: vm.cpu.clone(),
        kernel: vm.kernel.clone(),
        initrd: vm.initrd.clone(),
        append: vm.append.clone(),
        serial: vm.serial_log.as_ref().map(|path| path.replace("{node}", node).into()),
        nics: (vm.mac.iter().enumerate())
            .map(|(card, mac)| Nic { socket: sockets.vhost_user(Device::Net(card)), mac: mac.clone() })
            .collect(),
        disks: vec![Disk { socket: sockets.vhost_user(Device::Block), queues: config.disk.queues }],
        extra_args: vm.qemu_args.clone(),
        ..QemuConfig::default()
    }
}

/// Tells when QEMU has ended.
fn watch_end(vm: &QemuVm, sender: Sender<Event>) -> anyhow::Result<()> {
    let pidfd = vm.pidfd().try_clone_to_owned()?;
    thread::Builder::new().name("qemu-end".into()).spawn(move || {
        while poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
        // Nobody listens any more when this side is ending.
        let _ = sender.send(Event::VmEnded);
    })?;
    Ok(())
}

impl Side {
    /// What this side says of itself to the peer: what must be equal for a checkpoint to fit.
    fn hello(&mut self) -> anyhow::Result<Hello> {
        let block = self.backends.status(Device::Block)?;
        let digest = block["disk_digest"].as_str().context("The disk's digest is missing in its status")?;
        let fact = |name: &str, value: String| (name.to_owned(), value);
        Ok(Hello {
            protocol: PROTOCOL_VERSION,
            vm: self.config.vm.name.clone(),
            node: self.node.clone(),
            channel: Channel::Checkpoint,
            generation: self.generation,
            facts: vec![
                fact("The number of network cards", self.config.vm.mac.len().to_string()),
                fact("The disk's length in bytes", self.backends.disk_bytes().to_string()),
            ]
            .into_iter()
            .chain(self.vm.identity().lines().filter_map(|line| {
                let (name, value) = line.split_once(": ")?;
                Some(fact(&format!("The VM's {name}"), value.to_owned()))
            }))
            .chain([fact(
                "The disk's content (copy the primary's disk over the secondary's; digest)",
                digest.into(),
            )])
            .collect(),
        })
    }

    /// Starts the heartbeat. When it finds the peer lost it also breaks `link`, so that a loop that is blocked in
    /// writing to it comes back.
    pub(super) fn start_heartbeat(&self, heartbeat: TcpStream, link: TcpStream) -> anyhow::Result<Heartbeat> {
        let sender = self.sender.clone();
        let on_loss = move |loss| {
            // Nobody listens any more when this side is ending; the link may be broken already.
            let _ = sender.send(Event::Heartbeat(loss));
            let _ = link.shutdown(Shutdown::Both);
        };
        Ok(Heartbeat::start(heartbeat, self.config.heartbeat.clone(), on_loss)?)
    }

    /// When a peer that does not answer is to be given up.
    pub(super) fn checkpoint_deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.config.checkpoint.limit_ms)
    }

    /// The status with the back ends' figures.
    pub(super) fn full_status(&mut self) -> Value {
        let mut value = serde_json::to_value(&*self.status.lock()).expect("always JSON");
        let mut figures =
            |device| self.backends.status(device).unwrap_or_else(|error| json!({"error": error.0}));
        value["net"] = (0..self.config.vm.mac.len()).map(Device::Net).map(&mut figures).collect();
        value["block"] = figures(Device::Block);
        value
    }

    /// QEMU has ended: the words for it if the guest wanted that, else an error.
    pub(super) fn vm_ended(&mut self) -> anyhow::Result<String> {
        // The monitor is closed by now, what it said last can still be read.
        let said = self.vm.qmp().take_events().unwrap_or_default();
        if said.iter().any(|event| event.name == "SHUTDOWN" && event.data["guest"] == true) {
            return Ok("the guest has switched itself off".into());
        }
        bail!("This side has failed: QEMU has ended: {}", self.vm.ended().unwrap_or_default())
    }

    /// Answers an operator who wants something that this role does not do.
    pub(super) fn refuse(request: Request, role: &str) -> Result<Value, String> {
        Err(match request {
            Request::Status => unreachable!("every role tells its status"),
            Request::Checkpoint => format!("This side is {role}: ask the primary for a checkpoint"),
            Request::Failover => format!("This side is {role}: ask the secondary to take over"),
        })
    }

    /// The peer is lost, and the back ends are detached. Claims the next generation; `None` means that this side has it and goes on.
    fn decide(&mut self, reason: &str) -> anyhow::Result<Option<End>> {
        let began = Instant::now();
        let us = || began.elapsed().as_micros() as u64;
        self.status.set("deciding", format!("the peer is lost: {reason}"));
        let winner = self.claim_next_at_last()?;
        let claimed_us = us();
        self.generation += 1;
        self.status.lock().generation = self.generation;
        if winner != self.node {
            self.backends.silence()?;
            // The VM is stopped for good with QEMU at the end of this process; stop it now all the same.
            self.vm.pause()?;
            return Ok(Some(End::Lost(format!(
                "node {winner} has generation {}; {reason}",
                self.generation
            ))));
        }
        self.backends.take_over()?;
        self.vm.resume()?;
        self.status.lock().failover =
            Some(Failover { reason: reason.to_owned(), claimed_us, serving_us: us() });
        self.status
            .set("alone", format!("with generation {}, since the peer is lost: {reason}", self.generation));
        Ok(None)
    }

    /// Claims the generation after the one that this side knows. Returns the node that has it.
    pub(super) fn claim_next(&self) -> Result<String, ArbiterError> {
        self.arbiter.claim(&self.config.vm.name, self.generation + 1, &self.node)
    }

    /// The same, until the arbiter answers.
    fn claim_next_at_last(&mut self) -> anyhow::Result<String> {
        let mut told = false;
        loop {
            match self.claim_next() {
                Ok(winner) => return Ok(winner),
                Err(error) if !told => {
                    tracing::error!("{error}; this side stays silent and asks again");
                    told = true;
                }
                Err(_) => {}
            }
            match self.inbox.next(Some(Instant::now() + ARBITER_RETRY)) {
                Some(Event::Operator(Request::Status, answer)) => {
                    // An operator that has gone away needs no answer.
                    let _ = answer.send(Ok(self.full_status()));
                }
                Some(Event::Operator(request, answer)) => {
                    let _ = answer.send(Self::refuse(request, "waiting for the arbiter"));
                }
                Some(Event::Terminate) => bail!("Asked to end while waiting for the arbiter"),
                Some(event) => {
                    if let Some(fatal) = event.fatal() {
                        bail!("This side has failed: {fatal}");
                    }
                }
                None => {}
            }
        }
    }
}
