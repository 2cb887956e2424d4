//! The programs that serve a network card, with a LAN that is not there.

use std::process::Command;

use anyhow::Result;
use colo_lab::program;

use crate::{Place, Server};

/// What that LAN does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lan {
    /// It takes every frame.
    Drop,
    /// It gives frames of this length, in bytes.
    Generate(usize),
    /// It gives back what it gets.
    Reflect,
}

impl Server {
    /// Our back end.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn our_card(place: Place<'_>, lan: Lan, more: &[String]) -> Result<Self> {
        let socket = place.directory.join("ours.sock");
        let mut command = Command::new(program("vhost-net-backend")?);
        command.arg("--socket-path").arg(&socket).args(["--core", &place.core.to_string(), "--null"]);
        command.arg(match lan {
            Lan::Drop => "drop".to_owned(),
            Lan::Generate(bytes) => format!("generate:{bytes}"),
            Lan::Reflect => "reflect".to_owned(),
        });
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
            .arg(format!("--vdev=net_vhost0,iface={},queues=1", socket.display()))
            // one that has nothing to print and no terminal ends at once
            .args(["--", "--stats-period=3600", "--auto-start", "--nb-cores=1", "--port-topology=loop"]);
        match lan {
            Lan::Drop => command.arg("--forward-mode=rxonly"),
            Lan::Generate(bytes) => {
                command.args(["--forward-mode=txonly".to_owned(), format!("--txpkts={bytes}")])
            }
            Lan::Reflect => command.arg("--forward-mode=io"),
        };
        Self::start(place, command, socket, "testpmd")
    }
}
