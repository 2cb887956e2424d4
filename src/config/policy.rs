//! Rules for single flows: what of the guest's output is compared, and how. `docs/policy.md` is for those who write them.
//!
//! Here they are read and checked; the network back end, which gets them as JSON, carries them out.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Rules that a VM may have.
const RULES_MAX: usize = 64;
/// Patterns that a rule may have.
const PATTERNS_MAX: usize = 16;
/// Bytes of all prefixes of a rule.
const PREFIX_BYTES_MAX: usize = 128;
/// Bytes of a delimiter.
const DELIMITER_BYTES_MAX: usize = 15;
/// Bytes that one pattern may skip, or leave uncompared.
const EXTENT_MAX: i64 = 65_535;
/// They are one argument of a program, which Linux allows to have 128 KiB.
const JSON_BYTES_MAX: usize = 100_000;

/// One rule as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRule {
    /// Whose flows: `any`, `tcp`, `udp`, `icmp`, `icmpv6`, `arp`, or the number of a protocol over IP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Word>,
    /// The guest's address, or a prefix of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// The guest's port, or a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_port: Option<Word>,
    /// The other end's address, or a prefix of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<String>,
    /// The other end's port, or a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_port: Option<Word>,
    /// `compare`, `bypass`, `checkpoint` or `mask`.
    pub action: String,
    /// For `mask`: what is not compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mask: Vec<MaskRule>,
}

/// One pattern as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskRule {
    /// What stands before, as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// The same in hexadecimal; `??` is any byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_hex: Option<String>,
    /// Instead of a prefix: bytes since the start of the datagram or connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// Bytes behind the prefix that are compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<i64>,
    /// Bytes that are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<i64>,
    /// Or up to where they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// At most so many then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<i64>,
}

/// What may be written as a number or as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number, or text in quotes")]
pub enum Word {
    /// As 80.
    Number(i64),
    /// As "8000-8010".
    Text(String),
}

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("net.policy, rule {rule}: {what}")]
pub struct PolicyError {
    /// Which one, counted from 1.
    pub rule: usize,
    /// The field, what it says, and what is allowed.
    pub what: String,
}

/// A rule that has been understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRule {
    /// Whose flows.
    pub protocol: FlowProtocol,
    /// The guest's address.
    pub guest: Option<Prefix>,
    /// The guest's port.
    pub guest_port: Option<RangeInclusive<u16>>,
    /// The other end's address.
    pub remote: Option<Prefix>,
    /// The other end's port.
    pub remote_port: Option<RangeInclusive<u16>>,
    /// What is done with them.
    pub action: FlowAction,
}

/// The protocols that a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowProtocol {
    /// All, frames that are no IP included.
    Any,
    /// One over IP, by its number.
    Ip(u8),
    /// ARP.
    Arp,
}

/// What is done with the guest's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowAction {
    /// It leaves when the SVM has said the same.
    Compare,
    /// It leaves at once.
    Bypass,
    /// It leaves with the next checkpoint.
    Checkpoint,
    /// It is compared but for this.
    Mask(Vec<Pattern>),
}

/// Bytes that are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// At a place of the datagram, or of the connection.
    At {
        /// Bytes from its start.
        offset: u16,
        /// How many.
        length: u16,
    },
    /// Behind others.
    After {
        /// Those; `None` is any byte.
        prefix: Vec<Option<u8>>,
        /// Bytes behind it that are compared.
        skip: u16,
        /// How many are not.
        extent: Extent,
    },
}

/// How many bytes are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// So many.
    Bytes(u16),
    /// Up to a delimiter.
    Until {
        /// The delimiter, which is compared.
        delimiter: Vec<u8>,
        /// At most so many.
        max: u16,
    },
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    address: IpAddr,
    bits: u8,
}

impl Prefix {
    /// Whether the address is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differs = ours.to_bits() ^ theirs.to_bits();
                differs.checked_shr(32 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differs = ours.to_bits() ^ theirs.to_bits();
                differs.checked_shr(128 - u32::from(self.bits)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            None => (text, None),
            Some((address, bits)) => (address, Some(bits.parse::<u8>().ok()?)),
        };
        let address: IpAddr = address.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(most);
        (bits <= most).then_some(Self { address, bits })
    }
}

