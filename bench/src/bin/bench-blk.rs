//! The block device server against its peers, and a load generator for one server.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use colo_bench::Place;
use colo_bench::blk::cases::{self, Case, Kind};
use colo_bench::blk::compare::Effort;
use colo_bench::blk::contender::{Field, Setting};
use colo_bench::blk::{self, Access, Connection, Disk, Interrupts, Load, Measured, Shape};
use colo_bench::command_line::{Sides, run};
use colo_bench::others::Others;

use colo_bench::report::{self, Row};
use colo_lab::{Run, random};

const DISK_BYTES: u64 = 1 << 30;

/// Compares vhost-blk-backend with qemu-storage-daemon and with bare I/O, side by side.
///
/// Same client, same file, same cores, in turn, medians. The exit status is 0 whenever it has measured; whether the
/// targets are met is in the table and in the JSON file.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    /// Do not come before other programs on this machine
    #[arg(long, global = true)]
    no_priority: bool,
    #[command(flatten)]
    comparison: Comparison,
}

#[derive(Args)]
struct Comparison {
    #[command(flatten)]
    sides: Sides,
    /// A look only: one round of 0.2 seconds
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// Where the rows go, as JSON
    #[arg(long, default_value = "target/bench/blk.json", value_name = "PATH")]
    json: PathBuf,
}

#[derive(Subcommand)]
enum What {
    /// Loads one server that is running already, once, and tells what it does
    Load(One),
}

#[derive(Args)]
struct One {
    /// The server's vhost-user socket; without one the load generator runs against a device in this process
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The server's process, to tell its processor time
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Requests in flight, in each queue
    #[arg(long, default_value_t = 32, value_name = "NUMBER")]
    depth: u16,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    block_bytes: usize,
    /// Of 100 requests so many write
    #[arg(long, default_value_t = 0, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    write_percent: u8,
    /// One block after the other, instead of at random places
    #[arg(long)]
    sequential: bool,
    /// Number of queues
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    queues: u16,
    /// A client thread for each queue, instead of one for all
    #[arg(long)]
    threads: bool,
    /// Sleep until the device signals, instead of polling
    #[arg(long)]
    eventfd: bool,
    /// Do not negotiate EVENT_IDX
    #[arg(long)]
    no_event_idx: bool,
    /// The client's core
    #[arg(long, default_value_t = 1, value_name = "CORE")]
    client_core: usize,
    /// The core of the device in this process
    #[arg(long, default_value_t = 0, value_name = "CORE")]
    server_core: usize,
    /// How long to measure
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run(arguments.no_priority, || match &arguments.what {
        Some(What::Load(one)) => load(one),
        None => run_comparison(&arguments.comparison),
    })
}

fn run_comparison(options: &Comparison) -> Result<()> {
    let cases = options.sides.choose(Kind::ALL.into_iter().flat_map(Case::of), Case::name)?;
    if options.sides.list {
        cases.iter().for_each(|case| println!("{}", case.name()));
        return Ok(());
    }
    let effort = if options.quick {
        Effort { rounds: 1, duration: Duration::from_millis(200) }
    } else {
        Effort { rounds: options.sides.rounds.into(), duration: options.sides.duration() }
    };
    let others = Others::watch()?;
    let rows = measure(options, &cases, effort)?;
    let busy = others.busy_cores()?;
    println!();
    report::publish(&rows, busy, &options.json)
}

/// Backing by backing: within one, all servers are there at the same time.
fn measure(options: &Comparison, cases: &[Case], effort: Effort) -> Result<Vec<Row>> {
    let run = Run::begin()?;
    let namespace = run.add_namespace("bench")?;
    let ours = options.sides.ours();
    let seed = random() >> 1;
    let mut rows = Vec::new();
    cases::print_heading();
    for kind in Kind::ALL {
        let (queues, alone): (Vec<&Case>, Vec<&Case>) =
            cases.iter().filter(|case| case.kind == kind).partition(|case| case.needs_queues());
        if queues.is_empty() && alone.is_empty() {
            continue;
        }
        let before = Interrupts::now()?;
        let disk = match kind {
            Kind::Null => None,
            Kind::Tmpfs => Some(Disk::create(Path::new("/dev/shm"), DISK_BYTES, false)?),
            Kind::Disk => Some(Disk::create(Path::new("/var/tmp"), DISK_BYTES, true)?),
        };
        let (mut client_core, mut core) = (options.sides.client_core, options.sides.server_core);
        if kind == Kind::Disk && Interrupts::now()?.busiest_core_since(&before) == Some(client_core) {
            (client_core, core) = (core, client_core);
            eprintln!(
                "the disk's interrupts arrive on core {core}: there the servers run, on core {client_core} the client"
            );
        }
        let place = Place { namespace: &namespace, directory: run.directory(), core };
        let setting =
            Setting { place, client_core, disk: disk.as_ref(), disk_bytes: DISK_BYTES, ours: &ours };
        if !alone.is_empty() {
            let field = Field::start(setting, seed)?;
            for case in alone {
                rows.extend(case.run(&field, effort)?);
            }
        }
        if !queues.is_empty() {
            let field = cases::queues_field(setting, seed)?;
            for case in queues {
                rows.extend(case.run(&field, effort)?);
            }
        }
    }
    Ok(rows)
}

fn load(one: &One) -> Result<()> {
    let load = Load {
        access: Access { write_percent: one.write_percent, random: !one.sequential },
        polling: !one.eventfd,
        thread_per_queue: one.threads,
        core: Some(one.client_core),
        duration: Duration::from_secs_f64(one.seconds),
    };
    let measured = match &one.socket {
        None => blk::ceiling::run(one.depth, one.server_core, &load)?,
        Some(socket) => {
            let shape = Shape {
                queues: one.queues,
                depth: one.depth,
                block_bytes: one.block_bytes,
                event_idx: !one.no_event_idx,
            };
            let mut connection = Connection::open(socket, shape)?;
            let cpu = || one.pid.map_or(Ok(Duration::ZERO), colo_bench::cpu_time);
            let measured = blk::load::run(&mut connection, &load, cpu)?;
            connection.close()?;
            measured
        }
    };
    let Measured { iops, p50_us, p99_us, cpu_percent } = measured;
    println!("{iops:.0} IOPS, p50 {p50_us:.2} us, p99 {p99_us:.2} us, server CPU {cpu_percent:.1} %");
    Ok(())
}
