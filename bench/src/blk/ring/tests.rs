//! The driver against a device that is played here, well and badly.

use super::*;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

struct Device {
    available: *mut u16,
    used: *mut u16,
    size: u16,
}

fn ring(event_idx: bool) -> (Ring, Device) {
    let layout = Layout::new(0, 4, 4096);
    let memory = Memory::new(layout.end()).unwrap();
    let size = usize::from(layout.place.size);
    let device = Device {
        available: memory.at(layout.place.available, 6 + 2 * size),
        used: memory.at(layout.place.used, 6 + 8 * size),
        size: layout.place.size,
    };
    (Ring::new(&memory, &layout, 4, 4096, event_idx), device)
}

impl Device {
    fn set(ring: *mut u16, word: usize, value: u16) {
        // SAFETY: a word inside of a ring whose memory the test's `Ring` keeps.
        unsafe { ring.add(word).write_volatile(value) };
    }

    fn word(ring: *mut u16, word: usize) -> u16 {
        // SAFETY: as in `set`.
        unsafe { ring.add(word).read_volatile() }
    }

    /// Says that it has used `head`, as the `number`th request.
    fn use_head(&self, number: u16, head: u16) {
        let at = 2 + 4 * usize::from((number - 1) % self.size);
        Self::set(self.used, at, head);
        Self::set(self.used, at + 1, 0);
        Self::set(self.used, 1, number);
    }

    fn wish_kick_at(&self, index: u16) {
        Self::set(self.used, 2 + 4 * usize::from(self.size), index);
    }
}

#[test]
fn what_the_device_uses_is_taken_once_and_its_status_reset() {
    let (mut ring, device) = ring(true);
    ring.offer(2, true, 77);
    assert_eq!((ring.pending(), Device::word(device.available, 1)), (0, 0), "nothing is published yet");
    ring.publish();
    assert_eq!((ring.pending(), Device::word(device.available, 1)), (1, 1));
    assert_eq!(Device::word(device.available, 2), 2 * SLOT_DESCRIPTORS);
    let mut slots = [(0, 0); BATCH];
    assert_eq!(ring.take(&mut slots).unwrap(), 0);
    device.use_head(1, 2 * SLOT_DESCRIPTORS);
    assert_eq!(ring.take(&mut slots).unwrap(), 1);
    assert_eq!((slots[0].0, ring.pending()), (2, 0));
    assert_eq!(ring.take_status(2), NO_STATUS, "this device wrote none");
    assert_eq!(ring.take(&mut slots).unwrap(), 0);
}

#[test]
fn a_device_that_uses_what_it_does_not_have_is_found_out() {
    for head in [0, 1, 4 * SLOT_DESCRIPTORS, u16::MAX] {
        let (mut ring, device) = ring(true);
        ring.offer(1, false, 0);
        ring.publish();
        device.use_head(1, head);
        let error = ring.take(&mut [(0, 0); BATCH]).unwrap_err();
        assert!(matches!(error, RingError::Head { head: found } if found == u32::from(head)), "{error}");
    }
    let (mut ring, device) = ring(true);
    ring.offer(1, false, 0);
    ring.publish();
    device.use_head(2, SLOT_DESCRIPTORS);
    let error = ring.take(&mut [(0, 0); BATCH]).unwrap_err();
    assert!(matches!(error, RingError::TooMany { used: 2, available: 1 }), "{error}");
}

#[test]
fn the_device_is_kicked_when_it_wishes() {
    let (mut ring, device) = ring(true);
    device.wish_kick_at(1);
    ring.offer(0, false, 0);
    assert!(!ring.publish(), "it wants the second");
    ring.offer(1, false, 0);
    ring.offer(2, false, 0);
    assert!(ring.publish(), "the second is among them");
    assert!(!ring.publish(), "nothing new");
    let (mut ring, device) = self::ring(false);
    ring.offer(0, false, 0);
    assert!(ring.publish());
    Device::set(device.used, 0, NO_NOTIFY);
    ring.offer(1, false, 0);
    assert!(!ring.publish());
}

#[test]
fn signals_are_asked_for_and_declined() {
    let (mut ring, device) = ring(true);
    let event = 2 + usize::from(device.size);
    // declined: the event is behind what is used already
    assert_eq!(Device::word(device.available, event), u16::MAX);
    ring.offer(0, false, 0);
    ring.publish();
    assert!(!ring.arm());
    assert_eq!(Device::word(device.available, event), 0);
    device.use_head(1, 0);
    assert!(ring.arm(), "one has ended already");
    let (ring, device) = self::ring(false);
    assert_eq!(Device::word(device.available, 0), NO_INTERRUPT);
    assert!(!ring.arm());
    assert_eq!(Device::word(device.available, 0), 0);
}

#[test]
fn data_of_a_slot_is_its_own() {
    let (mut ring, _) = ring(true);
    for slot in 0..4 {
        ring.set_data(slot, &[slot as u8 + 1; 4096]);
    }
    for slot in 0..4 {
        let mut data = [0; 4096];
        ring.copy_data(slot, &mut data);
        assert_eq!(data, [slot as u8 + 1; 4096]);
    }
}

#[test]
#[should_panic(expected = "slot 3 is in flight")]
fn a_slot_is_offered_once() {
    let (mut ring, _) = ring(true);
    ring.offer(3, false, 0);
    ring.offer(3, false, 0);
}
