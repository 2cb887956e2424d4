//! The virtio-net device that the server shows to the frontend: features and configuration space (virtio 1.2 §5.1.3 and
//! §5.1.4). The work is the workers'.

use std::sync::atomic::{AtomicBool, Ordering};

use colo::runtime::Sender;
use colo::vhost_user::{Device, FrontendChannel, Ring};
use crossbeam_channel::bounded;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::worker::Order;

/// Of a queue pair, the one with buffers for what the guest receives.
pub const RX: usize = 0;
/// And the one with what the guest sends.
pub const TX: usize = 1;

/// The most queue pairs.
pub const PAIRS_MAX: usize = 16;

/// The device: queue `2 n` and `2 n + 1` are the pair of worker `n`.
#[derive(Debug)]
pub struct NetDevice {
    workers: Vec<Sender<Order>>,
    offloads: u64,
    config: Option<Config>,
    link_up: AtomicBool,
    channel: FrontendChannel,
}

/// What the device tells of itself. QEMU's network frontend makes this up.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The card's address.
    pub mac: MacAddress,
    /// The longest packet without its Ethernet header that the driver may send, in bytes.
    pub mtu: u16,
}

impl NetDevice {
    /// A device with a queue pair for each worker, and these offloads ([`crate::offload::Offloads`]).
    pub fn new(workers: Vec<Sender<Order>>, offloads: u64, config: Option<Config>) -> Self {
        Self { workers, offloads, config, link_up: AtomicBool::new(true), channel: FrontendChannel::new() }
    }

    /// Who does the work, a worker for each queue pair.
    pub(crate) fn workers(&self) -> &[Sender<Order>] {
        &self.workers
    }

    /// Plugs the cable in or out: tells the workers, and a frontend that asks us for the configuration.
    pub fn set_link(&self, up: bool) {
        for worker in &self.workers {
            tell(worker, Order::Link(up));
        }
        if self.link_up.swap(up, Ordering::Relaxed) != up && self.config.is_some() {
            self.channel.config_changed();
        }
    }
}

fn tell(worker: &Sender<Order>, order: Order) {
    // A worker that has ended takes the process with it; there is nobody left to tell.
    drop(worker.send(order));
}

impl Device for NetDevice {
    fn queues(&self) -> usize {
        2 * self.workers.len()
    }

    fn features(&self) -> u64 {
        let mut features = self.offloads;
        if self.workers.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        if self.config.is_some() {
            features |= 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MTU;
        }
        features
    }

    /// `struct virtio_net_config` up to the MTU.
    fn config_bytes(&self) -> Vec<u8> {
        let Some(Config { mac: MacAddress(mac), mtu }) = self.config else {
            return Vec::new();
        };
        let status = if self.link_up.load(Ordering::Relaxed) { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let mut config = mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend((self.workers.len() as u16).to_le_bytes()); // max_virtqueue_pairs
        config.extend(mtu.to_le_bytes());
        config
    }

    fn frontend_channel(&self) -> Option<&FrontendChannel> {
        self.config.map(|_| &self.channel)
    }

    fn announces(&self) -> bool {
        true
    }

    fn announce(&self, mac: [u8; 6]) {
        tell(&self.workers[0], Order::Announce(mac));
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), String> {
        Err("The configuration of a network device is read-only".into())
    }

    fn set_features(&self, features: u64) {
        for worker in &self.workers {
            tell(worker, Order::Features(features));
        }
    }

    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String> {
        tell(&self.workers[index / 2], Order::Start { queue: index % 2, ring: Box::new(ring) });
        Ok(())
    }

    fn stop_queue(&self, index: usize) -> u16 {
        let (done, stopped) = bounded(1);
        tell(&self.workers[index / 2], Order::Stop { queue: index % 2, done });
        stopped.recv().unwrap_or_default()
    }
}

/// A unicast MAC address, written as `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl std::str::FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed =
            || format!("{text:?} is no MAC address: six bytes in hexadecimal, as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
                .ok_or_else(malformed)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("{text} is a group address, a device needs one of its own"));
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        assert_eq!("52:54:00:12:34:Fe".parse(), Ok(MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0xfe])));
        for wrong in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "01:00:5e:00:00:01",
            "+5:54:00:12:34:56",
        ] {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
    }
}
