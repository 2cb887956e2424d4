//! Packets of QEMU's filters in, packets that may leave out: everything that this program asks of the proxy. No I/O, no
//! clock.

use serde_json::{Value, json};

use super::framing::{Packet, encode};
use super::syn::Openings;
use crate::proxy::{Action, Actions, Config, OrderError, Primary};

/// So much may wait to be sent to QEMU before the guest's packets are refused.
const OUTGOING_BYTES_MAX: usize = 32 << 20;

/// The virtio-net header's flag for a checksum that is left to the receiver, and where it tells its place (virtio 1.2
/// §5.1.6).
const NEEDS_CSUM: u8 = 1;
const CSUM_START_AT: usize = 6;
const CSUM_OFFSET_AT: usize = 8;
/// Bytes of the part of the header that all of its forms have.
const HEADER_BYTES_MIN: usize = 10;

/// Bytes of a transport protocol's checksum.
const CHECKSUM_BYTES: usize = 2;

/// A checkpoint is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// One word for it.
    pub cause: &'static str,
    /// Which flow, and what it waits for.
    pub detail: String,
}

/// The comparison of what the two VMs' filters hand over.
#[derive(Debug)]
pub struct Comparison {
    proxy: Primary,
    actions: Actions,
    openings: Openings,
    vnet_hdr: bool,
    /// Bytes of the PVM's virtio-net headers, for a frame that is made here.
    header_bytes: usize,
    /// Used for one packet at a time.
    luggage: Vec<u8>,
    renumbered: Vec<u8>,
    /// A checkpoint has been asked for in this epoch.
    asked: bool,
    wish: Option<Wish>,
    pvm_refused: u64,
}

impl Comparison {
    /// Epoch 0 runs.
    pub fn new(config: &Config, vnet_hdr: bool, now_us: u64) -> Self {
        Self {
            proxy: Primary::new(config, 0, now_us),
            actions: Actions::new(),
            openings: Openings::default(),
            vnet_hdr,
            header_bytes: 0,
            luggage: Vec::new(),
            renumbered: Vec::new(),
            asked: false,
            wish: None,
            pvm_refused: 0,
        }
    }

    /// The PVM has sent this. What may leave is appended to `out`, framed, here and below.
    ///
    /// When no more can be held it is refused, as a LAN does with a full queue. To leave it in the socket, which would slow
    /// the guest down, is no choice: QEMU waits there with its big lock, so that no checkpoint could be taken any more.
    pub fn pvm_says(&mut self, packet: Packet<'_>, now_us: u64, out: &mut Vec<u8>) {
        if !self.proxy.accepts_output() || out.len() > OUTGOING_BYTES_MAX {
            self.pvm_refused += 1;
            return;
        }
        if let Some(syn) = self.openings.pvm_says(packet.frame) {
            self.proxy.svm_output(&syn, now_us, &mut self.actions);
        }
        self.luggage.clear();
        if self.vnet_hdr {
            self.header_bytes = packet.header.len();
            self.luggage.extend_from_slice(packet.header);
            let checksum = unfinished_checksum_at(packet.header, packet.frame.len())
                .map_or(&[0; CHECKSUM_BYTES][..], |at| &packet.frame[at..at + CHECKSUM_BYTES]);
            self.luggage.extend_from_slice(checksum);
        }
        let frame = self.actions.pool().copy_with(&self.luggage, packet.frame);
        self.proxy.guest_output(frame, now_us, &mut self.actions);
        self.carry_out(out);
    }

    /// The SVM has sent this.
    pub fn svm_says(&mut self, packet: Packet<'_>, now_us: u64, out: &mut Vec<u8>) {
        if let Some(frame) = self.openings.svm_says(packet.frame, &mut self.renumbered) {
            self.proxy.svm_output(frame, now_us, &mut self.actions);
            self.carry_out(out);
        }
    }

