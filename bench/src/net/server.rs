//! The programs that serve a network card.

use std::process::Command;

use anyhow::Result;
use colo_lab::{Namespace, program};

use crate::{Place, Server};

/// What is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lan {
    /// Nothing, which takes every frame.
    Drop,
    /// Nothing, which gives frames of this length, in bytes.
    Generate(usize),
    /// Nothing, which gives back what it gets.
    Reflect,
    /// A tap that leads to a bridge ([`add_lan`]).
    Tap,
}

/// The tap's name, in the laboratory.
pub(super) const TAP: &str = "bench0";
/// And of one that testpmd can open.
const MULTI_QUEUE_TAP: &str = "bench1";

/// Makes the taps, ports of a bridge with one more port, as hosts have it: that is where frames go.
///
/// # Errors
/// What `ip` says.
pub fn add_lan(namespace: &Namespace) -> Result<()> {
    for words in [
        "link add lan type bridge".to_owned(),
        "link add cable type veth peer name far".to_owned(),
        format!("tuntap add dev {TAP} mode tap vnet_hdr"),
        format!("tuntap add dev {MULTI_QUEUE_TAP} mode tap multi_queue"),
    ] {
        namespace.ip(&words)?;
    }
    for port in ["cable", TAP, MULTI_QUEUE_TAP] {
        namespace.ip(&format!("link set {port} up master lan"))?;
    }
    for other in ["far", "lan"] {
        namespace.ip(&format!("link set {other} up"))?;
    }
    Ok(())
}

impl Server {
    /// Our back end.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn our_card(place: Place<'_>, lan: Lan, more: &[String]) -> Result<Self> {
        let socket = place.directory.join("ours.sock");
        let mut command = Command::new(program("vhost-net-backend")?);
        command.arg("--socket-path").arg(&socket).args(["--core", &place.core.to_string()]);
        match lan {
            Lan::Drop => command.args(["--null", "drop"]),
            Lan::Generate(bytes) => command.args(["--null".to_owned(), format!("generate:{bytes}")]),
            Lan::Reflect => command.args(["--null", "reflect"]),
            Lan::Tap => command.args(["--tap", TAP]),
        };
        Self::start(
            place,
            {
                command.args(more);
                command
            },
            socket,
            "ours",
        )
    }

    /// DPDK's testpmd with net_vhost, whose other thread, which only waits, is on `main_core`.
    ///
    /// # Errors
    /// It is not installed, or there are no huge pages.
    pub fn testpmd(place: Place<'_>, main_core: usize, lan: Lan) -> Result<Self> {
        let socket = place.directory.join("testpmd.sock");
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["--in-memory", "--no-pci", "--no-telemetry", "--log-level=error"])
            .arg(format!("--lcores=0@{main_core},1@{}", place.core))
            .arg(format!("--vdev=net_vhost0,iface={},queues=1", socket.display()));
        if lan == Lan::Tap {
            command.arg(format!("--vdev=net_tap0,iface={MULTI_QUEUE_TAP}"));
        }
        let topology = if lan == Lan::Tap { "paired" } else { "loop" };
        // one that has nothing to print and no terminal ends at once
        command.args(["--", "--stats-period=3600", "--auto-start", "--nb-cores=1"]);
        command.arg(format!("--port-topology={topology}"));
        match lan {
            Lan::Drop => command.arg("--forward-mode=rxonly"),
            Lan::Generate(bytes) => {
                command.args(["--forward-mode=txonly".to_owned(), format!("--txpkts={bytes}")])
            }
            Lan::Reflect | Lan::Tap => command.arg("--forward-mode=io"),
        };
        Self::start(place, command, socket, "testpmd")
    }
}
