//! The configuration of one VM: one TOML file, the same on both hosts.
//!
//! `tuning/example.toml` is the commented example.

mod disk;
mod net;
pub mod policy;
mod several;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use self::disk::{CacheMode, DiskConfig};
pub use self::net::{DigestMode, NetConfig};
use self::several::several;

/// NICs that a VM may have.
const NICS_MAX: usize = 8;

/// Why a configuration cannot be used. The text names the file, the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("Cannot read the configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The file is not TOML, or holds unknown or missing keys.
    #[error("The configuration {path} is malformed: {error}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        error: String,
    },
    /// The values do not make sense.
    #[error("The configuration {path} is wrong: {what}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key, what is wrong with it, and what to do.
        what: String,
    },
}

/// A whole configuration file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The VM.
    pub vm: VmConfig,
    /// Where the two sides meet.
    pub link: LinkConfig,
    /// Who decides which side goes on.
    pub arbiter: ArbiterConfig,
    /// Signs of life.
    #[serde(default)]
    pub heartbeat: HeartbeatConfig,
    /// When checkpoints are taken.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// The network device.
    #[serde(default)]
    pub net: NetConfig,
    /// The disk.
    #[serde(default)]
    pub disk: DiskConfig,
    /// The two hosts, by name.
    pub node: BTreeMap<String, NodeConfig>,
}

/// The VM itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Its name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// `auto`, `kvm` or `tcg`.
    #[serde(default = "auto")]
    pub accel: String,
    /// QEMU's machine type. Name a versioned one (`pc-i440fx-7.2`) when the hosts' QEMU packages may differ.
    #[serde(default = "pc")]
    pub machine: String,
    /// QEMU's CPU model; by default what suits the accelerator. The same must exist on both hosts.
    #[serde(default)]
    pub cpu: Option<String>,
    /// MAC address of the guest's network card, or of each of its cards.
    #[serde(deserialize_with = "several")]
    pub mac: Vec<String>,
    /// Kernel to boot directly; without it the guest boots from its disk.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for `kernel`.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line for `kernel`.
    #[serde(default)]
    pub append: Option<String>,
    /// The QEMU program.
    #[serde(default = "qemu")]
    pub qemu: PathBuf,
    /// More arguments for QEMU. They must not bring NICs or disks of their own.
    #[serde(default)]
    pub qemu_args: Vec<String>,
    /// File that gets what the guest writes to its first serial port. `{node}` stands for the node's name.
    #[serde(default)]
    pub serial_log: Option<String>,
}

/// The connection between the hosts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// TCP port; one per VM.
    pub port: u16,
    /// The node that is the primary when the VM is protected for the first time.
    pub primary: String,
    /// How long the primary tries to reach its peer at start before it gives up, in seconds. 0: for ever.
    #[serde(default)]
    pub connect_limit_s: u64,
}

/// The register that decides which side may go on alone.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ArbiterConfig {
    /// Files in a directory that both hosts see, one per generation.
    File {
        /// The directory.
        directory: PathBuf,
    },
}

/// Signs of life on the link.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeartbeatConfig {
    /// Time between two of them, in milliseconds.
    pub interval_ms: u64,
    /// A peer that was silent for this long is taken for dead, in milliseconds.
    pub limit_ms: u64,
}

/// When checkpoints are taken.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// A checkpoint at least this often, in milliseconds.
    pub interval_ms: u64,
    /// A packet held for longer than this asks for a checkpoint, in milliseconds.
    pub held_ms_max: u64,
    /// More held output than this asks for a checkpoint, in bytes.
    pub held_bytes_max: u64,
    /// How long the secondary may take to commit one, in milliseconds; longer is a lost link.
    pub limit_ms: u64,
}

