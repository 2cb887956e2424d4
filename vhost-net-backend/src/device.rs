//! The virtio-net device that the server shows to the frontend: features and configuration space (virtio 1.2 §5.1.3 and
//! §5.1.4). The work is the workers'.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use colo::runtime::{Sender, mailbox};
use colo::vhost_user::{Device, FrontendChannel, Ring};
use crossbeam_channel::bounded;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use crate::control_queue::{self, Card, ControlQueue};
use crate::worker::Order;

/// Of a queue pair, the one with buffers for what the guest receives.
pub const RX: usize = 0;
/// And the one with what the guest sends.
pub const TX: usize = 1;

/// The most queue pairs.
pub const PAIRS_MAX: usize = 16;

/// What is offered with a control queue.
const CONTROLLED: [u32; 6] = [
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// The device: queue `2 n` and `2 n + 1` are the pair of worker `n`, and the control queue comes last (virtio 1.2 §5.1.2).
#[derive(Debug)]
pub struct NetDevice {
    workers: Vec<Sender<Order>>,
    offloads: u64,
    config: Option<Config>,
    /// What of the configuration changes.
    state: Arc<ConfigState>,
    /// Who serves the control queue, if there is one.
    control_queue: Option<Sender<control_queue::Order>>,
    control_queue_runs: AtomicBool,
    /// What the driver has negotiated.
    features: AtomicU64,
    channel: FrontendChannel,
}

/// The parts of the configuration that change while the device runs.
#[derive(Debug)]
pub(crate) struct ConfigState {
    /// In the first six bytes.
    mac: AtomicU64,
    link_up: AtomicBool,
    /// The driver is to announce itself.
    announcing: AtomicBool,
}

impl ConfigState {
    fn new(mac: [u8; 6]) -> Self {
        let state = Self {
            mac: AtomicU64::new(0),
            link_up: AtomicBool::new(true),
            announcing: AtomicBool::new(false),
        };
        state.set_mac(mac);
        state
    }

    pub(crate) fn set_mac(&self, [a, b, c, d, e, f]: [u8; 6]) {
        self.mac.store(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), Ordering::SeqCst);
    }

    pub(crate) fn set_announcing(&self, announcing: bool) {
        self.announcing.store(announcing, Ordering::SeqCst);
    }

    fn mac(&self) -> [u8; 6] {
        let bytes = self.mac.load(Ordering::SeqCst).to_le_bytes();
        std::array::from_fn(|at| bytes[at])
    }

    fn status(&self) -> u16 {
        let bit = |flag: &AtomicBool, bit| if flag.load(Ordering::SeqCst) { bit } else { 0 };
        (bit(&self.link_up, VIRTIO_NET_S_LINK_UP) | bit(&self.announcing, VIRTIO_NET_S_ANNOUNCE)) as u16
    }
}

/// A queue of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    /// Of a pair: [`RX`] or [`TX`].
    Data { pair: usize, queue: usize },
    /// The one for commands.
    Control,
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
        Self {
            workers,
            offloads,
            config,
            state: Arc::new(ConfigState::new(config.map_or([0; 6], |config| config.mac.0))),
            control_queue: None,
            control_queue_runs: AtomicBool::new(false),
            features: AtomicU64::new(0),
            channel: FrontendChannel::new(),
        }
    }

    /// Offers a control queue, if the device tells of itself: a frontend that makes the configuration up keeps that queue
    /// too. Returns who is to serve it.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub fn add_control_queue(&mut self) -> io::Result<Option<ControlQueue>> {
        let Some(Config { mac: MacAddress(mac), .. }) = self.config else {
            return Ok(None);
        };
        let (orders, mailbox) = mailbox()?;
        self.control_queue = Some(orders);
        let card = Card { features: 0, mac, pairs_max: self.workers.len() as u16 };
        Ok(Some(ControlQueue::new(mailbox, self.workers.clone(), self.state.clone(), card)))
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
        if self.state.link_up.swap(up, Ordering::SeqCst) != up && self.config.is_some() {
            self.channel.config_changed();
        }
    }

    /// Of the rings of the control queue, how many run, and how many of these are broken.
    pub(crate) fn control_rings(&self) -> [usize; 2] {
        let (reply, answer) = bounded(1);
        self.tell_control_queue(control_queue::Order::Rings(reply));
        answer.recv().unwrap_or_default()
    }

    fn tell_control_queue(&self, order: control_queue::Order) {
        if let Some(control_queue) = &self.control_queue {
            // A thread that has ended takes the process with it.
            drop(control_queue.send(order));
        }
    }

    fn show_own_mac(&self) {
        if let Some(Config { mac: MacAddress(mac), .. }) = self.config {
            self.state.set_mac(mac);
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features.load(Ordering::SeqCst) >> bit & 1 == 1
    }

    /// Which queue an index means with the features that were negotiated (§5.1.2).
    fn queue(&self, index: usize) -> Result<Queue, String> {
        let pairs = self.workers.len();
        let (mq, controlled) = (self.has(VIRTIO_NET_F_MQ), self.has(VIRTIO_NET_F_CTRL_VQ));
        // without CTRL_VQ the frontend keeps that queue and may not tell of MQ either
        let data = if controlled && !mq { 2 } else { 2 * pairs };
        if index < data {
            return Ok(Queue::Data { pair: index / 2, queue: index % 2 });
        }
        if index == data && controlled {
            return Ok(Queue::Control);
        }
        Err(match (controlled, mq) {
            (true, true) => format!("there are {pairs} queue pairs, and the control queue is queue {data}"),
            (true, false) => "without MQ there is one queue pair, and the control queue is queue 2".into(),
            (false, _) => format!("there are {pairs} queue pairs, and CTRL_VQ was not negotiated"),
        })
    }

    /// Whether the driver can be asked to announce itself.
    fn can_ask_driver(&self) -> bool {
        [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS]
            .iter()
            .all(|bit| self.has(*bit))
            && self.control_queue_runs.load(Ordering::SeqCst)
    }
}

