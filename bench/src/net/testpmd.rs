//! DPDK's testpmd, on either side of a vhost-user socket.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use colo_lab::Process;

use super::Way;
use super::card::TAP_MAC;
use super::ping::{self, mac_text};
use super::server::{Lan, MULTI_QUEUE_HOST_TAP, MULTI_QUEUE_TAP};
use crate::report::median;
use crate::{Place, Server};

/// How many of the frontend's figures are taken, one for each second.
const SECONDS: usize = 3;

/// testpmd with these devices and options. Its other thread, which only waits, is on `main_core`.
fn testpmd(main_core: usize, core: usize, devices: &[String], options: &[&str]) -> Command {
    let mut command = Command::new("dpdk-testpmd");
    command
        .args(["--in-memory", "--single-file-segments", "--no-pci", "--no-telemetry", "--log-level=error"])
        .arg(format!("--lcores=0@{main_core},1@{core}"))
        .args(devices.iter().map(|device| format!("--vdev={device}")))
        .args(["--", "--auto-start", "--nb-cores=1"])
        .args(options);
    command
}

impl Server {
    /// testpmd with net_vhost.
    ///
    /// # Errors
    /// It is not installed, or there are no huge pages.
    pub fn testpmd(place: Place<'_>, main_core: usize, lan: Lan) -> Result<Self> {
        let socket = place.directory.join("testpmd.sock");
        let mut devices = vec![format!("net_vhost0,iface={},queues=1", socket.display())];
        let length = if let Lan::Generate(bytes) = lan { format!("--txpkts={bytes}") } else { String::new() };
        // one that has nothing to print and no terminal ends at once
        let mut options = vec!["--stats-period=3600"];
        match lan {
            Lan::Drop => options.push("--forward-mode=rxonly"),
            Lan::Generate(_) => options.extend(["--forward-mode=txonly", &length]),
            Lan::Reflect => options.extend(["--forward-mode=io", "--port-topology=loop"]),
            Lan::Tap => devices.push(format!("net_tap0,iface={MULTI_QUEUE_TAP}")),
            Lan::Host => {
                devices.push(format!("net_tap0,iface={MULTI_QUEUE_HOST_TAP},mac={}", mac_text(TAP_MAC)));
            }
        }
        let mut server =
            Self::start(place, testpmd(main_core, place.core, &devices, &options), socket, "testpmd")?;
        // it takes the tap down and up at its start, which neighbours do not survive
        if matches!(lan, Lan::Tap | Lan::Host) {
            server.await_output("packets/burst")?;
        }
        match lan {
            Lan::Tap => place.namespace.await_port(MULTI_QUEUE_TAP)?,
            Lan::Host => ping::set_address(place.namespace, MULTI_QUEUE_HOST_TAP)?,
            _ => {}
        }
        Ok(server)
    }
}

/// DPDK's own frontend (net_virtio_user) on `core`, against the server at `socket`. Returns how many frames a second it sends, or
/// receives.
///
/// # Errors
/// No frame passes.
pub fn frontend(place: Place<'_>, core: usize, socket: &Path, way: Way, frame_bytes: usize) -> Result<f64> {
    let devices = [format!("net_virtio_user0,path={},queues=1", socket.display())];
    let length = format!("--txpkts={frame_bytes}");
    let (mode, figure) = match way {
        Way::Transmit => ("--forward-mode=txonly", "Tx-pps:"),
        _ => ("--forward-mode=rxonly", "Rx-pps:"),
    };
    let command = testpmd(core, core, &devices, &["--stats-period=1", mode, &length]);
    let log = place.directory.join("frontend.log");
    // what an earlier one has printed
    drop(std::fs::remove_file(&log));
    let mut process = Process::start(place.namespace, command, &log)?;
    // the first second has the start in it
    let figures = process.until("figures", Duration::from_secs(30), || {
        let text = std::fs::read_to_string(&log).ok()?;
        let figures = figures(&text, figure);
        (figures.len() > SECONDS).then(|| figures[1..].to_vec())
    })?;
    ensure!(figures.iter().all(|rate| *rate > 0.0), "No frame passes: {}", process.output());
    Ok(median(&figures))
}

/// The numbers behind a word.
fn figures(text: &str, word: &str) -> Vec<f64> {
    let behind = |line: &str| line.split_once(word)?.1.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(behind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_found() {
        let text = "  Throughput (since last show)\n  Rx-pps:            0          Rx-bps:            0\n\
                    \x20 Tx-pps:     11136473          Tx-bps:   5701874520\n";
        assert_eq!(figures(text, "Tx-pps:"), [11_136_473.0]);
        assert_eq!(figures(text, "Rx-pps:"), [0.0]);
    }
}
