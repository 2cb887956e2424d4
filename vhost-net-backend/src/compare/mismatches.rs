//! What differed lately, and which services do so most: what an operator must know to write a policy.

use std::collections::VecDeque;
use std::net::SocketAddr;

use serde::{Serialize, Serializer};

use super::tcp::{Difference, TcpFlow};
use crate::packet::{FlowKey, Segment, Transport};
use crate::proxy::Cause;

/// Mismatches that are remembered.
const RECENT_MAX: usize = 32;
/// Services that are counted.
const SERVICES_MAX: usize = 32;
/// Bytes that are shown before the first that differs, and from there on.
pub(super) const BYTES_SHOWN: usize = 16;

/// One time when a packet could not leave for what the SVM said, or did not say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    /// When, in microseconds.
    pub at_us: u64,
    /// `mismatch` or `held-too-long`.
    pub cause: Cause,
    /// The flow.
    pub flow: String,
    /// How often that happened to this flow, with this time.
    pub count: u32,
    /// How they differ, or what the packet waited for.
    pub what: String,
    /// The bytes, where it is them that differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Differing>,
}

/// Bytes that differ, and some around them. Masked ones are all the same in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Differing {
    /// Of the first byte that differs: since the connection or the datagram began.
    pub offset: u64,
    /// The last bytes before, which both have said.
    #[serde(serialize_with = "hex")]
    pub before: Vec<u8>,
    /// What the PVM says from there on; nothing if its datagram ends.
    #[serde(serialize_with = "hex")]
    pub pvm: Vec<u8>,
    /// What the SVM says from there on, as far as it is known.
    #[serde(serialize_with = "hex")]
    pub svm: Vec<u8>,
}

fn hex<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    serializer.serialize_str(&digits)
}

impl Differing {
    /// The PVM's bytes differ from `svm` from index `at` on.
    pub(super) fn at(offset: u64, at: usize, pvm: &[u8], svm: &[u8]) -> Self {
        let shown = |bytes: &[u8]| bytes[..bytes.len().min(BYTES_SHOWN)].to_vec();
        let (before, pvm) = pvm.split_at(at.min(pvm.len()));
        let before = before[before.len().saturating_sub(BYTES_SHOWN)..].to_vec();
        Self { offset, before, pvm: shown(pvm), svm: shown(svm) }
    }

    /// The first bytes that differ.
    pub(super) fn describe(&self) -> String {
        let byte = |bytes: &[u8]| match bytes.first() {
            Some(byte) => format!("{byte:#04x}"),
            None => "the end".to_owned(),
        };
        format!("offset {}: PVM {}, SVM {}", self.offset, byte(&self.pvm), byte(&self.svm))
    }
}

/// How two packets differ.
pub(super) struct How {
    /// As a sentence.
    pub(super) what: String,
    pub(super) bytes: Option<Differing>,
}

impl<T: Into<String>> From<T> for How {
    fn from(what: T) -> Self {
        Self { what: what.into(), bytes: None }
    }
}

impl How {
    pub(super) fn in_bytes(bytes: Differing) -> Self {
        Self { what: bytes.describe(), bytes: Some(bytes) }
    }

    /// Of a segment that was judged so, against what the SVM says.
    pub(super) fn told(
        difference: Difference,
        tcp: &mut TcpFlow,
        segment: &Segment,
        compared: &[u8],
    ) -> Self {
        match difference {
            Difference::Byte { offset, pvm, svm } => Self {
                what: format!("offset {offset}: PVM {pvm:#04x}, SVM {svm:#04x}"),
                bytes: Some(tcp.differing(segment, compared, offset)),
            },
            Difference::Event { pvm, svm } => format!("the PVM {pvm}, the SVM {svm}").into(),
            Difference::Options { pvm, svm } => {
                format!("options of the SYN: PVM {pvm:?}, SVM {svm:?}").into()
            }
        }
    }
}

/// How often the flows of one service had a mismatch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceCount {
    /// Protocol, whose port it is, and address with port: of two ports the lower. Other flows by their names.
    pub service: String,
    /// How often.
    pub count: u64,
    /// So much of that may be others', whose place it has taken.
    pub overcount: u64,
}