    /// Something that one of the VMs sent may have been lost.
    pub fn lost(&mut self, detail: String) {
        self.ask(Wish { cause: "connection", detail });
    }

    /// The epoch that runs.
    pub fn epoch(&self) -> u64 {
        self.proxy.epoch()
    }

    /// The PVM is paused, and all that it sent has been here.
    ///
    /// # Errors
    /// It is not the epoch that runs, or this side is not protected any more.
    pub fn marker(&mut self, epoch: u64, out: &mut Vec<u8>) -> Result<(), OrderError> {
        self.proxy.marker(epoch, &mut self.actions)?;
        self.carry_out(out);
        Ok(())
    }

    /// A checkpoint is committed, and neither VM runs yet.
    ///
    /// # Errors
    /// It is not the epoch that runs, or this side is not protected any more.
    pub fn commit(&mut self, epoch: u64, now_us: u64, out: &mut Vec<u8>) -> Result<(), OrderError> {
        self.proxy.commit(epoch, now_us, &mut self.actions)?;
        self.ask_no_more();
        self.carry_out(out);
        Ok(())
    }

    /// Nothing leaves until the next order.
    pub fn detach(&mut self) {
        self.proxy.detach();
        self.ask_no_more();
    }

    /// This side goes on alone: everything leaves.
    pub fn take_over(&mut self, now_us: u64, out: &mut Vec<u8>) {
        self.proxy.take_over(now_us, &mut self.actions);
        self.carry_out(out);
        self.ask_no_more();
    }

    /// This side has lost: nothing leaves any more.
    pub fn silence(&mut self) {
        self.proxy.silence();
        self.ask_no_more();
    }

    /// When [`Comparison::tick`] has something to do.
    pub fn next_deadline(&self) -> Option<u64> {
        self.proxy.next_deadline()
    }

    /// Looks whether something has waited too long.
    pub fn tick(&mut self, now_us: u64, out: &mut Vec<u8>) {
        self.proxy.tick(now_us, &mut self.actions);
        self.carry_out(out);
    }

    /// The wish for a checkpoint that has come up since the last call; one an epoch.
    pub fn take_wish(&mut self) -> Option<Wish> {
        self.wish.take()
    }

    /// Whether a checkpoint has been asked for and not been committed.
    pub fn awaits_checkpoint(&self) -> bool {
        self.asked
    }

    /// The figures.
    pub fn status(&self) -> Value {
        json!({ "proxy": self.proxy.stats(), "pvm_refused": self.pvm_refused })
    }

    fn ask_no_more(&mut self) {
        self.asked = false;
        self.wish = None;
    }

    fn ask(&mut self, wish: Wish) {
        if !self.asked {
            self.asked = true;
            self.wish = Some(wish);
        }
    }

    /// Does what the proxy wants done.
    fn carry_out(&mut self, out: &mut Vec<u8>) {
        if self.actions.is_empty() {
            return;
        }
        for frame in self.actions.to_lan() {
            let Some((header, checksum)) = frame.luggage().split_last_chunk::<CHECKSUM_BYTES>() else {
                // made here, with a whole checksum
                let header = &[0; 64][..self.header_bytes.min(64)];
                encode(Packet { header, frame }, self.vnet_hdr, out);
                continue;
            };
            encode(Packet { header, frame }, self.vnet_hdr, out);
            // Where the window was narrowed the checksum was corrected for it. One that is not finished covers no window.
            if let Some(at) = unfinished_checksum_at(header, frame.len()) {
                let at = out.len() - frame.len() + at;
                out[at..at + CHECKSUM_BYTES].copy_from_slice(checksum);
            }
        }
        let wish = self.actions.iter().find_map(|action| match action {
            Action::CheckpointWanted { cause, detail } => {
                Some(Wish { cause: cause.as_str(), detail: detail.to_owned() })
            }
            _ => None,
        });
        self.actions.clear();
        if let Some(wish) = wish {
            self.ask(wish);
        }
    }
}

