//! The virtio-net device that the server shows to the frontend; the work is the worker's.

use colo::runtime::Sender;
use colo::vhost_user::{Device, Ring};
use crossbeam_channel::bounded;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};

use crate::worker::Order;

/// Index of the queue with buffers for what the guest receives.
pub const RX: usize = 0;
/// Index of the queue with what the guest sends.
pub const TX: usize = 1;

const QUEUES: usize = 2;

/// One queue pair, no offloads.
#[derive(Debug)]
pub struct NetDevice {
    orders: Sender<Order>,
    mac: Option<MacAddress>,
}

impl NetDevice {
    /// A device whose worker takes `orders`. With a MAC address it has a configuration space of its own; QEMU's
    /// network frontend makes one up.
    pub fn new(orders: Sender<Order>, mac: Option<MacAddress>) -> Self {
        Self { orders, mac }
    }

    fn tell(&self, order: Order) {
        // A worker that has ended takes the process with it; there is nobody left to tell.
        drop(self.orders.send(order));
    }
}

impl Device for NetDevice {
    fn queues(&self) -> usize {
        QUEUES
    }

    fn features(&self) -> u64 {
        match self.mac {
            Some(_) => 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS,
            None => 0,
        }
    }

    /// `struct virtio_net_config` up to the status (virtio 1.2 §5.1.4).
    fn config_bytes(&self) -> Vec<u8> {
        let Some(MacAddress(mac)) = self.mac else {
            return Vec::new();
        };
        let mut config = mac.to_vec();
        config.extend_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), String> {
        Err("The configuration of a network device is read-only".into())
    }

    fn set_features(&self, features: u64) {
        self.tell(Order::Features(features));
    }

    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String> {
        self.tell(Order::Start { queue: index, ring: Box::new(ring) });
        Ok(())
    }

    fn stop_queue(&self, index: usize) -> u16 {
        let (done, stopped) = bounded(1);
        self.tell(Order::Stop { queue: index, done });
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
