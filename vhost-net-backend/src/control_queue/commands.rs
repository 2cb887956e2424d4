//! Commands of the control queue (virtio 1.2 §5.1.6.5): the bytes of one in, and what it has changed out.

use virtio_bindings::bindings::virtio_net::*;

use super::filter::{Filter, MACS_MAX, Mac, Table, VLANS};
use crate::device::MacAddress;

/// What a driver's commands are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    /// What the driver has negotiated.
    pub features: u64,
    /// The card's own address.
    pub mac: [u8; 6],
    /// Queue pairs that there are.
    pub pairs_max: u16,
}

impl Card {
    fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }
}

/// What a command has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Which frames the driver wants.
    Filter,
    /// The same, because the card has another address.
    Mac,
    /// How many queue pairs receive.
    Pairs,
    /// The driver has announced itself.
    Announced,
}

/// Why a command was answered with VIRTIO_NET_ERR. It has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is none, or the driver has not negotiated it.
    #[error("No such command")]
    Unknown,
    /// Its data is shorter or longer than it has to be.
    #[error("The data of a command has the wrong length")]
    Length,
    /// Its data means nothing.
    #[error("The data of a command is no possible value")]
    Value,
}

/// What the driver has said by the control queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    filter: Filter,
    pairs: u16,
}

impl State {
    /// As it is after a reset: all frames are received, by one pair (§5.1.6.5).
    pub fn reset(card: &Card) -> Self {
        Self { filter: Filter::reset(card.mac, card.has(VIRTIO_NET_F_CTRL_VLAN)), pairs: 1 }
    }

    /// Of a driver that may have said anything before: it gets more than it wants rather than less, until it says the same
    /// again.
    pub fn unknown(card: &Card) -> Self {
        Self { filter: Filter::unknown(), pairs: card.pairs_max }
    }

    /// Which frames the driver wants.
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// By how many queue pairs.
    pub fn pairs(&self) -> u16 {
        self.pairs
    }

    /// The address that the driver has given the card, if we know it.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.filter.mac
    }

    /// Carries out one command: class, command, and its data.
    ///
    /// # Errors
    /// It is to be answered with VIRTIO_NET_ERR.
    pub fn carry_out(&mut self, card: &Card, command: &[u8]) -> Result<Change, Refused> {
        let (&[class, command], data) = command.split_first_chunk().ok_or(Refused::Length)?;
        let command = u32::from(command);
        match (u32::from(class), command) {
            (VIRTIO_NET_CTRL_RX, _) => self.set_mode(card, command, data),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if card.has(VIRTIO_NET_F_CTRL_RX) => {
                let (unicast, data) = take_table(data).ok_or(Refused::Length)?;
                let (multicast, data) = take_table(data).ok_or(Refused::Length)?;
                nothing_more(data)?;
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
                Ok(Change::Filter)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if card.has(VIRTIO_NET_F_CTRL_MAC_ADDR) => {
                let mac: Mac = data.try_into().map_err(|_| Refused::Length)?;
                if !MacAddress(mac).is_of_a_card() {
                    return Err(Refused::Value);
                }
                self.filter.mac = Some(mac);
                Ok(Change::Mac)
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL)
                if card.has(VIRTIO_NET_F_CTRL_VLAN) =>
            {
                let vlan = word(data)?;
                if usize::from(vlan) >= VLANS {
                    return Err(Refused::Value);
                }
                self.filter.set_vlan(vlan, command == VIRTIO_NET_CTRL_VLAN_ADD);
                Ok(Change::Filter)
            }
            // also when nothing was asked for: the back end that asked may have been another process
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK)
                if card.has(VIRTIO_NET_F_GUEST_ANNOUNCE) =>
            {
                nothing_more(data)?;
                Ok(Change::Announced)
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if card.has(VIRTIO_NET_F_MQ) => {
                let pairs = word(data)?;
                if !(1..=card.pairs_max).contains(&pairs) {
                    return Err(Refused::Value);
                }
                self.pairs = pairs;
                Ok(Change::Pairs)
            }
            _ => Err(Refused::Unknown),
        }
    }

    /// Switches one of the modes of §5.1.6.5.1 on or off.
    fn set_mode(&mut self, card: &Card, command: u32, data: &[u8]) -> Result<Change, Refused> {
        let filter = &mut self.filter;
        let (feature, mode) = match command {
            VIRTIO_NET_CTRL_RX_PROMISC => (VIRTIO_NET_F_CTRL_RX, &mut filter.promiscuous),
            VIRTIO_NET_CTRL_RX_ALLMULTI => (VIRTIO_NET_F_CTRL_RX, &mut filter.all_multicast),
            VIRTIO_NET_CTRL_RX_ALLUNI => (VIRTIO_NET_F_CTRL_RX_EXTRA, &mut filter.all_unicast),
            VIRTIO_NET_CTRL_RX_NOMULTI => (VIRTIO_NET_F_CTRL_RX_EXTRA, &mut filter.no_multicast),
            VIRTIO_NET_CTRL_RX_NOUNI => (VIRTIO_NET_F_CTRL_RX_EXTRA, &mut filter.no_unicast),
            VIRTIO_NET_CTRL_RX_NOBCAST => (VIRTIO_NET_F_CTRL_RX_EXTRA, &mut filter.no_broadcast),
            _ => return Err(Refused::Unknown),
        };
        if !card.has(feature) {
            return Err(Refused::Unknown);
        }
        *mode = match data {
            [0] => false,
            [1] => true,
            [_] => return Err(Refused::Value),
            _ => return Err(Refused::Length),
        };
        Ok(Change::Filter)
    }
}

/// Takes `struct virtio_net_ctrl_mac` off the front.
fn take_table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(size_of::<Mac>())?;
    let (macs, rest) = rest.split_at_checked(bytes)?;
    let (macs, _) = macs.as_chunks();
    let table = (macs.len() <= MACS_MAX).then(|| {
        let mut macs: Vec<Mac> = macs.to_vec();
        macs.sort_unstable();
        macs
    });
    Some((table, rest))
}

fn word(data: &[u8]) -> Result<u16, Refused> {
    data.try_into().map(u16::from_le_bytes).map_err(|_| Refused::Length)
}

fn nothing_more(data: &[u8]) -> Result<(), Refused> {
    if data.is_empty() { Ok(()) } else { Err(Refused::Length) }
}
