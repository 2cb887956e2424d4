//! The device back ends of a side: child processes with a control socket each.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use crossbeam_channel::Sender;
use serde_json::Value;

use super::event::{Device, Event};
use crate::checkpoint::{DeviceError, Devices};
use crate::config::{Config, DiskConfig, NodeConfig, policy};
use crate::control::{Client, Command, Event as BackendEvent, Role};
use crate::memory::{DirtyLog, PageSet};

/// How long a back end may take to answer a command that moves no data.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long it may take to write its block buffer back.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(600);

/// One back end.
struct Backend {
    device: Device,
    child: Child,
    client: Client,
    dirty: DirtyLog,
}

/// All of them.
pub(super) struct Backends {
    /// One for each network card.
    nets: Vec<Backend>,
    block: Backend,
}

/// Where the sockets of a side are.
pub(super) struct Sockets {
    directory: PathBuf,
}

impl Sockets {
    pub(super) fn in_directory(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The vhost-user socket of a device, to which QEMU connects.
    pub(super) fn vhost_user(&self, device: Device) -> PathBuf {
        self.directory.join(format!("{}.sock", Self::stem(device)))
    }

    fn control(&self, device: Device) -> PathBuf {
        self.directory.join(format!("{}.control", Self::stem(device)))
    }

    fn stem(device: Device) -> String {
        match device {
            Device::Net(0) => "net".into(),
            Device::Net(card) => format!("net{card}"),
            Device::Block => "blk".into(),
        }
    }
}

impl Backends {
    /// Starts them and waits until they serve.
    pub(super) fn start(
        config: &Config,
        node: &NodeConfig,
        sockets: &Sockets,
        ram_pages: u64,
        events: &Sender<Event>,
    ) -> anyhow::Result<Self> {
        let nets = (0..config.vm.mac.len()).map(|card| {
            Backend::start(net_process(config, node, card), Device::Net(card), sockets, ram_pages, events)
        });
        let nets = nets.collect::<anyhow::Result<_>>()?;
        let block = block_process(&config.disk, node);
        Ok(Self { nets, block: Backend::start(block, Device::Block, sockets, ram_pages, events)? })
    }

    /// Length of the disk in bytes.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.block.client.greeting().disk_bytes.unwrap_or(0)
    }

    /// Hands them their connections to the peer.
    pub(super) fn attach(
        &mut self,
        role: Role,
        epoch: u64,
        network: Vec<TcpStream>,
        block: TcpStream,
    ) -> anyhow::Result<()> {
        self.block.attach(role, epoch, block)?;
        self.nets.iter_mut().zip(network).try_for_each(|(net, link)| net.attach(role, epoch, link))
    }

    /// The peer is lost: none uses its link any more, nothing gets out.
    pub(super) fn detach(&mut self) -> Result<(), DeviceError> {
        self.tell_nets(&Command::Detach)?;
        self.block.tell(&Command::Detach)
    }

    /// This side goes on alone. The disk comes first, so that nothing is promised that is not on it.
    pub(super) fn take_over(&mut self) -> Result<(), DeviceError> {
        self.block.call(&Command::TakeOver, &[], TAKE_OVER_LIMIT)?;
        self.tell_nets(&Command::TakeOver)
    }

    /// This side has lost: nothing gets out any more.
    pub(super) fn silence(&mut self) -> Result<(), DeviceError> {
        self.tell_nets(&Command::Silence)?;
        self.block.tell(&Command::Silence)
    }

    fn tell_nets(&mut self, command: &Command) -> Result<(), DeviceError> {
        self.nets.iter_mut().try_for_each(|net| net.tell(command))
    }

    /// A back end's own figures.
    pub(super) fn status(&mut self, device: Device) -> Result<Value, DeviceError> {
        match device {
            Device::Net(card) => self.nets[card].call(&Command::Status, &[], ANSWER_LIMIT),
            Device::Block => self.block.call(&Command::Status, &[], ANSWER_LIMIT),
        }
    }
}