/// Where in the frame the checksum stands that the header leaves to the receiver, if there is one and the frame has it.
fn unfinished_checksum_at(header: &[u8], frame_bytes: usize) -> Option<usize> {
    if header.len() < HEADER_BYTES_MIN || header[0] & NEEDS_CSUM == 0 {
        return None;
    }
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let at = word(CSUM_START_AT) + word(CSUM_OFFSET_AT);
    (at + CHECKSUM_BYTES <= frame_bytes).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::super::framing::Decoder;
    use super::*;
    use crate::test_frames::{Tcp, udp};

    /// What has left: headers and frames.
    fn left(vnet_hdr: bool, out: &mut Vec<u8>) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut decoder = Decoder::new(vnet_hdr);
        let mut frames = Vec::new();
        let mut bytes = &out[..];
        while !bytes.is_empty() {
            decoder.fill(&mut bytes).unwrap();
            while let Some(Packet { header, frame }) = decoder.next_packet().unwrap() {
                frames.push((header.to_vec(), frame.to_vec()));
            }
        }
        out.clear();
        frames
    }

    fn bare(frame: &[u8]) -> Packet<'_> {
        Packet { header: &[], frame }
    }

    #[test]
    fn what_both_say_leaves_and_what_differs_waits_for_a_checkpoint() {
        let mut comparison = Comparison::new(&Config::default(), false, 0);
        let mut out = Vec::new();
        comparison.pvm_says(bare(&udp(1, b"same")), 0, &mut out);
        assert!(out.is_empty());
        comparison.svm_says(bare(&udp(1, b"same")), 1, &mut out);
        assert_eq!(left(false, &mut out), [(vec![], udp(1, b"same"))]);

        comparison.pvm_says(bare(&udp(1, b"this")), 2, &mut out);
        comparison.svm_says(bare(&udp(1, b"that")), 3, &mut out);
        comparison.tick(1_000_000, &mut out);
        let wish = comparison.take_wish().unwrap();
        assert_eq!(wish.cause, "mismatch");
        assert!(out.is_empty() && comparison.awaits_checkpoint() && comparison.take_wish().is_none());
        assert!(comparison.commit(7, 1_000_001, &mut out).is_err());
        comparison.commit(0, 1_000_001, &mut out).unwrap();
        assert_eq!(left(false, &mut out), [(vec![], udp(1, b"this"))]);
        assert!(!comparison.awaits_checkpoint() && comparison.epoch() == 1);
    }

    #[test]
    fn a_clients_connection_is_followed_from_its_syn_on_as_qemus_rewriter_shows_it() {
        let mut comparison = Comparison::new(&Config::default(), false, 0);
        let mut out = Vec::new();
        let syn_ack = |seq| Tcp { seq, ack: Some(501), syn: true, window: 60_000, ..Tcp::default() }.frame();
        let answer = Tcp { seq: 1001, ack: Some(520), window: 500, data: b"hello", ..Tcp::default() }.frame();
        for pvm_first in [true, false] {
            let mut say = |pvm: &[u8], svm: &[u8]| {
                if pvm_first {
                    comparison.pvm_says(bare(pvm), 0, &mut out);
                    assert!(out.is_empty());
                }
                comparison.svm_says(bare(svm), 0, &mut out);
                if !pvm_first {
                    assert!(out.is_empty());
                    comparison.pvm_says(bare(pvm), 0, &mut out);
                }
                left(false, &mut out)
            };
            // the SVM has chosen another number, which the rewriter leaves in its SYN-ACK
            assert_eq!(say(&syn_ack(1000), &syn_ack(77_000)), [(vec![], syn_ack(1000))]);
            assert_eq!(say(&answer, &answer), [(vec![], answer.clone())]);
            comparison = Comparison::new(&Config::default(), false, 0);
        }
    }

    #[test]
    fn a_header_comes_out_with_its_frame() {
        let mut comparison = Comparison::new(&Config::default(), true, 0);
        let mut out = Vec::new();
        let header = |number: u8| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number, 0];
        for number in [1, 2, 3] {
            comparison.pvm_says(
                Packet { header: &header(number), frame: &udp(number.into(), b"x") },
                0,
                &mut out,
            );
        }
        comparison.svm_says(Packet { header: &[9; 10], frame: &udp(2, b"x") }, 0, &mut out);
        comparison.commit(0, 0, &mut out).unwrap();
        let expected = [2, 1, 3].map(|number| (header(number).to_vec(), udp(number.into(), b"x")));
        assert_eq!(left(true, &mut out), expected);
    }

    #[test]
    fn a_checksum_that_is_left_to_the_receiver_stays_as_it_is_when_the_window_is_narrowed() {
        let mut config = Config::default();
        config.compare.clamp_windows = true;
        let mut comparison = Comparison::new(&config, true, 0);
        let mut out = Vec::new();
        let segment = |seq, window, data| Tcp { seq, ack: Some(501), window, data, ..Tcp::default() };
        // TCP behind Ethernet and IPv4: the checksum stands at 34 + 16
        let header = [NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        let syn_ack = Tcp { syn: true, ..segment(1000, 20_000, b"") }.frame();
        comparison.pvm_says(Packet { header: &header, frame: &syn_ack }, 0, &mut out);
        comparison.svm_says(Packet { header: &header, frame: &syn_ack }, 0, &mut out);
        let mut wide = segment(1001, 60_000, b"data").frame();
        wide[50..52].copy_from_slice(&[0xab, 0xcd]);
        comparison.svm_says(
            Packet { header: &header, frame: &segment(1001, 30_000, b"data").frame() },
            0,
            &mut out,
        );
        left(true, &mut out);
        comparison.pvm_says(Packet { header: &header, frame: &wide }, 0, &mut out);
        let frames = left(true, &mut out);
        let [(out_header, frame)] = &frames[..] else {
            panic!("{frames:?}");
        };
        assert_eq!((&out_header[..], &frame[50..52]), (&header[..], &[0xab, 0xcd][..]));
        assert_eq!(u16::from_be_bytes([frame[48], frame[49]]), 30_000, "the window");
        // the SVM offers more: a segment that is made here, whole, with a header of its own
        comparison.svm_says(
            Packet { header: &header, frame: &segment(1005, 60_000, b"").frame() },
            0,
            &mut out,
        );
        let frames = left(true, &mut out);
        let [(out_header, frame)] = &frames[..] else {
            panic!("{frames:?}");
        };
        assert_eq!(out_header[..], [0; 12]);
        let crate::packet::Kind::Tcp { addresses, .. } = crate::packet::Packet::parse(frame).kind else {
            panic!("{frame:?}");
        };
        assert_eq!(crate::packet::checksum::of_tcp(&addresses, &frame[34..]), 0);
    }

    #[test]
    fn a_guest_that_sends_without_end_takes_no_more_memory_than_is_set() {
        let config = Config::holding(100, 1 << 20);
        let mut comparison = Comparison::new(&config, false, 0);
        let mut out = Vec::new();
        let frame = udp(1, &[0; 9000]);
        let count = 2 * config.compare.held_bytes_full / frame.len();
        for _ in 0..count {
            comparison.pvm_says(bare(&frame), 0, &mut out);
        }
        assert_eq!(comparison.take_wish().unwrap().cause, "held-bytes");
        assert!(comparison.pvm_refused > 0 && out.is_empty());
        let held = count - comparison.pvm_refused as usize;
        assert!(held * frame.len() < config.compare.held_bytes_full + frame.len());
        // what is held is not lost
        comparison.commit(0, 0, &mut out).unwrap();
        assert_eq!(left(false, &mut out).len(), held);
    }
}
