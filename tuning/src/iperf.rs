//! `iperf3` against the server in a guest ([`crate::Solo`] has one).

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Namespace;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// To the guest.
    ToGuest,
    /// From the guest.
    FromGuest,
}

/// Has one TCP connection send as fast as it can for so long (whole seconds), from inside `namespace`. Returns how many
/// bytes a second have arrived.
///
/// # Errors
/// There is no `iperf3`, nobody listens, or nothing arrives.
pub fn iperf3(namespace: &Namespace, address: &str, flow: Flow, duration: Duration) -> Result<f64> {
    let mut command = Command::new("iperf3");
    command.args(["--client", address, "--json", "--time", &duration.as_secs().max(1).to_string()]);
    if flow == Flow::FromGuest {
        command.arg("--reverse");
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let text = loop {
        let output = namespace.run(|| command.output())?.context("Cannot run iperf3: install it")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // the server takes one client at a time, takes leave of the one before a little later than that does, and then
        // resets who has come meanwhile; the guest starts it last of all
        let later = ["the server is busy", "Connection refused", "receive control message: Connection reset"];
        let is_later = later.iter().any(|words| text.contains(words));
        if !is_later || Instant::now() > deadline {
            break text;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let arrived = parse(&text).with_context(|| format!("iperf3 prints {text}"))?;
    ensure!(arrived > 0.0, "iperf3: nothing arrives: {text}");
    Ok(arrived)
}

fn parse(json: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(json)?;
    if let Some(error) = report.get("error") {
        anyhow::bail!("{error}");
    }
    let bits = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    Ok(bits.context("no rate")? / 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_at_the_receiver_is_read() {
        let report =
            r#"{"end": {"sum_sent": {"bits_per_second": 9}, "sum_received": {"bits_per_second": 16.0}}}"#;
        assert_eq!(parse(report).unwrap(), 2.0);
        assert!(parse(r#"{"start": {}, "end": {}}"#).is_err());
        assert!(parse(r#"{"end": {}, "error": "unable to connect"}"#).is_err());
    }
}
