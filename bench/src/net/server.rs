//! The programs that serve a network card.

use std::process::Command;

use anyhow::Result;
use colo_lab::{Namespace, program};

use super::{drain, ping};
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
    /// A tap on which the host has an address.
    Host,
}

/// The taps' names, in the laboratory: those of a bridge, and those on which the host has an address. testpmd can open
/// only taps with several queues.
pub(super) const TAP: &str = "bench0";
pub(super) const MULTI_QUEUE_TAP: &str = "bench1";
/// One that leads to the first.
pub(super) const SOURCE_TAP: &str = "source";
const HOST_TAP: &str = "host0";
pub(super) const MULTI_QUEUE_HOST_TAP: &str = "host1";

/// Makes the taps. Those that lead to a bridge have one more port there, as hosts have it: that is where frames go.
///
/// # Errors
/// What `ip` says.
pub fn add_lan(namespace: &Namespace) -> Result<()> {
    for words in [
        "link add lan type bridge".to_owned(),
        "link add cable type veth peer name far".to_owned(),
        format!("tuntap add dev {MULTI_QUEUE_TAP} mode tap multi_queue"),
    ] {
        namespace.ip(&words)?;
    }
    for tap in [TAP, SOURCE_TAP, HOST_TAP] {
        namespace.ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"))?;
    }
    namespace.ip(&format!("link set {TAP} txqueuelen {}", drain::FRAMES + 64))?;
    for port in ["cable", TAP, SOURCE_TAP, MULTI_QUEUE_TAP] {
        namespace.ip(&format!("link set {port} up master lan"))?;
    }
    for other in ["far", "lan"] {
        namespace.ip(&format!("link set {other} up"))?;
    }
    namespace.await_port("cable")
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
            Lan::Host => {
                ping::set_address(place.namespace, HOST_TAP)?;
                command.args(["--tap", HOST_TAP])
            }
        };
        command.args(more);
        let server = Self::start(place, command, socket, "ours")?;
        if lan == Lan::Tap {
            place.namespace.await_port(TAP)?;
        }
        Ok(server)
    }
}
