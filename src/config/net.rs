//! The network device of a VM.

use std::path::PathBuf;

use serde::Deserialize;

use super::policy::PolicyRule;

/// The network device.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// The back end's program.
    pub program: PathBuf,
    /// How long its worker polls before it sleeps, in microseconds.
    pub poll_us: u64,
    /// Whether the secondary sends digests of its guest's output.
    pub digest: DigestMode,
    /// Rules for single flows. The first that fits counts.
    pub policy: Vec<PolicyRule>,
}

/// Whether the secondary sends digests of its guest's output in place of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DigestMode {
    /// Unless both nodes are on one host.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl DigestMode {
    /// Its name in the configuration and for the back end.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            program: "vhost-net-backend".into(),
            poll_us: 20,
            digest: DigestMode::Auto,
            policy: Vec::new(),
        }
    }
}
