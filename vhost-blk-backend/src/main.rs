//! `vhost-blk-backend`: serves a disk to one virtual machine.

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{ArgGroup, Parser};
use colo::control;
use colo::memory::DirtyLogs;
use colo::vhost_user;
use vhost_blk_backend::backend::{BUFFER_BYTES_MIN, Backend, Options};
use vhost_blk_backend::control::Controlled;
use vhost_blk_backend::image::{Direct, Hold, ImageOptions, Source};

/// Serves a raw disk image or block device to a virtual machine as a vhost-user-blk device.
///
/// Alone it is a plain back end: give its --socket-path to QEMU as
/// `-chardev socket,id=disk,path=… -device vhost-user-blk-pci,chardev=disk,num-queues=1`, with guest RAM in a
/// shared memory backend. Under `colo run`, which starts it with --control-path and --protected, it replicates the
/// disk to a peer.
#[derive(Debug, Parser)]
#[command(version, group = ArgGroup::new("control").args(["control_path", "control_fd"]))]
struct Arguments {
    /// Unix socket on which the VMM is awaited
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// Unix socket on which a controller is awaited
    #[arg(long, value_name = "PATH")]
    control_path: Option<PathBuf>,
    /// The same, as the number of an open descriptor that is listening already
    #[arg(long, value_name = "NUMBER", conflicts_with = "control_path")]
    control_fd: Option<i32>,
    /// Touch the disk only as a controller says: until it attaches a peer, requests wait
    #[arg(long, requires = "control", conflicts_with = "read_only")]
    protected: bool,
    /// Raw disk image or block device; its length must be a multiple of 512 bytes
    #[arg(long, value_name = "PATH")]
    blk_file: PathBuf,
    /// Refuse writes; several back ends may then serve one image
    #[arg(long)]
    read_only: bool,
    /// Serial number of the disk, at most 20 bytes
    #[arg(long, default_value = "", value_name = "TEXT")]
    serial: String,
    /// Number of queues, each with a worker thread; QEMU's num-queues must not be greater
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// The longest that an idle worker polls before it sleeps, in microseconds; the window adapts, 0 is never to poll
    #[arg(long, default_value_t = 50, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll_us: u64,
    /// Cores for the workers, by number, separated by commas: the first queue's, the second's, and so on
    #[arg(long, value_delimiter = ',', value_name = "CORES")]
    core: Vec<usize>,
    /// Limit of the block buffer's memory in bytes; when it is nearly full, a checkpoint is asked for
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    buffer_bytes: usize,
}

fn main() -> ExitCode {
    match serve(Arguments::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("vhost-blk-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Arguments) -> anyhow::Result<Infallible> {
    // before anything else is opened: the descriptor is known by its number only
    let control = match (arguments.control_fd, &arguments.control_path) {
        (Some(number), _) => Some(control::Server::inherit(number).context("--control-fd")?),
        (None, Some(path)) => Some(control::Server::bind(path).context("The control socket cannot be made")?),
        (None, None) => None,
    };
    colo::logging::start().map_err(anyhow::Error::msg)?;
    ensure!(
        arguments.serial.len() <= 20,
        "--serial has {} bytes, a virtio disk's serial number has at most 20",
        arguments.serial.len()
    );
    ensure!(
        arguments.buffer_bytes >= BUFFER_BYTES_MIN,
        "--buffer-bytes is {}, at least {BUFFER_BYTES_MIN} are needed",
        arguments.buffer_bytes
    );
    let backend = Backend::start(&Options {
        image: ImageOptions {
            source: Source::File(arguments.blk_file),
            read_only: arguments.read_only,
            // The disk ring does not align what it transfers.
            direct: Direct::Off,
            block_bytes: 512,
            // The queues do not acquire the image.
            hold: Hold::WhileOpen,
        },
        serial: arguments.serial,
        queues: arguments.queues.into(),
        workers: arguments.queues.into(),
        writeback: true,
        poll: Duration::from_micros(arguments.poll_us),
        cores: arguments.core,
    })?;
    let logs = DirtyLogs::new();
    let server = vhost_user::Server::bind(&arguments.socket_path, backend.clone(), logs.clone())
        .context("The vhost-user socket cannot be made")?;
    match control {
        None => backend.serve_alone(),
        Some(control) => {
            let events = control.events();
            let mut controlled =
                Controlled::new(backend, logs, events, arguments.protected, arguments.buffer_bytes)
                    .context("The digest of the disk")?;
            std::thread::Builder::new().name("control".into()).spawn(move || {
                let greeting = controlled.greeting();
                let Err(error) = control.run(&greeting, &mut controlled) else {
                    return;
                };
                // Nobody could tell us any more that the peer has taken over: fail stop.
                tracing::error!("Control socket: {error}");
                std::process::exit(1);
            })?;
        }
    }
    server.run().context("The vhost-user socket has failed")?;
    bail!("The vhost-user server has ended")
}
