//! Debian's `redis-benchmark`, and its figures as numbers.

use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::Namespace;

/// One line of `redis-benchmark --csv`.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchmarkLine {
    /// Which request.
    pub test: String,
    /// Requests a second.
    pub per_second: f64,
    /// Median time of a request, in milliseconds.
    pub p50_ms: f64,
    /// The time that 99 of 100 requests do not exceed, in milliseconds.
    pub p99_ms: f64,
}

/// Runs `redis-benchmark` inside `namespace` against redis at `address`.
///
/// # Errors
/// It fails, or prints something that we do not understand.
pub fn redis_benchmark(
    namespace: &Namespace,
    address: &str,
    clients: u32,
    requests: u32,
    tests: &str,
) -> Result<Vec<BenchmarkLine>> {
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", address, "--csv", "-t", tests]);
    command.args(["-c", &clients.to_string(), "-n", &requests.to_string()]);
    let output =
        namespace.run(|| command.output())?.context("Cannot run redis-benchmark: install redis-tools")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "redis-benchmark: {}{text}", String::from_utf8_lossy(&output.stderr));
    let lines = parse(&text).with_context(|| format!("redis-benchmark prints {text:?}"))?;
    ensure!(!lines.is_empty(), "redis-benchmark prints no figures: {text:?}");
    Ok(lines)
}

/// Runs it against several guests at once, so that all are equally busy.
///
/// # Errors
/// One of them fails.
pub fn redis_benchmarks(
    namespace: &Namespace,
    addresses: &[&str],
    clients: u32,
    requests: u32,
    tests: &str,
) -> Result<Vec<Vec<BenchmarkLine>>> {
    thread::scope(|scope| {
        let running: Vec<_> = addresses
            .iter()
            .map(|address| scope.spawn(move || redis_benchmark(namespace, address, clients, requests, tests)))
            .collect();
        running.into_iter().map(|one| one.join().map_err(|_| anyhow!("It panicked"))?).collect()
    })
}

fn parse(csv: &str) -> Result<Vec<BenchmarkLine>> {
    let rows: Vec<Vec<&str>> = csv
        .lines()
        .filter(|line| line.starts_with('"'))
        .map(|line| line.trim_matches('"').split("\",\"").collect())
        .collect();
    let Some((heading, rows)) = rows.split_first() else {
        return Ok(Vec::new());
    };
    let column = |name: &str| {
        heading.iter().position(|have| *have == name).with_context(|| format!("no column {name}"))
    };
    let (test, rps, p50, p99) =
        (column("test")?, column("rps")?, column("p50_latency_ms")?, column("p99_latency_ms")?);
    let number =
        |row: &[&str], at: usize| -> Result<f64> { Ok(row.get(at).context("a short row")?.parse()?) };
    rows.iter()
        .map(|row| {
            Ok(BenchmarkLine {
                test: (*row.get(test).context("a short row")?).to_owned(),
                per_second: number(row, rps)?,
                p50_ms: number(row, p50)?,
                p99_ms: number(row, p99)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_found_by_name() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                   \"p99_latency_ms\",\"max_latency_ms\"\n\"SET\",\"1638.00\",\"6.067\",\"3.312\",\"4.871\",\"11.295\",\
                   \"14.583\",\"21.343\"\n";
        let expected =
            BenchmarkLine { test: "SET".into(), per_second: 1638.0, p50_ms: 4.871, p99_ms: 14.583 };
        assert_eq!(parse(csv).unwrap(), [expected]);
        assert_eq!(parse("").unwrap(), []);
        assert!(parse("\"test\"\n\"SET\"\n").is_err());
    }
}
