//! What a device tells the server and is told by it.

use super::channel::FrontendChannel;
use super::ring::Ring;

/// A virtio device behind vhost-user. The server calls from the one thread that serves the connection.
pub trait Device: Send + Sync {
    /// How many queues there are: vrings, of which a network device has two a pair and perhaps one for control. This is what
    /// `GET_QUEUE_NUM` answers. QEMU's network frontend compares it with its pairs, so that too many of those are refused
    /// only when their rings are set up.
    fn queues(&self) -> usize;

    /// The device's own feature bits (virtio 1.2 §5.x.3). The server adds VERSION_1, EVENT_IDX, INDIRECT_DESC and the bits of
    /// vhost-user itself.
    fn features(&self) -> u64;

    /// The configuration space (virtio 1.2 §5.x.4); empty if the frontend is to make it up, as QEMU does for the network.
    fn config_bytes(&self) -> Vec<u8>;

    /// The frontend reads the configuration space, for the driver or for itself.
    fn config_read(&self) {}

    /// How to tell the frontend that the configuration space has changed; `None` for a device whose never does.
    fn frontend_channel(&self) -> Option<&FrontendChannel> {
        None
    }

    /// Whether what is in flight is kept where a successor of this process finds it (INFLIGHT_SHMFD). A device that takes
    /// requests ahead and puts several back must not.
    fn tracks_inflight(&self) -> bool {
        false
    }

    /// Whether it can tell the LAN where the guest is.
    fn announces(&self) -> bool {
        false
    }

    /// The guest has arrived by migration and does not say so itself: tell the LAN that it is here, by a broadcast from its
    /// hardware address (`SEND_RARP`).
    fn announce(&self, _mac: [u8; 6]) {}

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), String>;

    /// The driver's choice of features, without the bits of vhost-user itself. No queue is running.
    fn set_features(&self, features: u64);

    /// The ring is ready: requests may be waiting in it already, so that it has to be looked at before the first kick.
    ///
    /// # Errors
    /// A sentence that says why the device cannot serve it. The connection is closed; a frontend that reconnects tries
    /// again.
    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String>;

    /// Take no more from the ring, finish all that was taken, drop it. Returns the next available index that was not
    /// taken ([`Ring::next_avail`]). Called only for a queue that was started, and blocks until nothing is in flight.
    fn stop_queue(&self, index: usize) -> u16;

    /// No queue runs any more because the frontend wants it so (the VM is paused or has ended, the driver has reset the
    /// device), rather than for a moment while something changes. The next [`Device::start_queue`] begins anew.
    fn quiesced(&self) {}
}
