//! `make bench-net-device`: our network back end against DPDK's testpmd, side by side and in turn.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use colo_bench::command_line::{Sides, run};
use colo_bench::net::{self, Card, Lan, Load, MERGED, Measured, Way, guest};
use colo_bench::others::Others;
use colo_bench::report::{self, Row, median};
use colo_bench::{Place, Server};
use colo_lab::Run;

/// Buffers in each queue.
const DEPTH: u16 = 256;
/// Compares vhost-net-backend with DPDK's testpmd (net_vhost): a guest that drives its rings itself on one core, the
/// server on another; with loops of system calls where a tap is behind it; and with QEMU's own tap, under a guest of QEMU.
///
/// Needs root, two cores, 1 GiB for huge pages and Debian's dpdk-dev with librte-net-vhost23, librte-net-tap23,
/// librte-net-virtio23 and librte-mempool-ring23.
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

/// A line of the comparison.
enum Item {
    Device(Case),
    Guest(guest::Work),
}

impl Item {
    fn name(&self) -> String {
        match self {
            Self::Device(case) => case.name(),
            Self::Guest(work) => work.name(),
        }
    }
}

/// What of a device is measured.
#[derive(Clone, Copy, PartialEq)]
enum Work {
    /// Our frontend loads a server.
    Load(Way, Lan),
    /// DPDK's frontend does.
    Frontend(Way, Lan),
    /// Frames that wait in a tap are taken, by a driver with these further features.
    Drain(u64),
    /// The kernel answers ICMP echo requests.
    Ping,
}

/// One comparison of devices.
struct Case {
    work: Work,
    frame_bytes: usize,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        let mut add = |work: fn(usize) -> Work| {
            cases.extend([64, 1514].map(|frame_bytes| Self { work: work(frame_bytes), frame_bytes }));
        };
        add(|_| Work::Load(Way::Transmit, Lan::Drop));
        add(|bytes| Work::Load(Way::Receive, Lan::Generate(bytes)));
        add(|_| Work::Load(Way::Forward, Lan::Reflect));
        add(|_| Work::Frontend(Way::Transmit, Lan::Drop));
        add(|bytes| Work::Frontend(Way::Receive, Lan::Generate(bytes)));
        add(|_| Work::Load(Way::Transmit, Lan::Tap));
        add(|_| Work::Drain(0));
        add(|_| Work::Drain(MERGED));
        cases.push(Self { work: Work::Load(Way::RoundTrip, Lan::Reflect), frame_bytes: 64 });
        cases.push(Self { work: Work::Ping, frame_bytes: 98 });
        cases
    }

    fn name(&self) -> String {
        let what = match self.work {
            Work::Load(Way::Transmit, Lan::Tap) => "into a tap",
            Work::Load(Way::Transmit, _) => "guest to back end",
            Work::Load(Way::Receive, _) => "back end to guest",
            Work::Load(Way::Forward, _) => "there and back",
            Work::Load(Way::RoundTrip, _) => "one frame there and back",
            Work::Frontend(Way::Transmit, _) => "DPDK's frontend to back end",
            Work::Frontend(..) => "back end to DPDK's frontend",
            Work::Drain(0) => "out of a tap",
            Work::Drain(_) => "out of a tap, large frames possible",
            Work::Ping => "ICMP echo by a tap",
        };
        format!("{what}, {} B", self.frame_bytes)
    }

    fn lan(&self) -> Lan {
        match self.work {
            Work::Load(_, lan) | Work::Frontend(_, lan) => lan,
            Work::Drain(_) => Lan::Tap,
            Work::Ping => Lan::Host,
        }
    }

    /// Whether the figure is a time, in microseconds.
    fn is_time(&self) -> bool {
        matches!(self.work, Work::Load(Way::RoundTrip, _) | Work::Ping)
    }

    /// What of testpmd it is compared with, and the target.
    fn testpmd(&self) -> Option<(&'static str, f64)> {
        match self.work {
            Work::Drain(_) => None,
            Work::Load(Way::Transmit, Lan::Tap) => Some(("testpmd net_tap", 2.0)),
            Work::Ping => Some(("testpmd net_tap", 1.0 / 0.8)),
            Work::Load(Way::RoundTrip, _) => Some(("testpmd net_vhost", 1.0 / 1.2)),
            Work::Load(..) | Work::Frontend(..) => Some(("testpmd net_vhost", 0.8)),
        }
    }

    /// Which loop of system calls it is compared with, and the target.
    fn bare(&self) -> Option<(&'static str, f64)> {
        match self.work {
            Work::Load(Way::Transmit, Lan::Tap) => Some(("bare loop of writes", 0.9)),
            Work::Drain(_) => Some(("bare loop of reads", 0.9)),
            _ => None,
        }
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
    let all = Case::all().into_iter().map(Item::Device).chain(guest::Work::ALL.map(Item::Guest));
    let chosen = sides.choose(all, Item::name)?;
    if sides.list {
        chosen.iter().for_each(|item| println!("{}", item.name()));
        return Ok(());
    }
    let (mut cases, mut works) = (Vec::new(), Vec::new());
    for item in chosen {
        match item {
            Item::Device(case) => cases.push(case),
            Item::Guest(work) => works.push(work),
        }
    }
    let others = Others::watch()?;
    let mut rows = devices(sides, &cases)?;
    if !works.is_empty() {
        // iperf3 knows whole seconds
        let duration = sides.duration().max(Duration::from_secs(2));
        rows.extend(guest::compare(&works, sides.rounds, duration)?);
    }
    let busy = others.busy_cores()?;
    report::publish(&rows, busy, &options.json)
}