/// Understands rules.
///
/// # Errors
/// One of them makes no sense.
pub fn understand(rules: &[PolicyRule]) -> Result<Vec<FlowRule>, PolicyError> {
    if rules.len() > RULES_MAX {
        return Err(PolicyError { rule: RULES_MAX + 1, what: format!("there may be {RULES_MAX} rules") });
    }
    rules
        .iter()
        .enumerate()
        .map(|(index, rule)| rule.understand().map_err(|what| PolicyError { rule: index + 1, what }))
        .collect()
}

/// What is wrong with the rules of a configuration.
pub(super) fn fault(rules: &[PolicyRule]) -> Option<String> {
    if let Err(error) = understand(rules) {
        return Some(error.to_string());
    }
    let bytes = to_json(rules).len();
    (bytes > JSON_BYTES_MAX)
        .then(|| format!("net.policy: the rules have {bytes} bytes as JSON, {JSON_BYTES_MAX} are possible"))
}

/// The rules as the network back end's `--policy` has them.
pub fn to_json(rules: &[PolicyRule]) -> String {
    serde_json::to_string(rules).expect("texts and numbers")
}

impl PolicyRule {
    fn understand(&self) -> Result<FlowRule, String> {
        let protocol = protocol(self.protocol.as_ref())?;
        let rule = FlowRule {
            protocol,
            guest: address("guest", self.guest.as_deref())?,
            guest_port: ports("guest_port", self.guest_port.as_ref())?,
            remote: address("remote", self.remote.as_deref())?,
            remote_port: ports("remote_port", self.remote_port.as_ref())?,
            action: self.action()?,
        };
        let has_ports = matches!(protocol, FlowProtocol::Ip(PROTOCOL_TCP | PROTOCOL_UDP));
        if !has_ports && (rule.guest_port.is_some() || rule.remote_port.is_some()) {
            return Err("guest_port and remote_port need protocol = \"tcp\" or \"udp\"".into());
        }
        if protocol == FlowProtocol::Arp && (rule.guest.is_some() || rule.remote.is_some()) {
            return Err("guest and remote are addresses of IP packets: leave them out with \"arp\"".into());
        }
        if let (Some(guest), Some(remote)) = (&rule.guest, &rule.remote)
            && guest.address.is_ipv4() != remote.address.is_ipv4()
        {
            return Err("guest and remote must both be IPv4, or both IPv6".into());
        }
        if matches!(rule.action, FlowAction::Mask(_)) && !has_ports {
            return Err("action = \"mask\" needs protocol = \"tcp\" or \"udp\"".into());
        }
        let narrow = protocol != FlowProtocol::Any || rule.guest.is_some() || rule.remote.is_some();
        if rule.action == FlowAction::Bypass && !narrow {
            return Err(
                "action = \"bypass\" for all that the guest sends is no protection: give protocol, guest or remote"
                    .into(),
            );
        }
        Ok(rule)
    }

    fn action(&self) -> Result<FlowAction, String> {
        let action = match self.action.as_str() {
            "compare" => FlowAction::Compare,
            "bypass" => FlowAction::Bypass,
            "checkpoint" => FlowAction::Checkpoint,
            "mask" => return self.patterns().map(FlowAction::Mask),
            other => {
                return Err(format!(
                    "action = {other:?}: use \"compare\", \"bypass\", \"checkpoint\" or \"mask\""
                ));
            }
        };
        if !self.mask.is_empty() {
            return Err(format!("mask needs action = \"mask\", not {:?}", self.action));
        }
        Ok(action)
    }

    fn patterns(&self) -> Result<Vec<Pattern>, String> {
        if !(1..=PATTERNS_MAX).contains(&self.mask.len()) {
            return Err(format!("mask has {} patterns: give 1 to {PATTERNS_MAX}", self.mask.len()));
        }
        let patterns: Vec<Pattern> = self
            .mask
            .iter()
            .enumerate()
            .map(|(index, pattern)| {
                pattern.understand().map_err(|what| format!("mask, pattern {}: {what}", index + 1))
            })
            .collect::<Result<_, _>>()?;
        let prefix_bytes = |pattern: &Pattern| match pattern {
            Pattern::At { .. } => 0,
            Pattern::After { prefix, .. } => prefix.len(),
        };
        let bytes: usize = patterns.iter().map(prefix_bytes).sum();
        if bytes > PREFIX_BYTES_MAX {
            return Err(format!(
                "mask: the prefixes have {bytes} bytes together, {PREFIX_BYTES_MAX} are possible"
            ));
        }
        Ok(patterns)
    }
}

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