fn net_process(config: &Config, node: &NodeConfig, card: usize) -> Process {
    let mut process = Process::new(find_program(&config.net.program));
    // No --mac: QEMU makes the card's configuration up itself, and warns of a back end that offers one.
    process.arg("--tap").arg(&node.tap[card]);
    process.arg("--poll-us").arg(config.net.poll_us.to_string());
    process.arg("--held-ms-max").arg(config.checkpoint.held_ms_max.to_string());
    process.arg("--held-bytes-max").arg(config.checkpoint.held_bytes_max.to_string());
    if !config.net.policy.is_empty() {
        process.arg("--policy").arg(policy::to_json(&config.net.policy));
    }
    process.arg("--digest").arg(config.net.digest.name());
    if let Some(core) = node.net_core.get(card) {
        process.arg("--core").arg(core.to_string());
    }
    process
}

fn block_process(disk: &DiskConfig, node: &NodeConfig) -> Process {
    let mut process = Process::new(find_program(&disk.program));
    process.arg("--blk-file").arg(&node.disk);
    process.arg("--poll-us").arg(disk.poll_us.to_string());
    process.arg("--buffer-bytes").arg(disk.buffer_bytes.to_string());
    process.arg("--cache").arg(disk.cache.name());
    process.arg("--block-size").arg(disk.block_size.to_string());
    process.arg("--queues").arg(disk.queues.to_string());
    if disk.workers > 0 {
        process.arg("--workers").arg(disk.workers.to_string());
    }
    if !disk.serial.is_empty() {
        // in one, since it may begin with a dash
        process.arg(format!("--serial={}", disk.serial));
    }
    if let Some(core) = node.disk_core {
        process.arg("--core").arg(core.to_string());
    }
    process
}

impl Devices for Backends {
    fn marker(&mut self, epoch: u64) -> Result<(), DeviceError> {
        self.tell_nets(&Command::Marker { epoch })?;
        self.block.tell(&Command::Marker { epoch })
    }

    fn commit(&mut self, epoch: u64) -> Result<(), DeviceError> {
        self.block.tell(&Command::Commit { epoch })?;
        self.tell_nets(&Command::Commit { epoch })
    }

    fn take_dirty(&mut self, dirty: &mut PageSet) {
        for net in &mut self.nets {
            net.dirty.drain(dirty);
        }
        self.block.dirty.drain(dirty);
    }
}

impl Backend {
    fn start(
        mut process: Process,
        device: Device,
        sockets: &Sockets,
        ram_pages: u64,
        events: &Sender<Event>,
    ) -> anyhow::Result<Self> {
        let name = device.name();
        let program = process.get_program().to_owned();
        // We listen on the control socket before the back end exists: connecting then needs no waiting for it.
        let control = sockets.control(device);
        let listener = crate::vhost_user::bind_unix(&control)
            .with_context(|| format!("The control socket of the {name} back end cannot be made"))?;
        process.arg("--protected");
        process.arg("--socket-path").arg(sockets.vhost_user(device));
        process.arg("--control-fd").arg(listener.as_raw_fd().to_string());
        process.stdin(Stdio::null()).stdout(Stdio::null());
        die_with_us(&mut process, listener.as_fd());
        let mut child = process.spawn().with_context(|| {
            format!("{} cannot be started: install it, or name it in the configuration", program.display())
        })?;
        drop::<UnixListener>(listener);
        let sender = events.clone();
        let on_event = move |event| {
            // Nobody listens any more when this side is ending.
            let _ = sender.send(translate(device, event));
        };
        let mut client = match Client::connect(&control, on_event) {
            Ok(client) => client,
            Err(error) => {
                let _ = child.kill();
                let status = child.wait()?;
                bail!(
                    "The {name} back end has failed at start ({status}): {error}; its own message is above"
                );
            }
        };
        let dirty = DirtyLog::create(ram_pages).context("The dirty log cannot be made")?;
        client.call(&Command::DirtyLog { pages: ram_pages }, &[dirty.as_fd()], ANSWER_LIMIT)?;
        Ok(Self { device, child, client, dirty })
    }

