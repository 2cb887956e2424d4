//! Which of a guest's flows are compared, and how: the rules of the configuration, asked once for each flow.

mod mask;

use std::str::FromStr;
use std::sync::Arc;

use colo::config::policy::{self, FlowAction, FlowProtocol, FlowRule, PolicyRule};

use crate::packet::{
    ETHERTYPE_ARP, FlowKey, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Transport,
};
pub(crate) use mask::Cursor;
pub use mask::Mask;
#[cfg(test)]
pub(crate) use mask::tests::pattern;

/// How the output of one flow is treated.
#[derive(Clone, Debug)]
pub enum Treatment {
    /// It leaves when the SVM has said the same.
    Compare,
    /// It leaves at once, and rule 1 does not hold for it.
    Bypass,
    /// It leaves with the next checkpoint.
    Checkpoint,
    /// It is compared but for some bytes.
    Mask(Arc<Mask>),
}

/// The rules of one VM. The first that fits a flow counts; without one it is compared.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rules: Arc<[(FlowRule, Treatment)]>,
}

impl Policy {
    /// Of rules that have been understood.
    pub fn new(rules: Vec<FlowRule>) -> Self {
        let with_treatment = |rule: FlowRule| {
            let treatment = match &rule.action {
                FlowAction::Compare => Treatment::Compare,
                FlowAction::Bypass => Treatment::Bypass,
                FlowAction::Checkpoint => Treatment::Checkpoint,
                FlowAction::Mask(patterns) => Treatment::Mask(Arc::new(Mask::new(patterns))),
            };
            (rule, treatment)
        };
        Self { rules: rules.into_iter().map(with_treatment).collect() }
    }

    /// The same for every flow.
    #[cfg(test)]
    pub(crate) fn of_all(treatment: &Treatment) -> Self {
        let mut policy: Self = r#"[{"action": "compare"}]"#.parse().expect("a rule");
        policy.rules = policy.rules.iter().map(|(rule, _)| (rule.clone(), treatment.clone())).collect();
        policy
    }

    /// Whether each byte of the flow is compared.
    pub fn compares(&self, flow: &FlowKey) -> bool {
        matches!(self.of(flow), Treatment::Compare)
    }

    /// How a flow is treated.
    pub fn of(&self, flow: &FlowKey) -> Treatment {
        let first = self.rules.iter().find(|(rule, _)| fits(rule, flow));
        first.map_or(Treatment::Compare, |(_, treatment)| treatment.clone())
    }
}

/// The rules as JSON, which the configuration writes.
impl FromStr for Policy {
    type Err = String;

    fn from_str(json: &str) -> Result<Self, String> {
        let rules: Vec<PolicyRule> = serde_json::from_str(json).map_err(|error| error.to_string())?;
        let rules = policy::understand(&rules).map_err(|error| error.to_string())?;
        Ok(Self::new(rules))
    }
}

fn fits(rule: &FlowRule, flow: &FlowKey) -> bool {
    let (guest, remote, transport) = match flow {
        FlowKey::Ip { guest, remote, transport, .. } => (*guest, *remote, *transport),
        FlowKey::Frame { ethertype, .. } => {
            return match rule.protocol {
                FlowProtocol::Any => rule.guest.is_none() && rule.remote.is_none(),
                FlowProtocol::Arp => *ethertype == ETHERTYPE_ARP,
                FlowProtocol::Ip(_) => false,
            };
        }
    };
    let icmp = if guest.is_ipv4() { PROTOCOL_ICMP } else { PROTOCOL_ICMPV6 };
    let (protocol, ports) = match transport {
        Transport::Tcp { guest_port, remote_port } => (PROTOCOL_TCP, Some((guest_port, remote_port))),
        Transport::Udp { guest_port, remote_port } => (PROTOCOL_UDP, Some((guest_port, remote_port))),
        Transport::Icmp { .. } => (icmp, None),
        // of which ports fragments are, only the first of them says
        Transport::Fragment { protocol }
        | Transport::Security { protocol, .. }
        | Transport::Other { protocol } => (protocol, None),
    };
    (match rule.protocol {
        FlowProtocol::Any => true,
        FlowProtocol::Ip(number) => number == protocol,
        FlowProtocol::Arp => false,
    }) && rule.guest.is_none_or(|prefix| prefix.contains(guest))
        && rule.remote.is_none_or(|prefix| prefix.contains(remote))
        && rule.guest_port.as_ref().is_none_or(|range| ports.is_some_and(|ports| range.contains(&ports.0)))
        && rule.remote_port.as_ref().is_none_or(|range| ports.is_some_and(|ports| range.contains(&ports.1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;
    use crate::test_frames::{Tcp, arp, other, udp};

    fn treatment(json: &str, frame: &[u8]) -> &'static str {
        let policy: Policy = json.parse().unwrap();
        match policy.of(&Packet::parse(frame).flow_from_guest(frame)) {
            Treatment::Compare => "compare",
            Treatment::Bypass => "bypass",
            Treatment::Checkpoint => "checkpoint",
            Treatment::Mask(_) => "mask",
        }
    }

    #[test]
    fn the_first_rule_that_fits_counts() {
        let rules = r#"[
            {"protocol": "tcp", "guest_port": 6379, "remote_port": "40001-40002", "action": "compare"},
            {"protocol": "tcp", "guest": "10.0.0.0/24", "action": "mask", "mask": [{"prefix": "a", "length": 1}]},
            {"protocol": "udp", "remote": "10.0.0.1", "remote_port": 9, "action": "bypass"},
            {"protocol": "arp", "action": "bypass"},
            {"remote": "fd00::/8", "action": "checkpoint"}
        ]"#;
        let tcp = |client_port_offset| Tcp { client_port_offset, ack: Some(1), ..Tcp::default() }.frame();
        assert_eq!(treatment(rules, &tcp(0)), "mask");
        assert_eq!(treatment(rules, &tcp(1)), "compare");
        assert_eq!(treatment(rules, &tcp(2)), "compare");
        assert_eq!(treatment(rules, &tcp(3)), "mask");
        assert_eq!(treatment(rules, &Tcp { v6: true, ..Tcp::default() }.frame()), "checkpoint");
        assert_eq!(treatment(rules, &udp(9, b"x")), "bypass");
        assert_eq!(treatment(rules, &udp(8, b"x")), "compare");
        assert_eq!(treatment(rules, &arp(1)), "bypass");
        assert_eq!(treatment(rules, &other(0x88b5, b"x")), "compare");
        assert_eq!(treatment(r#"[{"action": "checkpoint"}]"#, &other(0x88b5, b"x")), "checkpoint");
        assert_eq!(treatment("[]", &tcp(0)), "compare");
    }

    #[test]
    fn bad_rules_are_refused_here_too() {
        let refused = |json: &str| json.parse::<Policy>().unwrap_err();
        assert!(refused(r#"[{"action": "bypass"}]"#).starts_with("net.policy, rule 1: action = \"bypass\""));
        assert!(refused(r#"[{"action": "compare", "x": 1}]"#).contains("unknown field `x`"));
        assert!(refused("{").contains("line 1"));
    }
}