fn devices(sides: &Sides, cases: &[Case]) -> Result<Vec<Row>> {
    let run = Run::begin()?;
    let namespace = run.add_namespace("bench")?;
    net::add_lan(&namespace)?;
    let place = Place { namespace: &namespace, directory: run.directory(), core: sides.server_core };
    let more = sides.ours();
    net::huge_pages::reserve()?;
    let mut rows = Vec::new();
    for case in cases {
        let (mut ours, mut testpmd, mut bare) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..sides.rounds {
            let server = Server::our_card(place, case.lan(), &more)?;
            ours.push(measure(place, sides, case, &server)?);
            drop(server);
            if case.testpmd().is_some() {
                let server = Server::testpmd(place, sides.client_core, case.lan())?;
                testpmd.push(measure(place, sides, case, &server)?);
            }
            if case.bare().is_some() {
                bare.push(measure_bare(place, sides, case)?);
            }
        }
        for (peer, figures) in [(case.testpmd(), testpmd), (case.bare(), bare)] {
            let Some((peer, target)) = peer else { continue };
            let (ours, peer) = (median(&ours), (peer, median(&figures)));
            let row = if case.is_time() {
                Row::less_is_better(&case.name(), "us", ours, peer, target)
            } else {
                Row::more_is_better(&case.name(), "frames/s", ours, peer, target)
            };
            eprintln!("{}, {}: {:.2}", row.case, row.peer_name, row.ratio);
            rows.push(row);
        }
    }
    rows.push(idle(place, &more)?);
    Ok(rows)
}

/// One figure of a server that has just been started, and is ended afterwards.
fn measure(place: Place<'_>, sides: &Sides, case: &Case, server: &Server) -> Result<f64> {
    let (core, duration) = (sides.client_core, sides.duration());
    let Case { work, frame_bytes } = *case;
    let measured = || -> Result<f64> {
        if let Work::Frontend(way, _) = work {
            return net::frontend(place, core, server.socket(), way, frame_bytes);
        }
        let features = if let Work::Drain(features) = work { features } else { 0 };
        let mut card = Card::open_with(server.socket(), DEPTH, features)?;
        Ok(match work {
            Work::Load(way, _) => {
                let load = Load { way, frame_bytes, core, duration };
                let Measured { frames_per_s, p50_us, .. } = net::load::run(&mut card, &load)?;
                if case.is_time() { p50_us } else { frames_per_s }
            }
            Work::Drain(_) => net::drain::device(&mut card, place.namespace, core, frame_bytes, duration)?,
            Work::Ping => net::ping::run(&mut card, core, duration)?,
            Work::Frontend(..) => unreachable!("it has no card of ours"),
        })
    };
    measured().with_context(|| format!("{}: {}", case.name(), server.output()))
}

/// One figure of the system calls alone.
fn measure_bare(place: Place<'_>, sides: &Sides, case: &Case) -> Result<f64> {
    let duration = sides.duration();
    match case.work {
        Work::Drain(_) => {
            let cores = (sides.client_core, sides.server_core);
            net::drain::bare(place.namespace, cores, case.frame_bytes, duration)
        }
        _ => net::bare::write(place.namespace, sides.server_core, case.frame_bytes, duration),
    }
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
