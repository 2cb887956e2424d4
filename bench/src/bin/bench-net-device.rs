//! `make bench-net-device`: our network back end against DPDK's testpmd, side by side and in turn.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use colo_bench::command_line::{Sides, run};
use colo_bench::net::{self, Card, Lan, Load, Measured, Way};
use colo_bench::others::Others;
use colo_bench::report::{self, Row, median};
use colo_bench::{Place, Server};
use colo_lab::Run;

/// Buffers in each queue.
const DEPTH: u16 = 256;
/// Compares vhost-net-backend with DPDK's testpmd (net_vhost): a guest that drives its rings itself on one core, the
/// server on another, and no LAN.
///
/// Needs root, two cores, 512 MiB for huge pages and Debian's dpdk-dev with librte-net-vhost23, librte-net-tap23 and
/// librte-mempool-ring23.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
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
    /// Where the rows go, as JSON
    #[arg(long, default_value = "target/bench/net-device.json", value_name = "PATH")]
    json: PathBuf,
}

#[derive(Subcommand)]
enum What {
    /// Loads one server that is running already, once, and tells what it does
    Load(One),
}

#[derive(Args)]
struct One {
    /// The server's vhost-user socket
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Which way frames go: transmit, receive, forward, round-trip
    #[arg(long, default_value = "transmit")]
    way: Way,
    /// Length of a frame that is sent
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    frame_bytes: usize,
    /// Buffers in each queue
    #[arg(long, default_value_t = DEPTH, value_name = "NUMBER")]
    depth: u16,
    /// The client's core
    #[arg(long, default_value_t = 1, value_name = "CORE")]
    client_core: usize,
    /// How long to measure
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
}

/// One comparison.
struct Case {
    way: Way,
    lan: Lan,
    frame_bytes: usize,
    target: f64,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        for frame_bytes in [64, 1514] {
            for (way, lan) in [
                (Way::Transmit, Lan::Drop),
                (Way::Receive, Lan::Generate(frame_bytes)),
                (Way::Forward, Lan::Reflect),
            ] {
                cases.push(Self { way, lan, frame_bytes, target: 0.8 });
            }
        }
        for frame_bytes in [64, 1514] {
            cases.push(Self { way: Way::Transmit, lan: Lan::Tap, frame_bytes, target: 2.0 });
        }
        // the time may be 1.2 of the peer's
        cases.push(Self { way: Way::RoundTrip, lan: Lan::Reflect, frame_bytes: 64, target: 1.0 / 1.2 });
        cases
    }

    fn name(&self) -> String {
        let way = match self.way {
            Way::Transmit if self.lan == Lan::Tap => "guest to tap",
            Way::Transmit => "guest to back end",
            Way::Receive => "back end to guest",
            Way::Forward => "there and back",
            Way::RoundTrip => "one frame there and back",
        };
        format!("{way}, {} B", self.frame_bytes)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    run(arguments.no_priority, || match &arguments.what {
        Some(What::Load(one)) => load(one),
        None => compare(&arguments.comparison),
    })
}

fn load(one: &One) -> Result<()> {
    let mut card = Card::open(&one.socket, one.depth)?;
    let load = Load {
        way: one.way,
        frame_bytes: one.frame_bytes,
        core: one.client_core,
        duration: Duration::from_secs_f64(one.seconds),
    };
    let Measured { frames_per_s, p50_us, p99_us } = net::load::run(&mut card, &load)?;
    card.close()?;
    println!("{frames_per_s:.0} frames/s, p50 {p50_us:.2} us, p99 {p99_us:.2} us");
    Ok(())
}

fn compare(options: &Comparison) -> Result<()> {
    let sides = &options.sides;
    let run = Run::begin()?;
    let namespace = run.add_namespace("bench")?;
    net::add_lan(&namespace)?;
    let place = Place { namespace: &namespace, directory: run.directory(), core: sides.server_core };
    let more = sides.ours();
    net::huge_pages::reserve()?;
    let others = Others::watch()?;
    let mut rows = Vec::new();
    for case in Case::all() {
        let (mut ours, mut theirs, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..sides.rounds {
            let server = Server::our_card(place, case.lan, &more)?;
            ours.push(measure(sides, &case, &server).with_context(|| format!("ours, {}", case.name()))?);
            drop(server);
            let server = Server::testpmd(place, sides.client_core, case.lan)?;
            theirs.push(
                measure(sides, &case, &server)
                    .with_context(|| format!("testpmd, {}: {}", case.name(), server.output()))?,
            );
            drop(server);
            if case.lan == Lan::Tap {
                let (core, duration) = (sides.server_core, sides.duration());
                bare.push(net::bare::write(&namespace, core, case.frame_bytes, duration)?);
            }
        }
        let of = |all: &[Measured], figure: fn(&Measured) -> f64| {
            median(&all.iter().map(figure).collect::<Vec<_>>())
        };
        let name = case.name();
        let row = if case.way == Way::RoundTrip {
            let time = |all| of(all, |measured: &Measured| measured.p50_us);
            Row::less_is_better(&name, "us", time(&ours), ("testpmd net_vhost", time(&theirs)), case.target)
        } else {
            let rate = |all| of(all, |measured: &Measured| measured.frames_per_s);
            let peer = if case.lan == Lan::Tap { "testpmd net_tap" } else { "testpmd net_vhost" };
            Row::more_is_better(&name, "frames/s", rate(&ours), (peer, rate(&theirs)), case.target)
        };
        if !bare.is_empty() {
            let peer = ("bare loop of writes", median(&bare));
            rows.push(Row::more_is_better(&name, "frames/s", row.ours, peer, 0.9));
        }
        eprintln!("{name}: {:.2}", row.ratio);
        rows.push(row);
    }
    rows.push(idle(place, &more)?);
    let busy = others.busy_cores()?;
    report::publish(&rows, busy, &options.json)
}

fn measure(sides: &Sides, case: &Case, server: &Server) -> Result<Measured> {
    let mut card = Card::open(server.socket(), DEPTH)?;
    let load = Load {
        way: case.way,
        frame_bytes: case.frame_bytes,
        core: sides.client_core,
        duration: sides.duration(),
    };
    let measured = net::load::run(&mut card, &load)?;
    // a guest that has gone; the server is ended as well
    drop(card);
    Ok(measured)
}

/// What our back end costs when nothing passes.
fn idle(place: Place<'_>, more: &[String]) -> Result<Row> {
    let server = Server::our_card(place, Lan::Reflect, more)?;
    let card = Card::open(server.socket(), DEPTH)?;
    let settled = Duration::from_millis(500);
    std::thread::sleep(settled);
    let before = server.cpu_time()?;
    let watched = Duration::from_secs(2);
    std::thread::sleep(watched);
    let percent = (server.cpu_time()? - before).as_secs_f64() / watched.as_secs_f64() * 100.0;
    card.close()?;
    Ok(Row::less_is_better("idle", "% CPU", percent, ("limit", 1.0), 1.0))
}
