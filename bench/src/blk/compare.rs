//! One comparison: everybody gets the same load in turn, several times, and medians count.

use std::cmp::Reverse;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Measured;
use super::contender::{Contender, Field, Group, Test};
use crate::report::median;

/// How long everybody is tried, to find out which settings of a peer are worth to be measured.
const TRIAL: Duration = Duration::from_millis(150);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often.
    pub rounds: usize,
    /// How long each time.
    pub duration: Duration,
}

/// What one contender did.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Whose it is.
    pub group: Group,
    /// Its name, with the settings.
    pub name: String,
    /// The median of each figure.
    pub median: Measured,
}

impl Group {
    /// How many settings of a group get the full measurement, the best of a trial.
    fn finalists(self) -> usize {
        match self {
            Self::Daemon => 2,
            Self::Ours | Self::Stock | Self::BareRing | Self::Synchronous => 1,
        }
    }
}

/// Measures everybody, A B C A B C. Returns the best of each group, our own first.
///
/// # Errors
/// Some server breaks.
pub fn compare(field: &Field<'_>, test: &Test, effort: Effort) -> Result<Vec<Entry>> {
    let mut chosen = finalists(field, test)?;
    let mut rounds = vec![Vec::new(); chosen.len()];
    for _ in 0..effort.rounds {
        for (contender, measured) in chosen.iter().zip(&mut rounds) {
            measured.push(measure(field, contender, test, effort.duration)?);
        }
    }
    let mut entries: Vec<Entry> = chosen
        .drain(..)
        .zip(&rounds)
        .map(|(contender, rounds)| Entry {
            group: contender.group,
            name: contender.name.clone(),
            median: medians(rounds),
        })
        .collect();
    entries.sort_by(|a, b| a.group.cmp(&b.group).then(b.median.iops.total_cmp(&a.median.iops)));
    entries.dedup_by_key(|entry| entry.group);
    Ok(entries)
}

fn finalists<'f>(field: &'f Field<'_>, test: &Test) -> Result<Vec<&'f Contender>> {
    let mut tried = Vec::new();
    for contender in field.contenders() {
        // without a client there is nobody who sleeps
        if !test.polling && matches!(contender.group, Group::BareRing | Group::Synchronous) {
            continue;
        }
        let alone = field.contenders().iter().filter(|other| other.group == contender.group).count() == 1;
        let iops = if alone { 0.0 } else { measure(field, contender, test, TRIAL)?.iops };
        tried.push((contender, iops as u64));
    }
    // stable: who is equal stays in order
    tried.sort_by_key(|(contender, iops)| (contender.group, Reverse(*iops)));
    let mut chosen: Vec<&Contender> = Vec::new();
    for (contender, _) in tried {
        if chosen.iter().filter(|other| other.group == contender.group).count() < contender.group.finalists()
        {
            chosen.push(contender);
        }
    }
    Ok(chosen)
}

fn measure(field: &Field<'_>, contender: &Contender, test: &Test, duration: Duration) -> Result<Measured> {
    field.measure(contender, test, duration).with_context(|| format!("{}, {test:?}", contender.name))
}

/// The median of each figure of one contender's rounds.
pub fn medians(rounds: &[Measured]) -> Measured {
    let of = |figure: fn(&Measured) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
    Measured {
        iops: of(|measured| measured.iops),
        p50_us: of(|measured| measured.p50_us),
        p99_us: of(|measured| measured.p99_us),
        cpu_percent: of(|measured| measured.cpu_percent),
    }
}
