//! `ping` from the client to the guest, in the background.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{GUEST, Lab, Namespace, Process};

/// A running `ping`, ten times a second.
#[derive(Debug)]
pub struct Ping {
    process: Process,
}

/// What `ping` says at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingResult {
    /// Echo requests sent.
    pub sent: u64,
    /// Replies that came.
    pub received: u64,
    /// Replies that came more than once.
    pub duplicates: u64,
}

impl Ping {
    /// Starts it at the client.
    ///
    /// # Errors
    /// There is no `ping`.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut command = Command::new("ping");
        command.args(["-n", "-i", "0.1", GUEST]).env("LC_ALL", "C");
        let log = lab.run().directory().join("ping.log");
        Ok(Self { process: Process::start(lab.client(), command, &log)? })
    }

    /// Ends it and reads its summary.
    ///
    /// # Errors
    /// It has ended by itself, or says something that we do not understand.
    pub fn stop(mut self) -> Result<PingResult> {
        let pid = Pid::from_raw(self.process.pid().cast_signed()).context("ping has no process id")?;
        kill_process(pid, Signal::INT).context("ping has ended by itself")?;
        self.process.wait(Duration::from_secs(5))?;
        let output = self.process.output();
        parse(&output).with_context(|| format!("ping says {output:?}"))
    }
}

/// The median time of `count` echo requests from inside `namespace`, one every two milliseconds.
///
/// # Errors
/// There is no `ping`, or not all are answered.
pub fn round_trip(namespace: &Namespace, address: &str, count: usize) -> Result<Duration> {
    let mut command = Command::new("ping");
    command.args(["-n", "-i", "0.002", "-c", &count.to_string(), address]).env("LC_ALL", "C");
    let output = namespace.run(|| command.output())?.context("Cannot run ping: install iputils-ping")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut times = times(&text);
    ensure!(times.len() == count, "{} replies of {count} have come:\n{text}", times.len());
    times.sort_unstable();
    Ok(times[count / 2])
}

fn times(output: &str) -> Vec<Duration> {
    let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse::<f64>().ok();
    output.lines().filter_map(time).map(|ms| Duration::from_secs_f64(ms / 1e3)).collect()
}

fn parse(output: &str) -> Result<PingResult> {
    let summary = output
        .lines()
        .find(|line| line.contains(" packets transmitted"))
        .context("There is no line 'packets transmitted'")?;
    let number = |word: &str| {
        summary.split(", ").find(|part| part.contains(word)).map_or(Ok(0), |part| {
            part.trim_start_matches('+')
                .split(' ')
                .next()
                .unwrap_or_default()
                .parse::<u64>()
                .context("no number")
        })
    };
    let result = PingResult {
        sent: number("transmitted")?,
        received: number("received")?,
        duplicates: number("duplicates")?,
    };
    ensure!(result.sent > 0, "Nothing was sent");
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let output = "64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.250 ms\nnothing\n";
        assert_eq!(times(output), [Duration::from_micros(250)]);
    }

    #[test]
    fn the_summary_is_read_with_and_without_duplicates() {
        let plain = "--- 10.0.0.1 ping statistics ---\n53 packets transmitted, 49 received, 7.54717% packet loss, time 9999ms\n";
        assert_eq!(parse(plain).unwrap(), PingResult { sent: 53, received: 49, duplicates: 0 });
        let double = "5 packets transmitted, 5 received, +2 duplicates, 0% packet loss, time 4ms\n";
        assert_eq!(parse(double).unwrap(), PingResult { sent: 5, received: 5, duplicates: 2 });
    }
}
