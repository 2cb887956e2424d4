//! What the control queue has to do, in the plainest words: sets, and the rules of virtio 1.2 §5.1.6.5 one after the other.

use std::collections::HashSet;

pub type Mac = [u8; 6];

pub const CTRL_RX: u32 = 18;
pub const CTRL_VLAN: u32 = 19;
pub const CTRL_RX_EXTRA: u32 = 20;
pub const GUEST_ANNOUNCE: u32 = 21;
pub const MQ: u32 = 22;
pub const CTRL_MAC_ADDR: u32 = 23;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    features: u64,
    pairs_max: u16,
    /// Promiscuous, all multicast, all unicast, no multicast, no unicast, no broadcast.
    pub modes: [bool; 6],
    pub mac: Mac,
    pub mac_is_known: bool,
    pub unicast: HashSet<Mac>,
    pub multicast: HashSet<Mac>,
    pub any_unicast: bool,
    pub any_multicast: bool,
    pub vlans: HashSet<u16>,
    pub pairs: u16,
}

impl Model {
    pub fn new(features: u64, mac: Mac, pairs_max: u16, is_heard: bool) -> Self {
        let names_vlans = features >> CTRL_VLAN & 1 == 1;
        Self {
            features,
            pairs_max,
            modes: [true, !is_heard, !is_heard, false, false, false],
            mac,
            mac_is_known: is_heard,
            unicast: HashSet::new(),
            multicast: HashSet::new(),
            any_unicast: !is_heard,
            any_multicast: !is_heard,
            vlans: if is_heard && names_vlans { HashSet::new() } else { (0..4096).collect() },
            pairs: if is_heard { 1 } else { pairs_max },
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Whether the command is answered with VIRTIO_NET_OK.
    pub fn command(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() < 2 {
            return false;
        }
        let (class, command, data) = (bytes[0], bytes[1], &bytes[2..]);
        if class == 0 && command < 6 {
            let feature = if command < 2 { CTRL_RX } else { CTRL_RX_EXTRA };
            if !self.has(feature) || data.len() != 1 || data[0] > 1 {
                return false;
            }
            self.modes[usize::from(command)] = data[0] == 1;
            return true;
        }
        if class == 1 && command == 0 && self.has(CTRL_RX) {
            let mut at = 0;
            let mut tables = Vec::new();
            for _ in 0..2 {
                if data.len() - at < 4 {
                    return false;
                }
                let count = u32::from_le_bytes(data[at..at + 4].try_into().unwrap()) as usize;
                at += 4;
                if data.len() - at < 6 * count {
                    return false;
                }
                let mut table = Vec::new();
                for number in 0..count {
                    table.push(Mac::try_from(&data[at + 6 * number..at + 6 * number + 6]).unwrap());
                }
                at += 6 * count;
                tables.push(table);
            }
            if at != data.len() {
                return false;
            }
            self.any_unicast = tables[0].len() > 64;
            self.any_multicast = tables[1].len() > 64;
            self.unicast = tables[0].iter().copied().collect();
            self.multicast = tables[1].iter().copied().collect();
            return true;
        }
        if class == 1 && command == 1 && self.has(CTRL_MAC_ADDR) {
            if data.len() != 6 || data[0] % 2 == 1 || data == [0; 6] {
                return false;
            }
            self.mac.copy_from_slice(data);
            self.mac_is_known = true;
            return true;
        }
        if class == 2 && command < 2 && self.has(CTRL_VLAN) {
            if data.len() != 2 || data[1] >= 16 {
                return false;
            }
            let vlan = u16::from(data[1]) * 256 + u16::from(data[0]);
            if command == 0 {
                self.vlans.insert(vlan);
            } else {
                self.vlans.remove(&vlan);
            }
            return true;
        }
        if class == 3 && command == 0 && self.has(GUEST_ANNOUNCE) {
            return data.is_empty();
        }
        if class == 4 && command == 0 && self.has(MQ) {
            if data.len() != 2 {
                return false;
            }
            let pairs = u16::from(data[1]) * 256 + u16::from(data[0]);
            if pairs == 0 || pairs > self.pairs_max {
                return false;
            }
            self.pairs = pairs;
            return true;
        }
        false
    }

    /// Whether a frame of at least 16 bytes is the driver's.
    pub fn admits(&self, frame: &[u8]) -> bool {
        let [promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast] = self.modes;
        let to = Mac::try_from(&frame[..6]).unwrap();
        if promiscuous {
            return true;
        }
        if frame[12] == 0x81 && frame[13] == 0 {
            let tag = u16::from(frame[14]) * 256 + u16::from(frame[15]);
            if !self.vlans.contains(&(tag % 4096)) {
                return false;
            }
        }
        if to == [0xff; 6] {
            return !no_broadcast;
        }
        if to[0] % 2 == 1 {
            return !no_multicast && (all_multicast || self.any_multicast || self.multicast.contains(&to));
        }
        if no_unicast {
            return false;
        }
        all_unicast || self.any_unicast || !self.mac_is_known || to == self.mac || self.unicast.contains(&to)
    }
}
