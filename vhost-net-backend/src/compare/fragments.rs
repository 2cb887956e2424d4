//! Fragments in the comparison. The two VMs choose different identifications, and may cut at different places, so it is
//! the datagrams that are compared, as if they had never been in pieces; then the PVM's fragments leave as they came.
//!
//! What does not become a datagram in time is compared fragment by fragment. So is the rest of a datagram that a commit
//! cut in two: the SVM, which is what the PVM was in the middle of it, goes on with the very same fragments.

use super::Compare;
use super::output::Output;
use crate::packet::Packet;
use crate::packet::fragments::{Fragment, Put, Reassembler};
use crate::proxy::{Actions, Buffer, Cause};

/// What is missing something, of each VM.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    pub(super) pvm: Reassembler<Buffer>,
    pub(super) svm: Reassembler<Vec<u8>>,
    /// When the PVM's last fragment came.
    last_us: u64,
}

impl Compare {
    /// How long fragments wait for the others of their datagram. What is left of the time that packets may be held is
    /// for the comparison.
    fn assembly_us_max(&self) -> u64 {
        self.limits.held_us_max / 2
    }

    /// The PVM has sent a fragment.
    pub(super) fn pvm_fragment(
        &mut self,
        frame: Buffer,
        fragment: &Fragment,
        now_us: u64,
        actions: &mut Actions,
    ) {
        self.fragments.last_us = now_us;
        self.give_up_fragments(now_us, actions);
        match self.fragments.pvm.put(fragment, frame, now_us) {
            Put::Kept => self.want_within_limits(actions),
            Put::Whole(datagram) => {
                let packet = Packet::parse(&datagram.frame);
                self.pvm_sends(Output::Fragments(Box::new(datagram)), packet, now_us, actions);
            }
            Put::Singly(frames) => self.pvm_single(frames, now_us, actions),
        }
    }

    fn pvm_single(&mut self, frames: Vec<Buffer>, now_us: u64, actions: &mut Actions) {
        for frame in frames {
            let packet = Packet::parse(&frame);
            self.pvm_sends(Output::Frame(frame), packet, now_us, actions);
        }
    }

    /// The SVM has sent a fragment.
    pub(super) fn svm_fragment(
        &mut self,
        frame: &[u8],
        fragment: &Fragment,
        now_us: u64,
        actions: &mut Actions,
    ) {
        self.give_up_fragments(now_us, actions);
        if !self.has_room_for_svm(actions) {
            self.stats.svm_packets_dropped += 1;
            return;
        }
        let before = self.fragments.svm.cost();
        let put = self.fragments.svm.put(fragment, frame.to_vec(), now_us);
        self.svm_bytes = self.svm_bytes + self.fragments.svm.cost() - before;
        match put {
            Put::Kept => {}
            Put::Whole(datagram) => {
                self.svm_sends(&datagram.frame, &Packet::parse(&datagram.frame), now_us, actions);
            }
            Put::Singly(frames) => self.svm_single(&frames, now_us, actions),
        }
    }

    fn svm_single(&mut self, frames: &[Vec<u8>], now_us: u64, actions: &mut Actions) {
        for frame in frames {
            self.svm_sends(frame, &Packet::parse(frame), now_us, actions);
        }
    }

    /// When [`Compare::give_up_fragments`] has something to do.
    pub(super) fn fragments_deadline(&self) -> Option<u64> {
        let oldest = [self.fragments.pvm.oldest_us(), self.fragments.svm.oldest_us()];
        Some(oldest.into_iter().flatten().min()? + self.assembly_us_max() + 1)
    }

    /// Goes on with what has waited too long for the rest of its datagram.
    pub(super) fn give_up_fragments(&mut self, now_us: u64, actions: &mut Actions) {
        let before_us = now_us.saturating_sub(self.assembly_us_max());
        if !self.suspended {
            let frames = self.fragments.pvm.give_up(before_us, now_us);
            self.pvm_single(frames, now_us, actions);
        }
        let before = self.fragments.svm.cost();
        let frames = self.fragments.svm.give_up(before_us, now_us);
        self.svm_bytes = self.svm_bytes + self.fragments.svm.cost() - before;
        self.svm_single(&frames, now_us, actions);
    }

    /// A checkpoint was committed: what has come of the PVM's datagrams leaves.
    pub(super) fn commit_fragments(&mut self, actions: &mut Actions) {
        for frame in self.fragments.pvm.give_up(u64::MAX, self.fragments.last_us) {
            actions.push_to_lan(frame);
            self.stats.released_by_commit += 1;
        }
        self.fragments.svm.become_like(&self.fragments.pvm);
    }

    /// Asks for a checkpoint when too much is held.
    pub(super) fn want_within_limits(&mut self, actions: &mut Actions) {
        let bytes = self.held_bytes();
        if bytes > self.limits.held_bytes_max && !self.wanted {
            let packets = self.held.count() + self.fragments.pvm.frames();
            let detail = format!("{bytes} bytes in {packets} packets are held");
            self.want(Cause::HeldBytes, detail, actions);
        }
    }

    /// Bytes of what is held, the fragments of what is no datagram yet among it.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.bytes() + self.fragments.pvm.bytes()
    }
}
