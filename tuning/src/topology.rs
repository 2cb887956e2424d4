//! The laboratory: two hosts, a client, and the two switches between them.
//!
//! ```text
//!   client ---- lan ------ host-a: br0 -- tap
//!                 |   \___ host-b: br0 -- tap          namespace "switch": bridges lan and replication
//!        replication ----- host-a, host-b: link0
//! ```
//!
//! The switches are in a namespace of their own: this machine's own network is not touched, and a cable can be pulled
//! at the switch while both hosts still see their link up.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::{Host, Namespace, Run, Side};

static LAST_LOGS: Mutex<String> = Mutex::new(String::new());

/// The client's address on the LAN.
pub const CLIENT: &str = "10.77.0.1";
/// The guest's address on the LAN.
pub const GUEST: &str = "10.77.0.10";
/// The guest's hardware address.
pub const MAC: &str = "52:54:00:c0:10:01";
/// The address of the guest's second network card, where it has one, in another network on the same wire.
pub const GUEST_SECOND: &str = "10.79.0.10";
/// The client's address there.
const CLIENT_SECOND: &str = "10.79.0.1";
/// The second card's hardware address.
pub(crate) const MAC_SECOND: &str = "52:54:00:c0:10:02";

/// Hosts, client and switches. All of it goes when this is dropped.
#[derive(Debug)]
pub struct Lab {
    switch: Namespace,
    client: Namespace,
    host_a: Host,
    host_b: Host,
    // last: what tears everything down
    run: Run,
}

impl Lab {
    /// Builds a laboratory.
    ///
    /// # Errors
    /// We are not root, or the kernel lacks namespaces, bridges or veth.
    pub fn build() -> Result<Self> {
        let run = Run::begin()?;
        let switch = Namespace::create(run.namespace("switch"))?;
        for bridge in ["lan", "replication"] {
            add_bridge(&switch, bridge)?;
        }
        let client = Namespace::create(run.namespace("client"))?;
        cable(&switch, "lan", "lan-client", &client, "lan0")?;
        for address in [CLIENT, CLIENT_SECOND] {
            client.ip(&format!("address add {address}/24 dev lan0"))?;
        }
        let host = |side: Side| {
            let name = format!("host-{}", side.node());
            let namespace = Namespace::create(run.namespace(&name))?;
            add_bridge(&namespace, "br0")?;
            cable(&switch, "lan", &lan_port(side), &namespace, "lan0")?;
            namespace.ip("link set lan0 master br0")?;
            cable(&switch, "replication", &link_port(side), &namespace, "link0")?;
            namespace.ip(&format!("address add {}/24 dev link0", side.link_address()))?;
            Host::create(side, namespace, run.directory().join(name))
        };
        let (host_a, host_b) = (host(Side::A)?, host(Side::B)?);
        Ok(Self { switch, client, host_a, host_b, run })
    }

    /// One of the hosts.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.host_a,
            Side::B => &self.host_b,
        }
    }

    /// The client's namespace.
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// The switches' namespace.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// The run that it belongs to.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// Gives everything between the client and a host's taps another MTU; the taps and the guest have their own.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn set_lan_mtu(&self, mtu: u16) -> Result<()> {
        self.client.ip(&format!("link set lan0 mtu {mtu}"))?;
        self.switch.ip(&format!("link set lan-client mtu {mtu}"))?;
        for side in [Side::A, Side::B] {
            self.switch.ip(&format!("link set {} mtu {mtu}", lan_port(side)))?;
            self.host(side).namespace().ip(&format!("link set lan0 mtu {mtu}"))?;
        }
        Ok(())
    }

    /// Interrupts the replication link at the switch; no end notices but by silence.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut_link(&self) -> Result<()> {
        self.switch.ip(&format!("link set {} nomaster", link_port(Side::A)))
    }

    /// Puts the replication link together again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn restore_link(&self) -> Result<()> {
        self.switch.ip(&format!("link set {} master replication", link_port(Side::A)))
    }

    /// Kills everything on a host with SIGKILL. Its kernel lives on and closes its connections.
    ///
    /// # Errors
    /// Something survives.
    pub fn kill_host(&self, side: Side) -> Result<()> {
        self.host(side).kill_everything()
    }

    /// Takes a host's power: first nothing of it reaches anybody any more, then everything on it dies.
    ///
    /// # Errors
    /// What `ip` says, or something survives.
    pub fn power_off(&self, side: Side) -> Result<()> {
        for port in [lan_port(side), link_port(side)] {
            self.switch.ip(&format!("link set {port} nomaster"))?;
        }
        self.kill_host(side)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::env::var_os("COLO_LAB_KEEP").is_some() {
            eprintln!("Kept: {}", self.run.directory().display());
            self.run.keep();
        }
        let tails = crate::process::log_tails(self.run.directory());
        *LAST_LOGS.lock().unwrap_or_else(PoisonError::into_inner) = tails;
    }
}

/// The ends of the logs of the laboratory that was removed last, to be shown when what it was for has failed.
pub fn last_logs() -> String {
    std::mem::take(&mut LAST_LOGS.lock().unwrap_or_else(PoisonError::into_inner))
}

pub(crate) fn lan_port(side: Side) -> String {
    format!("lan-{}", side.node())
}

fn link_port(side: Side) -> String {
    format!("link-{}", side.node())
}

fn add_bridge(namespace: &Namespace, name: &str) -> Result<()> {
    namespace.ip(&format!("link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"))?;
    namespace.ip(&format!("link set {name} up"))
}

/// A cable from a port of a switch to an interface elsewhere.
fn cable(switch: &Namespace, bridge: &str, port: &str, to: &Namespace, interface: &str) -> Result<()> {
    switch.ip(&format!("link add {port} type veth peer name {interface} netns {}", to.name()))?;
    switch.ip(&format!("link set {port} up master {bridge}"))?;
    to.ip(&format!("link set {interface} up"))
}
