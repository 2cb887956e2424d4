//! `make bench-proxy`: our proxy against QEMU's colo-compare, side by side and in turn.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use colo_bench::clock::ticks_per_nanosecond;
use colo_bench::command_line::{Sides, run};
use colo_bench::net::load::on_core;
use colo_bench::others::Others;
use colo_bench::proxy::pair::{Figures, Hosts, Toll};
use colo_bench::proxy::{Comparer, Contender, Feeder, Packets, Protocol, Traffic, library, process};
use colo_bench::report::{self, Row, median};
use colo_bench::{Histogram, Place};
use colo_lab::Run;

/// Compares COLO's proxy with colo-compare of QEMU, both fed with the very same packets by the same feeder, which has a
/// core of its own: our comparison as a library and as a process in colo-compare's place. And a protected pair of test
/// guests, each with a TCP stack on a virtio driver of its own, with one that is not protected.
///
/// Needs root, two cores and qemu-system-x86_64.
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
    /// Measure a loop of this program that polls in place of colo-filter
    #[arg(long)]
    polling: bool,
    /// Where the rows go, as JSON
    #[arg(long, default_value = "target/bench/proxy.json", value_name = "PATH")]
    json: PathBuf,
}

#[derive(Subcommand)]
enum What {
    /// Compares what comes at two sockets, as colo-compare does, until the primary's connection ends
    Serve(Serve),
    /// Measures our comparison as a library alone, to see where its time goes
    Library(Library),
}

#[derive(Args)]
struct Serve {
    /// The core for its thread
    #[arg(long, value_name = "CORE")]
    core: usize,
    /// Socket for the primary's packets, QEMU's primary_in
    primary: PathBuf,
    /// Socket for the secondary's, secondary_in
    secondary: PathBuf,
    /// Socket where released packets go out, outdev
    output: PathBuf,
}

#[derive(Args)]
struct Library {
    /// Datagrams in place of connections
    #[arg(long)]
    udp: bool,
    /// Data of a packet
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    payload_bytes: usize,
    /// Flows that take turns
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    flows: u32,
    /// The core
    #[arg(long, default_value_t = 0, value_name = "CORE")]
    core: usize,
    /// How long to measure
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
}

/// One comparison.
#[derive(Clone, Copy)]
enum Case {
    /// Packets in a second.
    Rate(Traffic),
    /// From the secondary's packet to the release.
    Latency(Traffic),
    /// As many flows that each hold a packet.
    Crowd(u32),
    /// A flow about which the two sides do not agree, and another beside it.
    Stuck(Traffic),
    /// Two test guests, protected, and one that is not.
    Pair,
}

const FLOWS: [u32; 3] = [1, 100, 10_000];
const CROWD: u32 = 1_000_000;
/// Flows that colo-compare can hold packets of at once: its table is cleared at 16,384.
const HELD_FLOWS: u32 = 10_000;
/// Packets of a flow that is stuck.
const STUCK_PACKETS: u64 = 500;

impl Case {
    fn all() -> Vec<Self> {
        let traffic = |protocol, payload_bytes, flows| Traffic { protocol, payload_bytes, flows };
        let kinds = [(Protocol::Tcp, 0), (Protocol::Tcp, 64), (Protocol::Tcp, 1448), (Protocol::Udp, 64)];
        let mut cases = Vec::new();
        for (protocol, bytes) in kinds {
            cases.extend(FLOWS.map(|flows| Self::Rate(traffic(protocol, bytes, flows))));
        }
        cases.extend([Protocol::Tcp, Protocol::Udp].map(|protocol| Self::Latency(traffic(protocol, 64, 1))));
        cases.extend([Self::Crowd(CROWD), Self::Stuck(traffic(Protocol::Tcp, 64, 1)), Self::Pair]);
        cases
    }

