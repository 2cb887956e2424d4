//! The figures of a protected pair: what a checkpoint costs, what clients pay, how long they stall at a failover.
//!
//! Timings on a shared machine mislead: protected and unprotected guests are measured in turn, in the same run, and
//! medians are quoted. The unprotected guest has a second, unrelated guest beside it that does the same work, so that
//! the cores are equally busy.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use colo_lab::{
    BenchmarkLine, Clients, Death, Devices, Dice, GuestImage, Lab, Pair, PairOptions, RedisLoad, Side, Solo,
    Status, end_on_signals, kill, last_logs, missing, percentile, redis_benchmark, redis_benchmarks,
};
use serde_json::Value;

/// Prints the figures that the README quotes.
#[derive(Parser)]
struct Arguments {
    /// How often each of the two is measured, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How often a host is killed.
    #[arg(long, default_value_t = 20)]
    kills: usize,
}

const REQUESTS: u32 = 2000;
const CLIENTS: u32 = 10;
const TESTS: &str = "set,get";
/// Checkpoints that a round waits for.
const CHECKPOINTS_MIN: u64 = 50;

fn main() -> ExitCode {
    end_on_signals();
    let arguments = Arguments::parse();
    let measured = match missing() {
        Some(missing) => Err(anyhow::anyhow!("This machine {missing}")),
        None => measure(&arguments),
    };
    if let Err(error) = measured {
        let logs = last_logs();
        eprintln!("{logs}\nFAILED: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// What a client saw of one guest.
struct Figures {
    /// One connection, each request waiting for the reply to the one before.
    latencies: Vec<Duration>,
    seconds: f64,
    benchmark: Vec<BenchmarkLine>,
}

fn measure(arguments: &Arguments) -> Result<()> {
    let (mut alone, mut protected, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=arguments.rounds {
        eprintln!("round {round} of {}: unprotected", arguments.rounds);
        alone.push(unprotected()?);
        eprintln!("round {round} of {}: protected", arguments.rounds);
        let (figures, more) = protected_pair()?;
        protected.push(figures);
        records.extend(more);
    }
    let mut stalls = Vec::new();
    let mut dice = Dice::announced();
    for number in 1..=arguments.kills {
        let death = *dice.one_of(&[Death::Killed, Death::PowerOff]);
        let at = Duration::from_millis(dice.within(500..3000));
        let pair = Pair::start(&PairOptions::default())?;
        let clients = Clients::start(&pair)?;
        clients.await_progress()?;
        std::thread::sleep(at);
        let survival = kill(pair, clients, Side::A, death)?;
        eprintln!("kill {number} of {}, {death:?}: {:?}", arguments.kills, survival.stall);
        stalls.push(survival.stall);
    }

    println!("\nCheckpoints under load: {} (median, p99)\n", records.len());
    checkpoint_table(&records);
    println!("\nRedis, {} rounds in turn\n", arguments.rounds);
    redis_table(&alone, &protected);
    println!(
        "\nClient stall at failover, {} kills: median {:.0?}, p99 {:.0?}",
        stalls.len(),
        percentile(&stalls, 50.0),
        percentile(&stalls, 99.0)
    );
    Ok(())
}

fn unprotected() -> Result<Figures> {
    let lab = Lab::build()?;
    let image = GuestImage::make()?;
    let guest = Solo::start(&lab, Side::A, &image, Devices::Ours)?;
    let other = Solo::start(&lab, Side::B, &image, Devices::Ours)?;

    let load = RedisLoad::start(guest.redis(&lab)?, Duration::ZERO)?;
    let beside = RedisLoad::start(other.redis(&lab)?, Duration::ZERO)?;
    let (latencies, seconds) = one_connection(load, || Ok(false))?;
    beside.stop(PATIENCE)?;

    let addresses = [guest.address(), other.address()];
    let mut benchmarks = redis_benchmarks(lab.client(), &addresses, CLIENTS, REQUESTS, TESTS)?;
    Ok(Figures { latencies, seconds, benchmark: benchmarks.swap_remove(0) })
}

fn protected_pair() -> Result<(Figures, Vec<Status>)> {
    let pair = Pair::start(&PairOptions::default())?;
    let before = pair.status(Side::A)?.checkpoints();
    let load = RedisLoad::start(pair.redis()?, Duration::ZERO)?;
    let (latencies, seconds) =
        one_connection(load, || Ok(pair.status(Side::A)?.checkpoints() < before + CHECKPOINTS_MIN))?;
    let status = pair.status(Side::A)?;
    let latest = status.0.pointer("/checkpoints/latest").and_then(Value::as_array).cloned();
    let records = latest
        .context("The status tells no checkpoints")?
        .into_iter()
        .map(Status)
        // a checkpoint of which the secondary has not told yet, and those of the guest's boot, are left out
        .filter(|record| record.number("/epoch") > before && record.0["secondary"].is_object())
        .collect();
    let address = colo_lab::GUEST;
    let benchmark = redis_benchmark(pair.lab().client(), address, CLIENTS, REQUESTS, TESTS)?;
    Ok((Figures { latencies, seconds, benchmark }, records))
}

const PATIENCE: Duration = Duration::from_secs(15);

/// Lets a client work for ten seconds, and on as long as `more` says; its latencies and the time it took.
fn one_connection(load: RedisLoad, more: impl Fn() -> Result<bool>) -> Result<(Vec<Duration>, f64)> {
    let began = Instant::now();
    let limit = Duration::from_secs(180);
    while began.elapsed() < Duration::from_secs(10) || (more()? && began.elapsed() < limit) {
        std::thread::sleep(Duration::from_millis(500));
    }
    let (mut connection, progress) = load.stop(PATIENCE)?;
    let seconds = began.elapsed().as_secs_f64();
    progress.verify(&mut connection)?;
    let latencies = progress.stalls.latencies(began);
    ensure!(!latencies.is_empty(), "The client got no reply");
    Ok((latencies, seconds))
}

fn checkpoint_table(records: &[Status]) {
    let row = |name: &str, pointer: &str| {
        let values: Vec<Duration> =
            records.iter().map(|record| Duration::from_micros(record.number(pointer))).collect();
        let ms = |percent| percentile(&values, percent).as_secs_f64() * 1e3;
        println!("| {name:<42} | {:>8.2} ms | {:>8.2} ms |", ms(50.0), ms(99.0));
    };
    let steps = |half: &str| {
        let first = records.first().and_then(|record| record.0.get(half)?.as_object().cloned());
        let names = first.unwrap_or_default().into_iter().map(|(name, _)| name);
        names.filter(|name| name.ends_with("_us") && name != "pause_us").collect::<Vec<_>>()
    };
    row("pause of the primary's VM", "/pause_us");
    for step in steps("primary") {
        row(&format!("  {}", step.trim_end_matches("_us")), &format!("/primary/{step}"));
    }
    row("pause of the secondary's VM", "/secondary/pause_us");
    for step in steps("secondary") {
        row(&format!("  {}", step.trim_end_matches("_us")), &format!("/secondary/{step}"));
    }
    let count = |name: &str, pointer: &str| {
        let values: Vec<Duration> =
            records.iter().map(|record| Duration::from_micros(record.number(pointer))).collect();
        let at = |percent| percentile(&values, percent).as_micros();
        println!("| {name:<42} | {:>11} | {:>11} |", at(50.0), at(99.0));
    };
    count("dirty pages sent", "/pages");
    count("pages copied on the secondary", "/secondary/pages");
    count("bytes of device state", "/device_bytes");
}

fn redis_table(alone: &[Figures], protected: &[Figures]) {
    let median = |values: Vec<f64>| {
        let mut sorted = values;
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    };
    let row = |name: &str, value: &dyn Fn(&Figures) -> f64| {
        let (a, b) =
            (median(alone.iter().map(value).collect()), median(protected.iter().map(value).collect()));
        println!("| {name:<42} | {a:>11.2} | {b:>11.2} | {:>5.2} |", b / a);
    };
    println!("| {:<42} | {:>11} | {:>11} | ratio |", "", "unprotected", "protected");
    let ms = |figures: &Figures, percent| percentile(&figures.latencies, percent).as_secs_f64() * 1e3;
    #[expect(clippy::cast_precision_loss, reason = "a count of requests")]
    let per_second = |figures: &Figures| figures.latencies.len() as f64 / figures.seconds;
    row("one connection, requests/s", &per_second);
    row("one connection, median ms", &|figures| ms(figures, 50.0));
    row("one connection, p99 ms", &|figures| ms(figures, 99.0));
    let Some(first) = alone.first() else {
        return;
    };
    for (at, line) in first.benchmark.iter().enumerate() {
        let name = |what: &str| format!("redis-benchmark {} -c {CLIENTS}, {what}", line.test);
        row(&name("requests/s"), &|figures| figures.benchmark[at].per_second);
        row(&name("median ms"), &|figures| figures.benchmark[at].p50_ms);
        row(&name("p99 ms"), &|figures| figures.benchmark[at].p99_ms);
    }
}
