//! What can be said on the control socket.

use serde::{Deserialize, Serialize};

/// Version of the control protocol. A controller refuses a back end that greets with another.
pub const PROTOCOL_VERSION: u32 = 1;

/// First line from the back end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// [`PROTOCOL_VERSION`].
    #[serde(rename = "colo-control")]
    pub protocol: u32,
    /// `net` or `block`.
    pub device: String,
    /// Version of the program.
    pub version: String,
    /// Length of the disk in bytes (block only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}

/// Which half of a pair a back end serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Its VM's output reaches the world.
    Primary,
    /// Its VM follows.
    Secondary,
}

/// An order to a back end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub enum Command {
    /// Log every page of guest RAM that this process writes, from now on. One descriptor: a memfd with one bit a page,
    /// least significant first, set with an atomic OR; the page's number is its offset in the file of guest RAM
    /// divided by 4096.
    DirtyLog {
        /// Pages that the bitmap covers.
        pages: u64,
    },
    /// Begin protection. One descriptor: the connected stream to the peer's back end.
    Attach {
        /// Which half this is.
        role: Role,
        /// The epoch that is running.
        epoch: u64,
    },
    /// Primary, VM paused: everything of `epoch` has been queued on the link, mark its end there.
    Marker {
        /// The epoch that ends.
        epoch: u64,
    },
    /// `epoch` is committed. Primary: release what is held. Secondary: forget what was the SVM's own.
    Commit {
        /// The epoch that was committed.
        epoch: u64,
    },
    /// The peer is lost: use the link no more and let nothing out until told how it goes on.
    Detach,
    /// This side has won the next generation: go on alone.
    TakeOver,
    /// This side has lost: nothing goes out any more, for ever.
    Silence,
    /// Block, not protected: the disk has another length, which the guest is to be told.
    Resize {
        /// Make the image file this long before, if it is shorter. Without it the length that the file or device has by
        /// now is taken over.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
    },
    /// Network, not protected: the cable of the guest's card is plugged in or pulled out.
    Link {
        /// Whether it is in.
        up: bool,
    },
    /// Ask for the figures.
    Status,
}

/// Something that a back end says unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data", rename_all = "kebab-case")]
pub enum Event {
    /// A checkpoint is needed.
    CheckpointWanted {
        /// One word for the statistics: `mismatch`, `held-too-long`, `held-bytes`, `buffer`.
        cause: String,
        /// For the operator: which flow, which bytes.
        detail: String,
    },
    /// Secondary: the peer's marker has arrived and everything before it is in place.
    Marker {
        /// The epoch that ends there.
        epoch: u64,
    },
    /// The connection to the peer is gone or was closed for what it carried.
    LinkLost {
        /// Why.
        reason: String,
    },
}