fn tell(worker: &Sender<Order>, order: Order) {
    // A worker that has ended takes the process with it; there is nobody left to tell.
    drop(worker.send(order));
}

impl Device for NetDevice {
    fn queues(&self) -> usize {
        2 * self.workers.len() + usize::from(self.control_queue.is_some())
    }

    fn features(&self) -> u64 {
        let mut features = self.offloads;
        if self.workers.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        if self.config.is_some() {
            features |= 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MTU;
        }
        if self.control_queue.is_some() {
            features = CONTROLLED.iter().fold(features, |bits, bit| bits | 1 << bit);
        }
        features
    }

    /// `struct virtio_net_config` up to the MTU.
    fn config_bytes(&self) -> Vec<u8> {
        let Some(Config { mtu, .. }) = self.config else {
            return Vec::new();
        };
        let mut config = self.state.mac().to_vec();
        config.extend(self.state.status().to_le_bytes());
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

    /// The driver knows best what to say (§5.1.6.5.4): in which VLANs, for which addresses. One that cannot be asked is
    /// spoken for.
    fn announce(&self, mac: [u8; 6]) {
        if self.can_ask_driver() {
            self.state.set_announcing(true);
            if self.channel.config_changed() {
                return;
            }
            self.state.set_announcing(false);
        }
        tell(&self.workers[0], Order::Announce(mac));
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) -> Result<(), String> {
        Err("The configuration of a network device is read-only".into())
    }

    fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
        self.state.set_announcing(false);
        self.show_own_mac();
        for worker in &self.workers {
            tell(worker, Order::Features(features));
        }
        self.tell_control_queue(control_queue::Order::Features(features));
    }

    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String> {
        let ring = Box::new(ring);
        match self.queue(index)? {
            Queue::Data { pair, queue } => tell(&self.workers[pair], Order::Start { queue, ring }),
            Queue::Control => {
                // a driver that has just begun has not been asked for anything
                if ring.next_avail() == 0 {
                    self.state.set_announcing(false);
                }
                let (done, started) = bounded(1);
                self.tell_control_queue(control_queue::Order::Start { ring, done });
                // a thread that has ended takes the process with it
                let _ = started.recv();
                self.control_queue_runs.store(true, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    fn stop_queue(&self, index: usize) -> u16 {
        let (done, stopped) = bounded(1);
        match self.queue(index) {
            Ok(Queue::Data { pair, queue }) => tell(&self.workers[pair], Order::Stop { queue, done }),
            Ok(Queue::Control) => {
                self.control_queue_runs.store(false, Ordering::SeqCst);
                self.tell_control_queue(control_queue::Order::Stop(done));
            }
            // it was never started
            Err(_) => return 0,
        }
        stopped.recv().unwrap_or_default()
    }

    /// It is not known yet whether the driver is paused or has reset the device. One that comes after a reset reads the
    /// card's address before it starts a queue, and its receive queue runs before its control queue does. One that was
    /// paused gets its own address and filter again with its control queue.
    fn quiesced(&self) {
        self.show_own_mac();
        for worker in &self.workers {
            tell(worker, Order::Quiesced);
        }
    }
}

/// A unicast MAC address, written as `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether it can be the address of one card.
    pub(crate) fn is_of_a_card(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

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
        if !Self(bytes).is_of_a_card() {
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