fn protocol(word: Option<&Word>) -> Result<FlowProtocol, String> {
    let allowed =
        "use \"any\", \"tcp\", \"udp\", \"icmp\", \"icmpv6\", \"arp\" or a protocol's number, 0 to 255";
    match word {
        None => Ok(FlowProtocol::Any),
        Some(Word::Number(number)) => {
            u8::try_from(*number).map(FlowProtocol::Ip).map_err(|_| format!("protocol = {number}: {allowed}"))
        }
        Some(Word::Text(text)) => match text.as_str() {
            "any" => Ok(FlowProtocol::Any),
            "tcp" => Ok(FlowProtocol::Ip(PROTOCOL_TCP)),
            "udp" => Ok(FlowProtocol::Ip(PROTOCOL_UDP)),
            "icmp" => Ok(FlowProtocol::Ip(1)),
            "icmpv6" => Ok(FlowProtocol::Ip(58)),
            "arp" => Ok(FlowProtocol::Arp),
            other => Err(format!("protocol = {other:?}: {allowed}")),
        },
    }
}

fn address(field: &str, text: Option<&str>) -> Result<Option<Prefix>, String> {
    text.map(|text| {
        Prefix::parse(text).ok_or_else(|| {
            format!("{field} = {text:?}: give an address or a prefix, as \"10.0.0.0/24\" or \"fd00::1\"")
        })
    })
    .transpose()
}

fn ports(field: &str, word: Option<&Word>) -> Result<Option<RangeInclusive<u16>>, String> {
    let Some(word) = word else {
        return Ok(None);
    };
    let range = match word {
        Word::Number(port) => u16::try_from(*port).ok().map(|port| port..=port),
        Word::Text(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            first.trim().parse().ok().zip(last.trim().parse().ok()).map(|(first, last)| first..=last)
        }
    };
    match range.filter(|range| !range.is_empty()) {
        Some(range) => Ok(Some(range)),
        None => {
            let said = match word {
                Word::Number(port) => port.to_string(),
                Word::Text(text) => format!("{text:?}"),
            };
            Err(format!("{field} = {said}: give a port from 0 to 65535, or a range as \"8000-8010\""))
        }
    }
}

impl MaskRule {
    fn understand(&self) -> Result<Pattern, String> {
        let prefix = match (&self.prefix, &self.prefix_hex, self.offset) {
            (Some(text), None, None) => text.bytes().map(Some).collect(),
            (None, Some(hex), None) => from_hex(hex)?,
            (None, None, Some(offset)) => {
                if self.skip.is_some() || self.until.is_some() || self.max.is_some() {
                    return Err("offset goes with length only".into());
                }
                return Ok(Pattern::At {
                    offset: within("offset", Some(offset), 0)?,
                    length: within("length", self.length, 1)?,
                });
            }
            _ => return Err("give one of prefix, prefix_hex and offset".into()),
        };
        if prefix.is_empty() {
            return Err("the prefix is empty: say where the bytes stand with offset".into());
        }
        if prefix[0].is_none() {
            return Err("prefix_hex must not begin with \"??\": give the first byte".into());
        }
        let extent = match (self.length, &self.until, self.max) {
            (length @ Some(_), None, None) => Extent::Bytes(within("length", length, 1)?),
            (None, Some(delimiter), max) => {
                if !(1..=DELIMITER_BYTES_MAX).contains(&delimiter.len()) {
                    return Err(format!(
                        "until = {delimiter:?}: give 1 to {DELIMITER_BYTES_MAX} bytes, as \"\\r\\n\""
                    ));
                }
                Extent::Until { delimiter: delimiter.clone().into_bytes(), max: within("max", max, 1)? }
            }
            _ => return Err("give either length, or until with max".into()),
        };
        let skip = within("skip", Some(self.skip.unwrap_or(0)), 0)?;
        Ok(Pattern::After { prefix, skip, extent })
    }
}

fn within(field: &str, number: Option<i64>, least: i64) -> Result<u16, String> {
    let allowed = format!("give a number of bytes from {least} to {EXTENT_MAX}");
    let Some(number) = number else {
        return Err(format!("{field} is missing: {allowed}"));
    };
    u16::try_from(number)
        .ok()
        .filter(|_| number >= least)
        .ok_or_else(|| format!("{field} = {number}: {allowed}"))
}

