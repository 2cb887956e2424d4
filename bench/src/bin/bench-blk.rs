//! The block device server against its peers, and a load generator for one server.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use colo_bench::blk::{self, Access, Connection, Load, Measured, Shape};
use colo_bench::priority::Priority;
use colo_lab::end_on_signals;

/// Measures vhost-user-blk servers.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
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
    end_on_signals();
    let _priority = Priority::take();
    let result = match Arguments::parse().what {
        Some(What::Load(one)) => load(&one),
        None => Ok(()),
    };
    if let Err(error) = result {
        eprintln!("FAILED: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
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
            let cpu = || one.pid.map_or(Ok(Duration::ZERO), blk::cpu_time);
            let measured = blk::load::run(&mut connection, &load, cpu)?;
            connection.close()?;
            measured
        }
    };
    let Measured { iops, p50_us, p99_us, cpu_percent } = measured;
    println!("{iops:.0} IOPS, p50 {p50_us:.2} us, p99 {p99_us:.2} us, server CPU {cpu_percent:.1} %");
    Ok(())
}
