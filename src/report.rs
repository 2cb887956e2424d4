//! `colo status` for a person.

use std::fmt::Write;

use serde_json::Value;

/// What is told of the network back end: a name, and where it stands in its status. Each half has some of them.
const NET: [(&str, &str); 12] = [
    ("phase", "/pair/phase"),
    ("packets mirrored", "/pair/proxy/mirrored_packets"),
    ("compared", "/pair/proxy/compare/pvm_packets"),
    ("bypassed", "/pair/proxy/compare/bypassed"),
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

/// Of the last mismatches and of the services with most, so many are told.
const MISMATCHES_SHOWN: usize = 5;

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
        let list = |at: &str| card.pointer(at).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let now_us = card.pointer("/pair/clock_us").and_then(Value::as_u64).unwrap_or(0);
        for mismatch in list("/pair/proxy/compare/recent_mismatches").iter().take(MISMATCHES_SHOWN) {
            line("mismatch", describe(mismatch, now_us));
        }
        for count in list("/pair/proxy/compare/mismatches_by_service").iter().take(MISMATCHES_SHOWN) {
            let service = count["service"].as_str().unwrap_or("?");
            line("differ most", format!("{service}: {} times", count["count"]));
        }
        let figure = |at: &str| card.pointer(at).and_then(Value::as_u64);
        if let (Some(output), Some(link)) =
            (figure("/pair/proxy/digest/output_bytes"), figure("/pair/proxy/digest/link_bytes"))
            && output > 0
        {
            let percent = link as f64 * 100.0 / output as f64;
            line("link", format!("{link} bytes for {output} of the SVM's output, {percent:.1} %"));
        }
    }
    out
}

/// One mismatch, of those that the network back end remembers.
fn describe(mismatch: &Value, now_us: u64) -> String {
    let text = |name: &str| mismatch[name].as_str().unwrap_or("?");
    let ago_ms = now_us.saturating_sub(mismatch["at_us"].as_u64().unwrap_or(now_us)) / 1000;
    let ago = if ago_ms < 1000 { format!("{ago_ms} ms") } else { format!("{} s", ago_ms / 1000) };
    let mut out = format!("{ago} ago, {}, {} so far: {}", text("flow"), mismatch["count"], text("what"));
    if let Some(bytes) = mismatch["bytes"].as_object() {
        let shown = |name: &str| from_hex(bytes.get(name).and_then(Value::as_str).unwrap_or_default());
        let (before, pvm, svm) = (shown("before"), shown("pvm"), shown("svm"));
        write!(out, "; both say \"{before}\", then the PVM \"{pvm}\", the SVM \"{svm}\"")
            .expect("a String takes all");
    }
    out
}

/// Bytes that are given in hexadecimal, as text that no terminal acts on.
fn from_hex(digits: &str) -> String {
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
    let bytes: Vec<u8> =
        digits.as_bytes().chunks_exact(2).map(|pair| value(pair[0]) << 4 | value(pair[1])).collect();
    bytes.escape_ascii().to_string()
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
            "net": [{"pair": {"proxy": {"mirrored_packets": 5, "compare": {"bypassed": 6},
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
            "bypassed 6",
            "3.5 %",
        ] {
            assert!(shown.contains(part), "{shown}");
        }
        status(&serde_json::json!({}));
    }

    #[test]
    fn a_mismatch_is_shown_with_its_bytes_and_those_that_differ_most() {
        let mismatch = |count: u64| {
            serde_json::json!({
                "at_us": 1_000_000, "cause": "mismatch", "flow": "tcp a -> b", "count": count,
                "what": "offset 8", "bytes": {"offset": 8, "before": "0d0a22", "pvm": "1b", "svm": ""},
            })
        };
        let mismatches: Vec<Value> = (0..9).map(mismatch).collect();
        let shown =
            status(&serde_json::json!({"net": [{"pair": {"clock_us": 4_500_000, "proxy": {"compare": {
                "recent_mismatches": mismatches,
                "mismatches_by_service": [{"service": "tcp guest a", "count": 17, "overcount": 0}],
            }}}}]}));
        let first = r#"mismatch      3 s ago, tcp a -> b, 0 so far: offset 8; both say "\r\n\"", then the PVM "\x1b", the SVM """#;
        assert!(shown.lines().any(|line| line == first), "{shown}");
        assert_eq!(shown.matches("3 s ago").count(), MISMATCHES_SHOWN);
        assert!(shown.lines().any(|line| line == "differ most   tcp guest a: 17 times"), "{shown}");
    }
}
