//! Which frames from the LAN the driver wants (virtio 1.2 §5.1.6.5.1 to §5.1.6.5.3).

/// A hardware address.
pub(super) type Mac = [u8; 6];

/// Bytes at the beginning of a frame that decide: both addresses and a VLAN tag.
pub const FILTERED_BYTES: usize = 16;

/// A table with more addresses is not kept: all are admitted (§5.1.6.5.2 leaves this to the device).
pub const MACS_MAX: usize = 64;

/// A VLAN's number has 12 bits (IEEE 802.1Q).
pub const VLANS: usize = 4096;

const BROADCAST: Mac = [0xff; 6];
const WORDS: usize = VLANS / 64;

/// Addresses in order; `None` when all are admitted, because there are too many or because we do not know them.
pub(super) type Table = Option<Vec<Mac>>;

/// What the driver wants to receive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_unicast: bool,
    pub(super) all_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_broadcast: bool,
    /// The card's address; `None` when the driver may have set one that we do not know.
    pub(super) mac: Option<Mac>,
    pub(super) unicast: Table,
    pub(super) multicast: Table,
    vlans: Box<[u64; WORDS]>,
}

impl Filter {
    /// As it is after a reset: everything is received until the driver says otherwise. Once it does, no address but the
    /// card's is admitted, and no VLAN if the driver is to name those that it wants.
    pub(super) fn reset(mac: Mac, names_vlans: bool) -> Self {
        Self {
            promiscuous: true,
            all_unicast: false,
            all_multicast: false,
            no_unicast: false,
            no_multicast: false,
            no_broadcast: false,
            mac: Some(mac),
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: Box::new([if names_vlans { 0 } else { u64::MAX }; WORDS]),
        }
    }

    /// Whatever the driver has said is not known: each kind is admitted until it says it anew.
    pub(super) fn unknown() -> Self {
        Self {
            all_unicast: true,
            all_multicast: true,
            mac: None,
            unicast: None,
            multicast: None,
            ..Self::reset(BROADCAST, false)
        }
    }

    pub(super) fn set_vlan(&mut self, vlan: u16, admitted: bool) {
        let (word, bit) = (usize::from(vlan) / 64, 1 << (vlan % 64));
        if admitted {
            self.vlans[word] |= bit;
        } else {
            self.vlans[word] &= !bit;
        }
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        self.vlans[usize::from(vlan) / 64] >> (vlan % 64) & 1 == 1
    }

    /// Whether there is no frame that it does not admit.
    pub fn admits_all(&self) -> bool {
        self.promiscuous
    }

    /// Whether the driver wants this frame, of which [`FILTERED_BYTES`] are enough. What ends within its addresses or its
    /// tag is no frame and is not judged by them.
    #[inline]
    pub fn admits(&self, frame: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(to) = frame.first_chunk::<6>() else {
            return true;
        };
        // the outermost tag, of IEEE 802.1Q
        if let Some([0x81, 0x00, high, low]) = frame.get(12..16)
            && !self.has_vlan(u16::from_be_bytes([*high, *low]) % VLANS as u16)
        {
            return false;
        }
        let among = |table: &Table| table.as_ref().is_none_or(|macs| macs.binary_search(to).is_ok());
        if *to == BROADCAST {
            !self.no_broadcast
        } else if to[0] & 1 == 1 {
            !self.no_multicast && (self.all_multicast || among(&self.multicast))
        } else {
            let is_ours = self.mac.is_none_or(|mac| mac == *to);
            !self.no_unicast && (self.all_unicast || is_ours || among(&self.unicast))
        }
    }
}