fn from_hex(text: &str) -> Result<Vec<Option<u8>>, String> {
    let wrong = || format!("prefix_hex = {text:?}: give two digits for each byte, as \"16 03 ?? ff\"");
    let digits: Vec<char> = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| match *pair {
            ['?', '?'] => Ok(None),
            [high, low] => high
                .to_digit(16)
                .zip(low.to_digit(16))
                .map(|(high, low)| Some((high << 4 | low) as u8))
                .ok_or_else(wrong),
            _ => Err(wrong()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct File {
        policy: Vec<PolicyRule>,
    }

    fn rules(text: &str) -> Result<Vec<PolicyRule>, String> {
        toml::from_str(text).map(|file: File| file.policy).map_err(|error| error.message().to_owned())
    }

    /// What is wrong with a second rule of these lines.
    fn wrong(text: &str) -> String {
        let text = format!("[[policy]]\naction = \"compare\"\n[[policy]]\n{text}");
        match rules(&text) {
            Ok(rules) => fault(&rules).unwrap_or_default(),
            Err(error) => error,
        }
    }

    #[test]
    fn rules_are_understood_and_the_same_as_json() {
        let text = r#"
            [[policy]]
            protocol = "tcp"
            guest = "10.0.0.0/24"
            guest_port = "80-81"
            remote = "10.9.8.7"
            remote_port = 1024
            action = "mask"
            mask = [
                { prefix = "Date: ", until = "\r\n", max = 64 },
                { prefix_hex = "16 03 ?? fF", skip = 2, length = 32 },
                { offset = 4, length = 8 },
            ]
            [[policy]]
            protocol = 132
            action = "bypass"
            [[policy]]
            action = "checkpoint"
        "#;
        let written = rules(text).unwrap();
        let understood = understand(&written).unwrap();
        let mask = FlowAction::Mask(vec![
            Pattern::After {
                prefix: b"Date: ".map(Some).to_vec(),
                skip: 0,
                extent: Extent::Until { delimiter: b"\r\n".to_vec(), max: 64 },
            },
            Pattern::After {
                prefix: vec![Some(0x16), Some(3), None, Some(0xff)],
                skip: 2,
                extent: Extent::Bytes(32),
            },
            Pattern::At { offset: 4, length: 8 },
        ]);
        let first = &understood[0];
        assert_eq!((first.protocol, &first.action), (FlowProtocol::Ip(6), &mask));
        assert_eq!((first.guest_port.clone(), first.remote_port.clone()), (Some(80..=81), Some(1024..=1024)));
        let within = |prefix: &Option<Prefix>, text: &str| prefix.unwrap().contains(text.parse().unwrap());
        assert!(within(&first.guest, "10.0.0.255") && !within(&first.guest, "10.0.1.0"));
        assert!(within(&first.remote, "10.9.8.7") && !within(&first.remote, "10.9.8.6"));
        assert_eq!(
            (understood[1].protocol, &understood[1].action),
            (FlowProtocol::Ip(132), &FlowAction::Bypass)
        );
        assert_eq!(
            (understood[2].protocol, &understood[2].action),
            (FlowProtocol::Any, &FlowAction::Checkpoint)
        );
        assert_eq!(serde_json::from_str::<Vec<PolicyRule>>(&to_json(&written)).unwrap(), written);
    }

    #[test]
    fn the_examples_of_the_documentation_are_right() {
        let text = include_str!("../../docs/policy.md");
        let blocks: Vec<&str> =
            text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert!(blocks.len() > 5);
        for block in blocks {
            let written = rules(&block.replace("[[net.policy]]", "[[policy]]")).unwrap();
            assert_eq!(fault(&written), None, "{block}");
        }
    }

    #[test]
    fn a_prefix_is_so_many_bits() {
        for (prefix, inside, outside) in [
            ("0.0.0.0/0", "255.1.2.3", "::1"),
            ("10.0.0.1/31", "10.0.0.0", "10.0.0.2"),
            ("::/0", "fd00::1", "1.2.3.4"),
            ("fd00::/65", "fd00::7fff:0:0:0", "fd00::8000:0:0:0"),
            ("fd00::1", "fd00::1", "fd00::2"),
        ] {
            let prefix = Prefix::parse(prefix).unwrap();
            assert!(prefix.contains(inside.parse().unwrap()), "{prefix:?} {inside}");
            assert!(!prefix.contains(outside.parse().unwrap()), "{prefix:?} {outside}");
        }
    }

    #[test]
    fn a_bad_rule_is_named_with_its_field_and_what_is_allowed() {
        let mask = |pattern: &str| format!("protocol = \"tcp\"\naction = \"mask\"\nmask = [{pattern}]");
        let cases = [
            ("guest = \"10.0.0.1\"".to_owned(), "missing field `action`"),
            ("action = \"drop\"".into(), "action = \"drop\": use \"compare\""),
            ("action = \"bypass\"".into(), "no protection"),
            ("action = \"compare\"\nport = 80".into(), "unknown field `port`, expected one of `protocol`"),
            ("action = \"compare\"\nprotocol = true".into(), "a number, or text in quotes"),
            ("action = \"compare\"\nprotocol = \"sctp\"".into(), "protocol = \"sctp\": use \"any\""),
            ("action = \"compare\"\nprotocol = 256".into(), "protocol = 256"),
            ("action = \"compare\"\nguest = \"10.0.0\"".into(), "guest = \"10.0.0\": give an address"),
            ("action = \"compare\"\nremote = \"10.0.0.0/33\"".into(), "remote = \"10.0.0.0/33\""),
            ("action = \"compare\"\nguest = \"::1\"\nremote = \"1.2.3.4\"".into(), "both IPv6"),
            ("action = \"compare\"\nprotocol = \"tcp\"\nguest_port = 65536".into(), "guest_port = 65536"),
            (
                "action = \"compare\"\nprotocol = \"tcp\"\nremote_port = \"9-8\"".into(),
                "remote_port = \"9-8\"",
            ),
            ("action = \"compare\"\nremote_port = 80".into(), "need protocol = \"tcp\" or \"udp\""),
            ("action = \"bypass\"\nprotocol = \"arp\"\nguest = \"10.0.0.1\"".into(), "leave them out"),
            ("action = \"bypass\"\nprotocol = \"tcp\"\nmask = [{}]".into(), "mask needs action = \"mask\""),
            ("action = \"mask\"\nprotocol = \"tcp\"".into(), "mask has 0 patterns: give 1 to 16"),
            ("action = \"mask\"\nmask = [{ offset = 0, length = 1 }]".into(), "needs protocol"),
            (mask("{ length = 1 }"), "pattern 1: give one of prefix, prefix_hex and offset"),
            (mask("{ prefix = \"a\", offset = 1, length = 1 }"), "give one of"),
            (mask("{ offset = 1, until = \"x\" }"), "offset goes with length only"),
            (mask("{ offset = -1, length = 1 }"), "offset = -1: give a number of bytes from 0"),
            (mask("{ offset = 1 }"), "length is missing"),
            (mask("{ prefix = \"\", length = 1 }"), "the prefix is empty"),
            (mask("{ prefix_hex = \"?? 01\", length = 1 }"), "must not begin with"),
            (mask("{ prefix_hex = \"012\", length = 1 }"), "prefix_hex = \"012\": give two digits"),
            (mask("{ prefix = \"a\", length = 0 }"), "length = 0: give a number of bytes from 1 to 65535"),
            (mask("{ prefix = \"a\", until = \"\\n\" }"), "max is missing"),
            (mask("{ prefix = \"a\", until = \"\", max = 9 }"), "until = \"\": give 1 to 15 bytes"),
            (
                mask("{ prefix = \"a\", until = \"x\", max = 9, length = 3 }"),
                "either length, or until with max",
            ),
            (mask("{ prefix = \"a\", length = 1, skip = 70000 }"), "skip = 70000"),
            (
                mask(&format!("{{ prefix = \"{}\", length = 1 }}", "a".repeat(129))),
                "129 bytes together, 128 are possible",
            ),
        ];
        for (text, word) in cases {
            let error = wrong(&text);
            assert!(error.contains(word), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
            let by_serde =
                ["missing field", "unknown field", "a number,"].iter().any(|by| error.contains(by));
            assert!(by_serde || error.starts_with("net.policy, rule 2: "), "{error}");
        }
        let many = "[[policy]]\naction = \"compare\"\n".repeat(65);
        assert!(fault(&rules(&many).unwrap()).unwrap().contains("64 rules"));
    }
}
