//! What can happen to a side, from whichever thread notices it.

use crossbeam_channel::Sender;
use serde_json::Value;

use super::operator::Request;
use crate::checkpoint::{Incoming, Reply};
use crate::failover::LinkLoss;

/// Which of the device back ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// The network card of this number.
    Net(usize),
    Block,
}

impl Device {
    pub(super) fn name(self) -> String {
        match self {
            Self::Net(0) => "network".into(),
            Self::Net(card) => format!("network {card}"),
            Self::Block => "disk".into(),
        }
    }
}

/// One thing that happened.
#[derive(Debug)]
pub(super) enum Event {
    /// A back end asks for a checkpoint.
    Wanted { cause: String, detail: String },
    /// Secondary: a device's part of an epoch is complete.
    Marker { device: Device, epoch: u64 },
    /// A back end lost its connection to the peer.
    DeviceLink { device: Device, reason: String },
    /// A back end has ended.
    DeviceGone(Device),
    /// The heartbeat says that the peer is lost.
    Heartbeat(LinkLoss),
    /// Primary: what the secondary said.
    Reply(Reply),
    /// Secondary: what the primary said.
    Incoming(Incoming),
    /// QEMU has ended.
    VmEnded,
    /// An operator asks for something, and where the answer goes.
    Operator(Request, Sender<Result<Value, String>>),
    /// SIGTERM or SIGINT.
    Terminate,
}

impl Event {
    /// Why the peer is lost, if this says so.
    pub(super) fn loss(&self) -> Option<String> {
        match self {
            Self::Heartbeat(loss) => Some(loss.to_string()),
            Self::DeviceLink { device, reason } => {
                Some(format!("the {} link failed: {reason}", device.name()))
            }
            Self::Reply(Reply::StepDown) => Some("the secondary takes over, as its operator asked".into()),
            Self::Reply(Reply::Goodbye(why)) => Some(format!("it leaves: {why}")),
            Self::Reply(Reply::Lost(reason)) | Self::Incoming(Incoming::Lost(reason)) => {
                Some(format!("the checkpoint link failed: {reason}"))
            }
            _ => None,
        }
    }

    /// Why this side cannot go on, if this says so.
    pub(super) fn fatal(&self) -> Option<String> {
        match self {
            Self::DeviceGone(device) => Some(format!("the {} back end has ended", device.name())),
            _ => None,
        }
    }
}
