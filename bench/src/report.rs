//! The one form in which all our benchmarks tell their results: rows of ours against a peer, with a target.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One comparison. More is better in `ratio`, whatever the unit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub case: String,
    /// Our figure, a median.
    pub ours: f64,
    /// What it is compared with: a peer's figure, a median of the same run, or a limit.
    pub peer: f64,
    /// Whose figure that is, with its settings; `limit` for a limit.
    pub peer_name: String,
    /// Of both figures.
    pub unit: String,
    /// How much better ours is: ours / peer where more is better, peer / ours where less is.
    pub ratio: f64,
    /// The least ratio that we want.
    pub target: f64,
    /// Whether it is reached.
    pub met: bool,
}

impl Row {
    /// A figure of which more is better, such as requests per second.
    pub fn more_is_better(case: &str, unit: &str, ours: f64, peer: (&str, f64), target: f64) -> Self {
        Self::new(case, unit, ours, peer, ours / peer.1, target)
    }

    /// A figure of which less is better, such as a latency.
    pub fn less_is_better(case: &str, unit: &str, ours: f64, peer: (&str, f64), target: f64) -> Self {
        // nothing at all is counted as a thousandth
        Self::new(case, unit, ours, peer, peer.1 / ours.max(peer.1 / 1000.0), target)
    }

    fn new(case: &str, unit: &str, ours: f64, peer: (&str, f64), ratio: f64, target: f64) -> Self {
        Self {
            case: case.into(),
            ours,
            peer: peer.1,
            peer_name: peer.0.into(),
            unit: unit.into(),
            // 0 / 0 is no ratio, JSON has no word for it, and nothing was reached
            ratio: if ratio.is_finite() { ratio } else { 0.0 },
            target,
            met: ratio.is_finite() && ratio >= target,
        }
    }
}

/// Writes `{"rows": […]}` to `path`, whose directory is made.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &Path, rows: &[Row]) -> Result<()> {
    #[derive(Serialize)]
    struct Document<'a> {
        rows: &'a [Row],
    }
    let mut text = serde_json::to_string_pretty(&Document { rows }).context("The rows as JSON")?;
    text.push('\n');
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("Cannot make {}", directory.display()))?;
    }
    fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
}

/// Prints the rows and what disturbed them, and writes them to `path`: how every comparison ends.
///
/// # Errors
/// They cannot be written.
pub fn publish(rows: &[Row], busy_cores: f64, path: &Path) -> Result<()> {
    print(rows);
    write(path, rows)?;
    println!(
        "\nOther programs kept {busy_cores:.2} cores busy meanwhile; below 0.1 the figures are undisturbed."
    );
    let met = rows.iter().filter(|row| row.met).count();
    println!("{met} of {} targets met; {}", rows.len(), path.display());
    Ok(())
}

/// Prints the rows as a table.
pub fn print(rows: &[Row]) {
    let width = |title: &str, of: fn(&Row) -> &str| {
        rows.iter().map(|row| of(row).chars().count()).chain([title.len()]).max().unwrap_or_default()
    };
    let (case, peer) = (width("case", |row| &row.case), width("peer", |row| &row.peer_name));
    println!(
        "| {:<case$} | {:>12} | {:>12} | {:<8} | {:<peer$} | {:>6} | {:>6} | met |",
        "case", "ours", "the peer's", "unit", "peer", "ratio", "target"
    );
    for row in rows {
        println!(
            "| {:<case$} | {:>12} | {:>12} | {:<8} | {:<peer$} | {:>6.2} | {:>6.2} | {} |",
            row.case,
            figure(row.ours),
            figure(row.peer),
            row.unit,
            row.peer_name,
            row.ratio.min(999.0),
            row.target,
            if row.met { "yes" } else { "NO " }
        );
    }
}

/// Large figures without decimals.
fn figure(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// The median: the mean of the two in the middle where their number is even; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_only_when_it_is_reached() {
        let row = |ours, target| Row::more_is_better("case", "IOPS", ours, ("peer", 100.0), target);
        assert!(row(300.0, 3.0).met);
        assert!(!row(299.9, 3.0).met);
        let row = |ours| Row::less_is_better("case", "%", ours, ("limit", 1.0), 1.0);
        assert!(row(0.5).met && row(0.0).met && row(1.0).met);
        assert!(!row(1.1).met);
    }

    #[test]
    fn a_peer_that_did_nothing_proves_nothing() {
        assert!(!Row::more_is_better("case", "IOPS", 0.0, ("peer", 0.0), 1.0).met);
        assert!(!Row::more_is_better("case", "IOPS", 5.0, ("peer", 0.0), 1.0).met);
    }

    #[test]
    fn the_document_has_the_shared_form() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bench/case.json");
        write(&path, &[Row::more_is_better("a", "IOPS", 3.0, ("b", 2.0), 1.0)]).unwrap();
        let read: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let row = serde_json::json!({
            "case": "a", "ours": 3.0, "peer": 2.0, "peer_name": "b", "unit": "IOPS", "ratio": 1.5, "target": 1.0,
            "met": true
        });
        assert_eq!(read, serde_json::json!({"rows": [row]}));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