/// The last mismatches, and counts of those that had most.
#[derive(Debug, Default)]
pub(super) struct Mismatches {
    /// Newest first.
    recent: VecDeque<Mismatch>,
    services: Vec<ServiceCount>,
}

impl Mismatches {
    pub(super) fn add(&mut self, key: &FlowKey, mismatch: Mismatch) {
        self.recent.truncate(RECENT_MAX - 1);
        self.recent.push_front(mismatch);
        self.count(service(key));
    }

    /// Counts by Space-Saving (Metwally et al., 2005): what is not there takes the place of the rarest, and its count on.
    fn count(&mut self, service: String) {
        if let Some(known) = self.services.iter_mut().find(|known| known.service == service) {
            known.count += 1;
            return;
        }
        let mut entry = ServiceCount { service, count: 1, overcount: 0 };
        if self.services.len() < SERVICES_MAX {
            self.services.push(entry);
        } else if let Some(rarest) = self.services.iter_mut().min_by_key(|known| known.count) {
            entry.count += rarest.count;
            entry.overcount = rarest.count;
            *rarest = entry;
        }
    }

    /// Newest first.
    pub(super) fn recent(&self) -> Vec<Mismatch> {
        self.recent.iter().cloned().collect()
    }

    /// Those with most first.
    pub(super) fn services(&self) -> Vec<ServiceCount> {
        let mut services = self.services.clone();
        services.sort_by_key(|known| std::cmp::Reverse(known.count));
        services
    }
}

/// What a rule would name: a client's port is another one each time.
fn service(key: &FlowKey) -> String {
    let FlowKey::Ip { guest, remote, transport, .. } = key else {
        return key.to_string();
    };
    let (protocol, guest_port, remote_port) = match *transport {
        Transport::Tcp { guest_port, remote_port } => ("tcp", guest_port, remote_port),
        Transport::Udp { guest_port, remote_port } => ("udp", guest_port, remote_port),
        _ => return key.to_string(),
    };
    if guest_port <= remote_port {
        format!("{protocol} guest {}", SocketAddr::new(*guest, guest_port))
    } else {
        format!("{protocol} remote {}", SocketAddr::new(*remote, remote_port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Vlan;

    fn key(guest_port: u16, remote_port: u16) -> FlowKey {
        FlowKey::Ip {
            vlan: Vlan::default(),
            guest: "10.0.0.9".parse().unwrap(),
            remote: "fd00::1".parse().unwrap(),
            transport: Transport::Tcp { guest_port, remote_port },
        }
    }

    fn mismatch(at_us: u64) -> Mismatch {
        let (flow, what) = ("flow".to_owned(), "what".to_owned());
        Mismatch { at_us, cause: Cause::Mismatch, flow, count: 1, what, bytes: None }
    }

    #[test]
    fn the_newest_and_the_most_frequent_are_remembered() {
        let mut mismatches = Mismatches::default();
        for round in 0..100_u16 {
            // each time from another port of the client
            mismatches.add(&key(80, 40_000 + round), mismatch(u64::from(round) * 2));
            mismatches.add(&key(50_000, 1000 + round), mismatch(u64::from(round) * 2 + 1));
        }
        let recent: Vec<u64> = mismatches.recent().iter().map(|mismatch| mismatch.at_us).collect();
        assert_eq!(recent, (168..200).rev().collect::<Vec<_>>());
        let services = mismatches.services();
        assert_eq!(services.len(), SERVICES_MAX);
        let first = ServiceCount { service: "tcp guest 10.0.0.9:80".into(), count: 100, overcount: 0 };
        assert_eq!(services[0], first);
        assert!(services[1].service.starts_with("tcp remote [fd00::1]:10"), "{:?}", services[1]);
        assert!(services[1..].iter().all(|known| known.count - known.overcount == 1));
        assert_eq!(services.iter().map(|known| known.count).sum::<u64>(), 200);
    }
}