    fn attach(&mut self, role: Role, epoch: u64, link: TcpStream) -> anyhow::Result<()> {
        let link = OwnedFd::from(link);
        self.client.call(&Command::Attach { role, epoch }, &[link.as_fd()], ANSWER_LIMIT)?;
        Ok(())
    }

    fn tell(&mut self, command: &Command) -> Result<(), DeviceError> {
        self.call(command, &[], ANSWER_LIMIT).map(|_| ())
    }

    fn call(
        &mut self,
        command: &Command,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Value, DeviceError> {
        self.client
            .call(command, fds, limit)
            .map_err(|error| DeviceError(format!("The {} back end failed: {error}", self.device.name())))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Nothing of it is needed any more: what has to be on the disk is there, or belongs to the peer.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn translate(device: Device, event: Option<BackendEvent>) -> Event {
    match event {
        Some(BackendEvent::CheckpointWanted { cause, detail }) => Event::Wanted { cause, detail },
        Some(BackendEvent::Marker { epoch }) => Event::Marker { device, epoch },
        Some(BackendEvent::LinkLost { reason }) => Event::DeviceLink { device, reason },
        None => Event::DeviceGone(device),
    }
}

/// A program without a path is first looked for beside this one, so that a build tree or an unpacked archive works
/// as it is; then in `PATH`.
pub fn find_program(program: &Path) -> PathBuf {
    if program.components().count() == 1
        && let Ok(ours) = std::env::current_exe()
        && let beside = ours.with_file_name(program)
        && beside.is_file()
    {
        return beside;
    }
    program.to_owned()
}

/// Makes a child inherit one descriptor, and die when we do: a side fails as a whole.
#[expect(unsafe_code, reason = "what a child does between fork and exec has no safe interface")]
fn die_with_us(process: &mut Process, inherited: BorrowedFd<'_>) {
    let inherited = inherited.as_raw_fd();
    let parent = rustix::process::getpid();
    // SAFETY: only async-signal-safe system calls, no allocation, and the descriptor is open in the child.
    unsafe {
        process.pre_exec(move || {
            let inherited = BorrowedFd::borrow_raw(inherited);
            rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CacheMode;

    #[test]
    fn the_network_back_end_gets_the_rules_of_the_configuration() {
        let example = include_str!("../../tuning/example.toml");
        let line = |config: &Config| {
            let process = net_process(config, &config.node["a"], 0);
            process.get_args().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let mut config: Config = toml::from_str(example).unwrap();
        let plain = "--tap web0 --poll-us 20 --held-ms-max 100 --held-bytes-max 16777216";
        assert_eq!(line(&config), format!("{plain} --digest auto"));
        let rule = "protocol = \"udp\"\nguest_port = 123\naction = \"bypass\"";
        config.net.policy = vec![toml::from_str(rule).unwrap()];
        let policy = r#"[{"protocol":"udp","guest_port":123,"action":"bypass"}]"#;
        assert_eq!(line(&config), format!("{plain} --policy {policy} --digest auto"));
    }

    #[test]
    fn the_disk_is_served_as_it_is_configured() {
        let node = NodeConfig {
            address: "10.0.0.1".parse().unwrap(),
            disk: "/srv/web.img".into(),
            tap: vec!["web0".into()],
            net_core: Vec::new(),
            disk_core: Some(3),
        };
        let line = |disk: &DiskConfig| {
            let process = block_process(disk, &node);
            process.get_args().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            line(&DiskConfig::default()),
            "--blk-file /srv/web.img --poll-us 20 --buffer-bytes 268435456 --cache writeback --block-size 512 \
             --queues 1 --core 3"
        );
        let other = DiskConfig {
            serial: "-7".into(),
            cache: CacheMode::Writethrough,
            block_size: 4096,
            queues: 4,
            workers: 1,
            ..DiskConfig::default()
        };
        assert!(
            line(&other).ends_with(
                "--cache writethrough --block-size 4096 --queues 4 --workers 1 --serial=-7 --core 3"
            ),
            "{}",
            line(&other)
        );
    }
}
