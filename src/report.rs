//! `colo status` for a person.

use std::fmt::Write;

use serde_json::Value;

/// What is told of the network back end: a name, and where it stands in its status. Each half has some of them.
const NET: [(&str, &str); 11] = [
    ("phase", "/pair/phase"),
    ("packets mirrored", "/pair/proxy/mirrored_packets"),
    ("compared", "/pair/proxy/compare/pvm_packets"),
    ("released at once", "/pair/proxy/compare/released_at_once"),
    ("released by a match", "/pair/proxy/compare/released_by_match"),
    ("released by a checkpoint", "/pair/proxy/compare/released_by_commit"),
    ("bytes held", "/pair/proxy/compare/held_bytes"),
    ("digests", "/pair/proxy/compare/digests"),
    ("asked for bytes", "/pair/proxy/compare/asked"),
    ("connections rewritten", "/pair/proxy/rewrite/connections"),
    ("packets of the SVM", "/pair/proxy/svm_packets"),
];

/// The same for the disk's.
const BLOCK: [(&str, &str); 7] = [
    ("role", "/role"),
    ("reads", "/reads"),
    ("writes", "/writes"),
    ("flushes", "/flushes"),
    ("writes forwarded", "/primary/forwarded_writes"),
    ("writes applied", "/secondary/applied_writes"),
    ("bytes buffered", "/secondary/buffer_bytes"),
];

/// The status as text.
pub(crate) fn status(value: &Value) -> String {
    let text = |name: &str| value[name].as_str().unwrap_or("?").to_owned();
    let mut out = String::new();
    let mut line = |name: &str, what: String| writeln!(out, "{name:<14}{what}").expect("a String takes all");
    line("VM", text("vm"));
    line("node", format!("{}, peer {}", text("node"), text("peer")));
    line("role", format!("{}: {}", text("role"), text("state")));
    line("generation", value["generation"].to_string());
    line("epoch", value["epoch"].to_string());
    let checkpoints = &value["checkpoints"];
    if let Some(causes) = checkpoints["by_cause"].as_object().filter(|causes| !causes.is_empty()) {
        let causes: Vec<String> = causes.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
        line("checkpoints", causes.join(", "));
        let of = |name: &str| {
            let mut figures: Vec<u64> = checkpoints["latest"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|c| c[name].as_u64())
                .collect();
            figures.sort_unstable();
            (percentile(&figures, 50), percentile(&figures, 99))
        };
        let (pause, pause_99) = of("pause_us");
        let (pages, pages_99) = of("pages");
        line("pause", format!("median {pause} us, p99 {pause_99} us"));
        line("dirty pages", format!("median {pages}, p99 {pages_99}"));
    }
    if let Some(failover) = value["failover"].as_object() {
        let figure = |name: &str| failover[name].to_string();
        line(
            "failover",
            format!("serving after {} us, claimed after {} us", figure("serving_us"), figure("claimed_us")),
        );
    }
    let cards = value["net"].as_array().map_or(&[][..], Vec::as_slice);
    let devices =
        cards.iter().map(|card| ("net", card, &NET[..])).chain([("block", &value["block"], &BLOCK[..])]);
    for (device, device_status, figures) in devices {
        if let Some(error) = device_status["error"].as_str() {
            line(device, error.to_owned());
        }
        let told: Vec<String> = figures
            .iter()
            .filter_map(|(name, at)| {
                let value = device_status.pointer(at).filter(|value| value.is_u64() || value.is_string())?;
                Some(format!("{name} {}", value.as_str().map_or(value.to_string(), str::to_owned)))
            })
            .collect();
        if !told.is_empty() {
            line(device, told.join(", "));
        }
    }
    for card in cards {
        let figure = |at: &str| card.pointer(at).and_then(Value::as_u64);
        if let (Some(output), Some(link)) =
            (figure("/pair/proxy/digest/output_bytes"), figure("/pair/proxy/digest/link_bytes"))
            && output > 0
        {
            let percent = link as f64 * 100.0 / output as f64;
            line("link", format!("{link} bytes for {output} of the SVM's output, {percent:.1} %"));
        }
        if let Some(mismatch) = card.pointer("/pair/proxy/compare/last_mismatch").and_then(Value::as_str) {
            line("last mismatch", mismatch.to_owned());
        }
    }
    out
}

/// The value below which so many per cent of a sorted list lie; 0 for an empty one.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    match sorted.len() {
        0 => 0,
        len => sorted[(len * percent).div_ceil(100).clamp(1, len) - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        assert_eq!(percentile(&[], 50), 0);
        assert_eq!(percentile(&[1, 2, 3], 50), 2);
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&hundred, 50), percentile(&hundred, 99)), (50, 99));
    }

    #[test]
    fn a_status_of_any_shape_is_shown() {
        let full = serde_json::json!({
            "vm": "web", "node": "a", "peer": "b", "role": "primary", "state": "protected", "generation": 1, "epoch": 4,
            "checkpoints": {"by_cause": {"start": 1, "mismatch": 3}, "latest": [{"pause_us": 7, "pages": 9}]},
            "net": [{"pair": {"proxy": {"mirrored_packets": 5, "compare": {"last_mismatch": "tcp"},
                "digest": {"output_bytes": 200, "link_bytes": 7}}}}], "block": {"error": "gone"}, "failover": null,
        });
        let shown = status(&full);
        for part in [
            "web",
            "primary: protected",
            "mismatch 3",
            "median 7 us",
            "packets mirrored 5",
            "gone",
            "tcp",
            "3.5 %",
        ] {
            assert!(shown.contains(part), "{shown}");
        }
        status(&serde_json::json!({}));
    }
}