/// One of the two hosts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Its address on the replication link.
    pub address: IpAddr,
    /// The VM's disk on this host: a raw image file or a block device.
    pub disk: PathBuf,
    /// The tap on this host that leads to the LAN, one for each network card; it is created when missing.
    #[serde(deserialize_with = "several")]
    pub tap: Vec<String>,
    /// The core that the network worker is pinned to, one for each network card; not pinned without it.
    #[serde(default, deserialize_with = "several")]
    pub net_core: Vec<usize>,
    /// The core that the disk's workers are pinned to; not pinned without it.
    #[serde(default)]
    pub disk_core: Option<usize>,
}

fn one() -> u32 {
    1
}
fn auto() -> String {
    "auto".into()
}
fn pc() -> String {
    "pc".into()
}
fn qemu() -> PathBuf {
    "qemu-system-x86_64".into()
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self { interval_ms: 100, limit_ms: 500 }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { interval_ms: 10_000, held_ms_max: 100, held_bytes_max: 16 << 20, limit_ms: 10_000 }
    }
}

impl HeartbeatConfig {
    /// Time between two heartbeats.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    /// Silence after which the peer is taken for dead.
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// The file cannot be read, is not what it should be, or its values do not fit together.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Malformed {
            path: path.to_owned(),
            error: one_line(&text, &error),
        })?;
        match config.fault() {
            None => Ok(config),
            Some(what) => Err(ConfigError::Invalid { path: path.to_owned(), what }),
        }
    }

    fn fault(&self) -> Option<String> {
        let word = |text: &str| {
            !text.is_empty()
                && !text.starts_with('.')
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let vm = &self.vm;
        if !word(&vm.name) || vm.name.len() > 40 {
            return Some(format!("vm.name = {:?}: use 1 to 40 letters, digits, '-', '_' and '.'", vm.name));
        }
        if vm.memory_mib == 0 || vm.vcpus == 0 {
            return Some("vm.memory_mib and vm.vcpus must be at least 1".into());
        }
        if !["auto", "kvm", "tcg"].contains(&vm.accel.as_str()) {
            return Some(format!("vm.accel = {:?}: use \"auto\", \"kvm\" or \"tcg\"", vm.accel));
        }
        if let Some(mac) = vm.mac.iter().find(|mac| !is_unicast_mac(mac)) {
            return Some(format!("vm.mac = {mac:?}: give a unicast address such as \"52:54:00:12:34:56\""));
        }
        if let Some(what) = self.cards_fault() {
            return Some(what);
        }
        if vm.kernel.is_none() && (vm.initrd.is_some() || vm.append.is_some()) {
            return Some("vm.initrd and vm.append need vm.kernel".into());
        }
        if self.node.len() != 2 {
            return Some(format!("{} [node.NAME] sections: there must be exactly two", self.node.len()));
        }
        if let Some(name) = self.node.keys().find(|name| !word(name) || name.len() > 20) {
            return Some(format!(
                "[node.{name}]: use 1 to 20 letters, digits, '-', '_' and '.' for the name"
            ));
        }
        if !self.node.contains_key(&self.link.primary) {
            return Some(format!(
                "link.primary = {:?} is none of the [node.NAME] sections",
                self.link.primary
            ));
        }
        let mut addresses = self.node.values().map(|node| node.address);
        if addresses.next() == addresses.next() {
            return Some("both nodes have the same link address".into());
        }
        let mut taps = self.node.iter().flat_map(|(name, node)| node.tap.iter().map(move |tap| (name, tap)));
        if let Some((name, tap)) = taps.find(|(_, tap)| !word(tap) || tap.len() > 15) {
            return Some(format!("node.{name}.tap = {tap:?}: an interface name has 1 to 15 characters"));
        }
        if self.link.port == 0 {
            return Some("link.port must not be 0".into());
        }
        if self.heartbeat.interval_ms == 0 || self.heartbeat.limit_ms < 2 * self.heartbeat.interval_ms {
            return Some(
                "heartbeat.limit_ms must be at least twice heartbeat.interval_ms, and that not 0".into(),
            );
        }
        let checkpoint = &self.checkpoint;
        if checkpoint.interval_ms == 0 || checkpoint.held_ms_max == 0 || checkpoint.limit_ms == 0 {
            return Some("checkpoint.interval_ms, held_ms_max and limit_ms must not be 0".into());
        }
        if checkpoint.held_bytes_max < 64 << 10 {
            return Some("checkpoint.held_bytes_max must be at least 65536".into());
        }
        policy::fault(&self.net.policy).or_else(|| self.disk.fault(&self.node))
    }

    /// What of the network cards does not fit together.
    fn cards_fault(&self) -> Option<String> {
        let cards = self.vm.mac.len();
        if cards == 0 || cards > NICS_MAX {
            return Some(format!(
                "vm.mac has {cards} addresses: give one for each network card, 1 to {NICS_MAX}"
            ));
        }
        if has_twins(&self.vm.mac) {
            return Some("vm.mac: two network cards have the same address".into());
        }
        for (name, node) in &self.node {
            if node.tap.len() != cards {
                return Some(format!(
                    "node.{name}.tap names {} interfaces and vm.mac {cards} network cards: give one for each, in the same order",
                    node.tap.len()
                ));
            }
            if has_twins(&node.tap) {
                return Some(format!("node.{name}.tap: two network cards have the same tap"));
            }
            if !node.net_core.is_empty() && node.net_core.len() != cards {
                return Some(format!(
                    "node.{name}.net_core names {} cores and vm.mac {cards} network cards: give one for each, or none",
                    node.net_core.len()
                ));
            }
        }
        None
    }

    /// The name of the node that is not `node`.
    pub fn other(&self, node: &str) -> &str {
        self.node.keys().find(|name| *name != node).expect("two nodes, checked at load")
    }

    /// Where a node's `colo run` listens.
    ///
    /// # Panics
    /// When there is no node of that name.
    pub fn link_address(&self, node: &str) -> SocketAddr {
        SocketAddr::new(self.node[node].address, self.link.port)
    }
}