    fn name(&self) -> String {
        match self {
            Self::Rate(traffic) => format!("rate, {}", traffic.name()),
            Self::Latency(traffic) => format!("release, {}", traffic.name()),
            Self::Crowd(flows) => format!("crowd, {flows} flows"),
            Self::Stuck(traffic) => format!("beside a stuck flow, {}", traffic.name()),
            Self::Pair => "protected pair".into(),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.what {
        // it is started with the priority that it shall have
        Some(What::Serve(Serve { core, primary, secondary, output })) => {
            let sockets = [primary.clone(), secondary.clone(), output.clone()];
            run(true, || process::serve(&sockets, *core))
        }
        Some(What::Library(one)) => run(arguments.no_priority, || one.measure()),
        None => run(arguments.no_priority, || compare(&arguments.comparison)),
    }
}

impl Library {
    fn measure(&self) -> Result<()> {
        let protocol = if self.udp { Protocol::Udp } else { Protocol::Tcp };
        let traffic = Traffic { protocol, payload_bytes: self.payload_bytes, flows: self.flows };
        let cost = library::measure(traffic, self.core, std::time::Duration::from_secs_f64(self.seconds))?;
        let library::Cost { engine_ns, copy_ns, touch_ns } = cost;
        println!(
            "{:.0} packets/s: {engine_ns:.1} ns and {copy_ns:.1} ns for the copy; memcmp {touch_ns:.1} ns",
            cost.packets_per_s()
        );
        Ok(())
    }
}

fn compare(options: &Comparison) -> Result<()> {
    let sides = &options.sides;
    let chosen = sides.choose(Case::all(), Case::name)?;
    if sides.list {
        chosen.iter().for_each(|case| println!("{}", case.name()));
        return Ok(());
    }
    let others = Others::watch()?;
    let lab = Run::begin()?;
    let namespace = lab.add_namespace("bench")?;
    let bench = Bench {
        sides,
        ours: if options.polling { Contender::Polling } else { Contender::Ours },
        place: Place { namespace: &namespace, directory: lab.directory(), core: sides.server_core },
    };
    let mut rows = Vec::new();
    for case in chosen {
        let more = match case {
            Case::Rate(traffic) => bench.rate(traffic),
            Case::Latency(traffic) => bench.latency(traffic),
            Case::Crowd(flows) => bench.crowd(flows),
            Case::Stuck(traffic) => bench.stuck(traffic),
            Case::Pair => pair(sides, &lab),
        };
        for row in more.with_context(|| case.name())? {
            eprintln!("{}, {}: {:.2}", row.case, row.peer_name, row.ratio);
            rows.push(row);
        }
    }
    let busy = others.busy_cores()?;
    report::publish(&rows, busy, &options.json)
}

/// Test guests behind back ends, a client over the primary's tap.
fn pair(sides: &Sides, lab: &Run) -> Result<Vec<Row>> {
    let namespaces = [lab.add_namespace("pair-a")?, lab.add_namespace("pair-b")?];
    let hosts = Hosts::new(namespaces.each_ref(), lab.directory())?;
    let (mut alone, mut protected, mut tolls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sides.rounds {
        alone.push(hosts.unprotected(sides.duration()).context("Unprotected")?);
        let (figures, toll) = hosts.protected(sides.duration()).context("Protected")?;
        protected.push(figures);
        tolls.push(toll);
    }
    let of = |figure: fn(&Figures) -> f64| {
        let figures = |all: &[Figures]| median(&all.iter().map(figure).collect::<Vec<_>>());
        (figures(&protected), ("one test guest, unprotected", figures(&alone)))
    };
    let toll = |figure: fn(&Toll) -> f64| median(&tolls.iter().map(figure).collect::<Vec<_>>());
    let (to, to_alone) = of(|figures| figures.to_guest / 1e6);
    let (from, from_alone) = of(|figures| figures.from_guest / 1e6);
    let (reply, reply_alone) = of(|figures| figures.reply_us);
    let lag = ("the SVM's lag behind the PVM", toll(|toll| toll.lag_us));
    let share = toll(|toll| toll.link_share * 100.0);
    let wanted = tolls.iter().filter(|toll| toll.checkpoint_wanted).count() as f64;
    Ok(vec![
        Row::more_is_better("protected pair, bulk to the guest", "MB/s", to, to_alone, 0.5),
        Row::more_is_better("protected pair, bulk from the guest", "MB/s", from, from_alone, 0.5),
        Row::less_is_better("protected pair, reply to a request, p50", "us", reply, reply_alone, 0.5),
        Row::less_is_better(
            "protected pair, a packet is held, mean",
            "us",
            toll(|toll| toll.held_us),
            lag,
            1.0,
        ),
        Row::less_is_better(
            "protected pair, link bytes of the SVM's output",
            "%",
            share,
            ("limit", 5.0),
            1.0,
        ),
        // a thousandth of one is none
        Row::less_is_better(
            "protected pair, rounds that want a checkpoint",
            "rounds",
            wanted,
            ("limit", 1.0),
            1e3,
        ),
    ])
}

const COLO_COMPARE: &str = "colo-compare";

struct Bench<'a> {
    sides: &'a Sides,
    ours: Contender,
    place: Place<'a>,
}

impl Bench<'_> {
    /// Feeds a fresh process, from the client's core.
    fn feed<T: Send>(
        &self,
        contender: Contender,
        work: impl FnOnce(&Comparer, &mut Feeder) -> Result<T> + Send,
    ) -> Result<T> {
        let comparer = Comparer::start(self.place, contender)?;
        let fed = on_core(self.sides.client_core, || {
            let mut feeder = comparer.connect()?;
            work(&comparer, &mut feeder)
        });
        fed.with_context(|| format!("{contender:?}: {}", comparer.server().output()))
    }

    fn rate(&self, traffic: Traffic) -> Result<Vec<Row>> {
        let (mut costs, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.sides.rounds {
            costs.push(library::measure(traffic, self.sides.server_core, self.sides.duration())?);
            for (contender, rates) in [(self.ours, &mut ours), (Contender::ColoCompare, &mut theirs)] {
                rates.push(self.feed(contender, |comparer, feeder| {
                    let mut packets = Packets::new(traffic)?;
                    feeder.open(&packets)?;
                    feeder.rate(&mut packets, comparer.server(), self.sides.duration())
                })?);
            }
        }
        let of = |rates: &[colo_bench::proxy::Rate]| {
            let figures = |figure: fn(&colo_bench::proxy::Rate) -> f64| {
                median(&rates.iter().map(figure).collect::<Vec<_>>())
            };
            (figures(|rate| rate.packets_per_s), figures(|rate| rate.cpu_ns))
        };
        let cost = |figure: fn(&library::Cost) -> f64| median(&costs.iter().map(figure).collect::<Vec<_>>());
        let ((our_rate, our_cpu), (their_rate, their_cpu)) = (of(&ours), of(&theirs));
        let name = traffic.name();
        let target = if traffic.payload_bytes > 1000 { 20.0 } else { 30.0 };
        let (rate, cpu) = ((COLO_COMPARE, their_rate), (COLO_COMPARE, their_cpu));
        let library_rate = cost(library::Cost::packets_per_s);
        let mut rows = vec![
            Row::more_is_better(&format!("library, {name}"), "packet/s", library_rate, rate, target),
            Row::more_is_better(&format!("process, {name}"), "packet/s", our_rate, rate, 4.0),
            Row::less_is_better(&format!("processor time of the process, {name}"), "ns", our_cpu, cpu, 4.0),
        ];
        if traffic.payload_bytes > 1000 {
            let touch = ("memcmp", cost(|cost| cost.touch_ns));
            let engine = cost(|cost| cost.engine_ns);
            rows.push(Row::less_is_better(
                &format!("library without a copy, {name}"),
                "ns",
                engine,
                touch,
                0.5,
            ));
            let copied = cost(|cost| cost.engine_ns + cost.copy_ns);
            rows.push(Row::less_is_better(&format!("library, {name}"), "ns", copied, touch, 0.5));
        }
        Ok(rows)
    }

    /// Median times of the rounds that half and 99 of 100 packets do not exceed, ours and theirs, in microseconds.
    fn latencies<const N: usize>(
        &self,
        contenders: [Contender; N],
        work: impl Fn(usize, &mut Feeder) -> Result<Histogram> + Sync,
    ) -> Result<[[f64; 2]; N]> {
        let mut figures = [(); N].map(|()| [Vec::new(), Vec::new()]);
        for _ in 0..self.sides.rounds {
            for (at, contender) in contenders.into_iter().enumerate() {
                let latencies = self.feed(contender, |_, feeder| work(at, feeder))?;
                for (percent, figures) in [50.0, 99.0].into_iter().zip(&mut figures[at]) {
                    figures.push(latencies.percentile(percent) as f64 / ticks_per_nanosecond() / 1e3);
                }
            }
        }
        Ok(figures.map(|both| both.map(|figures| median(&figures))))
    }

    fn latency(&self, traffic: Traffic) -> Result<Vec<Row>> {
        let [ours, theirs] = self.latencies([self.ours, Contender::ColoCompare], |_, feeder| {
            let mut packets = Packets::new(traffic)?;
            feeder.open(&packets)?;
            feeder.latencies(&mut packets, self.sides.duration())
        })?;
        let row = |at: usize, percent: &str| {
            let case = format!("release of a packet, p{percent}, {}", traffic.name());
            Row::less_is_better(&case, "us", ours[at], (COLO_COMPARE, theirs[at]), 2.0)
        };
        Ok(vec![row(0, "50"), row(1, "99")])
    }

    fn stuck(&self, traffic: Traffic) -> Result<Vec<Row>> {
        let contenders = [self.ours, self.ours, Contender::ColoCompare];
        let [free, ours, theirs] = self.latencies(contenders, |at, feeder| {
            if at > 0 {
                feeder.mismatch(traffic, STUCK_PACKETS)?;
            }
            let mut packets = Packets::new(traffic)?.from_flow(1);
            feeder.open(&packets)?;
            feeder.latencies(&mut packets, self.sides.duration())
        })?;
        let row = |at: usize, percent: &str, peer: &str, figures: [f64; 2], target| {
            let case = format!("release beside a stuck flow, p{percent}, {}", traffic.name());
            Row::less_is_better(&case, "us", ours[at], (peer, figures[at]), target)
        };
        let none = "ours, none stuck";
        Ok(vec![
            row(0, "50", none, free, 0.9),
            row(1, "99", none, free, 0.9),
            row(0, "50", COLO_COMPARE, theirs, 2.0),
            row(1, "99", COLO_COMPARE, theirs, 2.0),
        ])
    }

    /// Once: memory is no matter of chance.
    fn crowd(&self, flows: u32) -> Result<Vec<Row>> {
        let ours = library::crowd(flows)?;
        let traffic = |flows| Traffic { protocol: Protocol::Tcp, payload_bytes: 64, flows };
        let bytes = self.feed(Contender::ColoCompare, |comparer, feeder| {
            let packets = Packets::new(traffic(HELD_FLOWS))?;
            let (before, mut held) = (comparer.server().resident_bytes()?, 0);
            feeder.hold_all(&packets, HELD_FLOWS, || {
                held = comparer.server().resident_bytes()?.saturating_sub(before);
                Ok(())
            })?;
            Ok(held as f64 / f64::from(HELD_FLOWS))
        })?;
        let released = self.feed(Contender::ColoCompare, |_, feeder| {
            feeder.hold_all(&Packets::new(traffic(flows))?, flows, || Ok(()))
        })?;
        let name = format!("{flows} flows");
        let (all, lost) = (f64::from(flows), |released: u64| f64::from(flows) - released as f64);
        let (ours_lost, theirs_lost) = (lost(ours.released), (COLO_COMPARE, lost(released)));
        Ok(vec![
            Row::less_is_better(
                &format!("held packets lost, {name}"),
                "packets",
                ours_lost,
                theirs_lost,
                1000.0,
            ),
            Row::less_is_better(
                "flows in the table after twice as many",
                "flows",
                ours.flows_left as f64,
                ("limit", all),
                // who makes room looks at a few entries at a time
                0.99,
            ),
            Row::less_is_better(
                &format!("memory of a flow that holds a packet, {name}"),
                "bytes",
                ours.bytes_per_flow,
                ("colo-compare, 10000 flows", bytes),
                1.0,
            ),
        ])
    }
}
