//! The main job on one machine: a guest on two hosts, a client at work, and then one host dies.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use colo_lab::{
    FileLoad, Pair, PairOptions, RedisLoad, Side, Status, end_on_signals, last_logs, missing, percentile,
};

/// Protects a guest that runs a redis server, has a client write to it over one TCP connection, kills everything on the
/// primary's host, and shows what the client saw.
///
/// Two hosts, a client and the switches between them are network namespaces of this machine. All of it is gone at the
/// end, also after Ctrl-C. The exit code is 0 only if the connection lasted, every acknowledged write is there
/// exactly once, and the disk is sound.
#[derive(Parser)]
struct Arguments {
    /// Seconds that the guest is protected before host-a dies.
    #[arg(long, default_value_t = 12)]
    protected: u64,
    /// Seconds that the guest goes on alone before everything is verified.
    #[arg(long, default_value_t = 5)]
    alone: u64,
}

fn main() -> ExitCode {
    end_on_signals();
    let arguments = Arguments::parse();
    match demonstrate(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let logs = last_logs();
            eprintln!("{logs}\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate(arguments: &Arguments) -> Result<()> {
    if let Some(missing) = missing() {
        anyhow::bail!("This machine {missing}");
    }
    let story = Story { began: Instant::now() };
    story.tell("building two hosts, a client and two switches; booting the guest on host-a");
    let mut pair = Pair::start(&PairOptions::default())?;
    story.tell("the guest serves redis and is protected: host-b runs the same guest, silently");

    let files = FileLoad::start(pair.agent()?, Duration::from_millis(50));
    let load = RedisLoad::start(pair.redis()?, Duration::from_millis(2))?;
    story.tell(
        "the client writes over one TCP connection (INCR and SET in turn), another writes files with fsync\n",
    );
    print_heading();
    watch(&pair, &load, &[Side::A, Side::B], Duration::from_secs(arguments.protected))?;

    println!();
    let died = Instant::now();
    let before = load.progress();
    pair.lab().power_off(Side::A)?;
    story.tell("host-a: every process killed with SIGKILL, every cable dead");
    pair.await_status(Side::B, "host-b that goes on alone", Duration::from_secs(15), |status| {
        status.text("/role") == "alone"
    })?;
    let files_before = files.writes();
    let limit = Instant::now() + Duration::from_secs(15);
    while load.progress().increments < before.increments + 3 || files.writes() == files_before {
        ensure!(Instant::now() < limit, "The clients got no reply for {:?}", died.elapsed());
        thread::sleep(Duration::from_millis(5));
    }
    story.tell("host-b goes on alone\n");
    print_heading();
    watch(&pair, &load, &[Side::B], Duration::from_secs(arguments.alone))?;

    println!();
    let patience = Duration::from_secs(15);
    let (mut connection, progress) = load.stop(patience)?;
    progress.verify(&mut connection)?;
    progress.verify(&mut pair.redis()?).context("Over a new connection")?;
    println!(
        "  the client's one TCP connection went on; it stalled for {:.0?}",
        progress.stalls.longest(died)
    );
    println!(
        "  {} INCRs were acknowledged and the counter is {}: each is there exactly once",
        progress.increments, progress.increments
    );
    println!("  {} keys hold the value that was acknowledged last", progress.values.len());
    let (mut agent, writes) = files.stop_and_verify(patience)?;
    println!("  {writes} writes of files with fsync were acknowledged, each file reads back right");
    agent.unmount()?;
    pair.lab().kill_host(Side::B)?;
    pair.disk(Side::B).check()?;
    println!("  the disk is sound: e2fsck -fn finds nothing\n");
    story.tell("all of it held");
    Ok(())
}

struct Story {
    began: Instant,
}

impl Story {
    fn tell(&self, what: &str) {
        println!("[{:5.1} s] {what}", self.began.elapsed().as_secs_f64());
    }
}

/// The table's columns: the roles, what protection does, what the client sees.
fn line(roles: &[impl Display; 2], protection: &[impl Display; 6], client: &[impl Display; 3]) -> String {
    let ([a, b], [all, causes, pause, pages, packets, held], [count, p50, p99]) = (roles, protection, client);
    format!(
        "  {a:<9}  {b:<9}  {all:>5}  {causes:<38} {pause:>7} {pages:>6} {packets:>8} {held:>6}  |  {count:>6} {p50:>7} {p99:>7}"
    )
}

fn print_heading() {
    let over = ["", "checkpoints", "pause", "dirty", "packets", "held"];
    let under = ["all", "causes since the last line", "ms", "pages", "compared", "bytes"];
    println!("{}", line(&["host-a", "host-b"], &over, &["client", "median", "p99"]));
    println!("{}", line(&["", ""], &under, &["req/s", "ms", "ms"]));
}

/// Prints a line a second.
fn watch(pair: &Pair, load: &RedisLoad, alive: &[Side], time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    let first = *alive.first().context("Somebody must be alive")?;
    let mut before = pair.status(first)?;
    while Instant::now() < end {
        let since = Instant::now();
        thread::sleep(Duration::from_secs(1));
        let now = pair.status(first)?;
        let mut roles = [String::from("dead"), String::from("dead")];
        for side in alive {
            let status = if *side == first { &now } else { &pair.status(*side)? };
            status.text("/role").clone_into(&mut roles[*side as usize]);
        }
        let progress = load.progress();
        if let Some(failure) = progress.failure {
            anyhow::bail!("The client's connection did not last: {failure}");
        }
        let latencies = progress.stalls.latencies(since);
        let [p50, p99] = [50.0, 99.0].map(|percent| ms(percentile(&latencies, percent)));
        println!("{}", line(&roles, &protection(&now, &before), &[latencies.len().to_string(), p50, p99]));
        std::io::stdout().flush()?;
        before = now;
    }
    Ok(())
}

fn ms(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1e3)
}

/// The columns that make sense only while there are two.
fn protection(now: &Status, before: &Status) -> [String; 6] {
    if now.text("/role") != "primary" {
        return ["-", "not protected", "-", "-", "-", "-"].map(str::to_owned);
    }
    let last = now.0.pointer("/checkpoints/latest").and_then(|all| all.as_array()?.last().cloned());
    let last = Status(last.unwrap_or_default());
    [
        now.checkpoints().to_string(),
        causes(now, before),
        ms(Duration::from_micros(last.number("/pause_us"))),
        last.number("/pages").to_string(),
        now.number("/net/0/pair/proxy/compare/pvm_packets").to_string(),
        now.number("/net/0/pair/proxy/compare/held_bytes").to_string(),
    ]
}

/// What asked for the checkpoints between two statuses, as `+2 interval +1 mismatch`.
fn causes(now: &Status, before: &Status) -> String {
    let counts = now.0.pointer("/checkpoints/by_cause").and_then(|causes| causes.as_object().cloned());
    let new = counts.unwrap_or_default().into_iter().filter_map(|(cause, count)| {
        let earlier = before.number(&format!("/checkpoints/by_cause/{cause}"));
        let more = count.as_u64()? - earlier;
        (more > 0).then(|| format!("+{more} {cause}"))
    });
    new.collect::<Vec<_>>().join(" ")
}