/// The first line of a TOML error with its place, since an error is one line in a log.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().lines().collect::<Vec<_>>().join(" ");
    match error.span() {
        None => message,
        Some(span) => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
    }
}

fn has_twins(words: &[String]) -> bool {
    words.iter().enumerate().any(|(index, word)| words[..index].contains(word))
}

fn is_unicast_mac(text: &str) -> bool {
    let bytes: Vec<Option<u8>> = text
        .split(':')
        .map(|part| if part.len() == 2 { u8::from_str_radix(part, 16).ok() } else { None })
        .collect();
    bytes.len() == 6 && bytes.iter().all(Option::is_some) && bytes[0].is_some_and(|first| first & 1 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../tuning/example.toml");

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(file.path())
    }

    #[test]
    fn the_example_is_right_and_its_comments_tell_the_defaults() {
        let config = load(EXAMPLE).unwrap();
        assert_eq!(config.other(&config.link.primary), "b");
        // every line of the form `# key = value` is a default: switched on, it changes nothing
        let is_key = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        let switched: String = EXAMPLE
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| is_key(key)) => {
                    format!("{rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let mut all = load(&switched).unwrap();
        assert!(all.vm.cpu.take().is_some() && all.vm.serial_log.take().is_some());
        for node in all.node.values_mut() {
            node.net_core.clear();
            node.disk_core = None;
        }
        assert_eq!(format!("{all:?}"), format!("{config:?}"));
    }

    #[test]
    fn the_policy_of_the_example_is_right() {
        let rule = |line: &str| line.strip_prefix("#   ").map(|rest| format!("{rest}\n"));
        let (_, section) = EXAMPLE.split_once("[net]").unwrap();
        let (section, _) = section.split_once("[disk]").unwrap();
        let policy: String = section.lines().filter_map(rule).collect();
        let config = load(&EXAMPLE.replacen("[disk]", &format!("{policy}[disk]"), 1)).unwrap();
        let actions: Vec<&str> = config.net.policy.iter().map(|rule| rule.action.as_str()).collect();
        assert_eq!(actions, ["mask", "bypass"]);
    }

    #[test]
    fn each_fault_is_one_line_that_names_the_key() {
        let cases = [
            ("name = \"web\"", "name = \"a b\"", "vm.name"),
            ("memory_mib = 1024", "memory_mib = 0", "vm.memory_mib"),
            ("memory_mib = 1024", "memory_mib = \"x\"", "line "),
            ("memory_mib = 1024", "memory = 1024", "unknown field `memory`"),
            ("primary = \"a\"", "primary = \"c\"", "link.primary"),
            ("mac = \"52:", "mac = \"53:", "vm.mac"),
            ("[node.b]", "[node.a.b]", "unknown field `b`"),
            ("mac = \"52:54:00:12:34:56\"", "mac = []", "vm.mac has 0 addresses"),
            ("mac = \"52:54:00:12:34:56\"", "mac = 7", "line "),
            (
                "mac = \"52:54:00:12:34:56\"",
                "mac = [\"52:54:00:12:34:56\", \"52:54:00:12:34:57\"]",
                "node.a.tap names 1",
            ),
            (
                "mac = \"52:54:00:12:34:56\"",
                "mac = [\"52:54:00:12:34:56\", \"52:54:00:12:34:56\"]",
                "same address",
            ),
            ("# net_core = 2", "net_core = [2, 3]", "node.a.net_core"),
            ("address = \"10.0.0.2\"", "address = \"10.0.0.1\"", "same link address"),
            ("port = 7470", "port = 0", "link.port"),
            ("type = \"file\"", "type = \"paper\"", "paper"),
            ("# serial = \"\"", "serial = \"123456789012345678901\"", "disk.serial"),
            ("# serial = \"\"", "serial = \"a b\"", "disk.serial"),
            ("# cache = \"writeback\"", "cache = \"none\"", "expected `writeback` or `writethrough`"),
            ("# block_size = 512", "block_size = 1024", "use 512 or 4096"),
            ("# digest = \"auto\"", "digest = \"yes\"", "expected one of `auto`, `on`, `off`"),
            ("# queues = 1", "queues = 65", "disk.queues"),
            ("# queues = 1", "queues = 0", "disk.queues"),
            ("# workers = 0", "workers = 2", "disk.workers"),
            ("# buffer_bytes = 268435456", "buffer_bytes = 1", "disk.buffer_bytes"),
            (
                "[disk]",
                "[[net.policy]]\nprotocol = \"tcp\"\nguest_port = \"9-8\"\naction = \"bypass\"\n[disk]",
                "net.policy, rule 1: guest_port = \"9-8\": give a port",
            ),
        ];
        for (from, to, word) in cases {
            assert!(EXAMPLE.contains(from), "{from}");
            let error = load(&EXAMPLE.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{to}: {error}");
        }
        let many = EXAMPLE.replacen("# queues = 1", "queues = 2", 1).replacen("# disk_core", "disk_core", 1);
        let error = load(&many).unwrap_err().to_string();
        assert!(error.contains("node.a.disk_core") && error.contains("disk.workers = 1"), "{error}");
        load(&many.replacen("# workers = 0", "workers = 1", 1)).unwrap();
        let two = EXAMPLE
            .replace("mac = \"52:54:00:12:34:56\"", "mac = [\"52:54:00:12:34:56\", \"52:54:00:12:34:57\"]")
            .replace("tap = \"web0\"", "tap = [\"web0\", \"web1\"]");
        assert_eq!(load(&two).unwrap().node["b"].tap, ["web0", "web1"]);
        let missing = Config::load(Path::new("/nowhere.toml")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere.toml"), "{missing}");
    }
}
