//! The cases of the comparison and their targets.

use std::time::Duration;

use anyhow::Result;

use super::compare::{Effort, Entry, compare, medians};
use super::contender::{Field, Group, Setting, Test};
use super::{Access, Measured};
use crate::report::Row;

/// What lies behind the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: the transport alone.
    Null,
    /// A file in memory.
    Tmpfs,
    /// A file on the disk, with O_DIRECT.
    Disk,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Null, Self::Tmpfs, Self::Disk];

    /// Its name in the cases.
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    /// The least ratio to a group's best that is wanted at this depth.
    fn target(self, group: Group, depth: u16) -> Option<f64> {
        match (self, group, depth) {
            (Self::Null, Group::Daemon, 1) => Some(3.0),
            (Self::Null, Group::Daemon, _) => Some(2.5),
            (Self::Tmpfs, Group::Daemon, 1) => Some(1.3),
            (Self::Tmpfs, Group::Daemon, _) => Some(1.15),
            (Self::Disk, Group::Daemon, 1) => Some(1.0),
            (Self::Tmpfs | Self::Disk, Group::BareRing, 2..) => Some(0.95),
            _ => None,
        }
    }
}

/// What a case compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Ours with the peers.
    Transfers { access: Access, depth: u16 },
    /// The same with a client that sleeps.
    Eventfd,
    /// Processor time without work.
    Idle,
    /// Ours with four queues and with one.
    FourQueues { access: Access },
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What lies behind the device.
    pub kind: Kind,
    what: What,
}

const DEPTHS: [u16; 3] = [1, 32, 128];
/// At this depth the tail is looked at.
const TAIL_DEPTH: u16 = 32;
/// p99 stays below so many p50.
const TAIL_LIMIT: f64 = 3.0;
const IDLE_LIMIT_PERCENT: f64 = 1.0;
/// Of several queues together.
const QUEUES_DEPTH: u16 = 32;

impl Case {
    /// All cases of a backing.
    pub fn of(kind: Kind) -> Vec<Self> {
        let mut whats = Vec::new();
        for access in [Access::READ, Access::WRITE] {
            whats.extend(DEPTHS.map(|depth| What::Transfers { access, depth }));
        }
        match kind {
            Kind::Null => whats.extend([What::Eventfd, What::Idle]),
            Kind::Tmpfs => whats.extend([What::Eventfd, What::Idle]),
            Kind::Disk => {}
        }
        if kind != Kind::Disk {
            whats.extend([Access::READ, Access::WRITE].map(|access| What::FourQueues { access }));
        }
        whats.into_iter().map(|what| Self { kind, what }).collect()
    }

    /// What it is called, in the table and for `--only`.
    pub fn name(&self) -> String {
        let kind = self.kind.name();
        match self.what {
            What::Transfers { access, depth } => format!("{kind} {} depth {depth}", verb(access)),
            What::Eventfd => format!("{kind} read depth 1 eventfd"),
            What::Idle => format!("{kind} idle"),
            What::FourQueues { access } => format!("{kind} {} four queues", verb(access)),
        }
    }

    /// Whether it needs our server alone, with four queues.
    pub fn needs_queues(&self) -> bool {
        matches!(self.what, What::FourQueues { .. })
    }

    /// Measures it against `field`, prints everybody's figures, and returns the rows.
    ///
    /// # Errors
    /// Some server breaks.
    pub fn run(&self, field: &Field<'_>, effort: Effort) -> Result<Vec<Row>> {
        let name = self.name();
        match self.what {
            What::Transfers { access, depth } => {
                let test = Test { access, queues: 1, depth, polling: true };
                let entries = compare(field, &test, effort)?;
                let target = |group| self.kind.target(group, depth);
                let mut rows = rows(&name, &entries, target);
                if depth == TAIL_DEPTH {
                    rows.extend(tail(&name, &entries));
                }
                Ok(rows)
            }
            What::Eventfd => {
                let test = Test { access: Access::READ, queues: 1, depth: 1, polling: false };
                let entries = compare(field, &test, effort)?;
                Ok(rows(&name, &entries, |group| (group == Group::Daemon).then_some(1.0)))
            }
            What::Idle => {
                let percent = field.idle_cpu_percent(effort.duration.max(Duration::from_secs(1)))?;
                let limit = ("limit", IDLE_LIMIT_PERCENT);
                Ok(vec![Row::less_is_better(&name, "% CPU", percent, limit, 1.0)])
            }
            What::FourQueues { access } => four_queues(&name, field, access, effort),
        }
    }
}

/// The contenders of a backing for its cases with several queues.
///
/// # Errors
/// Our server does not start.
pub fn queues_field<'a>(setting: Setting<'a>, seed: u64) -> Result<Field<'a>> {
    Field::only_ours(setting, 4, seed)
}

fn verb(access: Access) -> &'static str {
    if access == Access::READ { "read" } else { "write" }
}

/// Prints everybody and compares ours with those groups for which there is a target.
fn rows(case: &str, entries: &[Entry], target: impl Fn(Group) -> Option<f64>) -> Vec<Row> {
    for entry in entries {
        print_figures(case, &entry.name, &entry.median);
    }
    let Some(ours) = entries.iter().find(|entry| entry.group == Group::Ours) else {
        return Vec::new();
    };
    let row = |peer: &Entry| {
        let figure = (peer.name.as_str(), peer.median.iops);
        Some(Row::more_is_better(case, "IOPS", ours.median.iops, figure, target(peer.group)?))
    };
    entries.iter().filter(|entry| entry.group != Group::Ours).filter_map(row).collect()
}

fn tail(case: &str, entries: &[Entry]) -> Option<Row> {
    let ours = entries.iter().find(|entry| entry.group == Group::Ours)?;
    let tail = ours.median.p99_us / ours.median.p50_us;
    Some(Row::less_is_better(&format!("{case} p99/p50"), "p99/p50", tail, ("limit", TAIL_LIMIT), 1.0))
}

fn four_queues(case: &str, field: &Field<'_>, access: Access, effort: Effort) -> Result<Vec<Row>> {
    let contender = &field.contenders()[0];
    let tests = [1, 4].map(|queues| Test { access, queues, depth: QUEUES_DEPTH / queues, polling: true });
    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..effort.rounds {
        for (test, measured) in tests.iter().zip(&mut rounds) {
            measured.push(field.measure(contender, test, effort.duration)?);
        }
    }
    let [one, four] = rounds.map(|rounds| medians(&rounds));
    print_figures(case, "four queues", &four);
    print_figures(case, "one queue", &one);
    Ok(vec![Row::more_is_better(case, "IOPS", four.iops, ("ours with one queue", one.iops), 1.0)])
}

/// The heading of what [`Case::run`] prints.
pub fn print_heading() {
    println!(
        "| {:<28} | {:<58} | {:>10} | {:>9} | {:>9} | {:>8} |",
        "case", "who", "IOPS", "p50 us", "p99 us", "CPU %"
    );
}

fn print_figures(case: &str, name: &str, measured: &Measured) {
    let Measured { iops, p50_us, p99_us, cpu_percent } = measured;
    println!(
        "| {case:<28} | {name:<58} | {iops:>10.0} | {p50_us:>9.2} | {p99_us:>9.2} | {cpu_percent:>8.1} |"
    );
}
