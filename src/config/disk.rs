//! The disk's section.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::NodeConfig;

/// The disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// The back end's program.
    pub program: PathBuf,
    /// How long its workers poll before they sleep, in microseconds.
    pub poll_us: u64,
    /// Memory for the secondary's block buffer, in bytes.
    pub buffer_bytes: u64,
    /// Serial number that the guest reads, at most 20 bytes.
    pub serial: String,
    /// The write cache that the guest finds.
    pub cache: CacheMode,
    /// Logical blocks that the guest sees, in bytes: 512 or 4096.
    pub block_size: u32,
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// Number of threads that serve them; 0 for as many as queues, or as cores if those are fewer.
    pub workers: u16,
}

/// When a write is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// When the guest has flushed.
    Writeback,
    /// When it is answered.
    Writethrough,
}

impl CacheMode {
    /// As the back end's `--cache` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
        }
    }
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            program: "vhost-blk-backend".into(),
            poll_us: 20,
            buffer_bytes: 256 << 20,
            serial: String::new(),
            cache: CacheMode::Writeback,
            block_size: 512,
            queues: 1,
            workers: 0,
        }
    }
}

impl DiskConfig {
    pub(super) fn fault(&self, nodes: &BTreeMap<String, NodeConfig>) -> Option<String> {
        if self.buffer_bytes < 1 << 20 {
            return Some("disk.buffer_bytes must be at least 1048576".into());
        }
        if self.serial.len() > 20 || !self.serial.chars().all(|c| c.is_ascii_graphic()) {
            return Some(format!(
                "disk.serial = {:?}: use at most 20 ASCII characters without blanks",
                self.serial
            ));
        }
        if ![512, 4096].contains(&self.block_size) {
            return Some(format!("disk.block_size = {}: use 512 or 4096", self.block_size));
        }
        if !(1..=64).contains(&self.queues) {
            return Some(format!("disk.queues = {}: use 1 to 64", self.queues));
        }
        if self.workers > self.queues {
            return Some(format!(
                "disk.workers = {} is more than disk.queues = {}: a worker without a queue has nothing to do",
                self.workers, self.queues
            ));
        }
        let pinned = nodes.iter().find(|(_, node)| node.disk_core.is_some());
        if let Some((name, _)) = pinned
            && self.queues > 1
            && self.workers != 1
        {
            return Some(format!(
                "node.{name}.disk_core is one core for all workers: set disk.workers = 1, or leave it out"
            ));
        }
        None
    }
}
