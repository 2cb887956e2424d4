//! What the PVM sent as it is compared, and as it leaves: one frame, or a datagram and the fragments that it came in.

use std::ops::{Deref, DerefMut};

use crate::packet::checksum::Checksum;
use crate::packet::fragments::Datagram;
use crate::proxy::{Actions, Buffer};

#[derive(Debug)]
pub(super) enum Output {
    Frame(Buffer),
    Fragments(Box<Datagram<Buffer>>),
}

impl Output {
    /// Bytes that it takes as long as it waits.
    #[inline]
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Frame(frame) => frame.len(),
            Self::Fragments(datagram) => datagram.cost(),
        }
    }

    /// What the checksum field of its TCP header holds.
    #[inline]
    pub(super) fn checksum(&self) -> Checksum {
        match self {
            Self::Frame(frame) => frame.header().checksum(),
            Self::Fragments(_) => Checksum::Complete,
        }
    }

    #[inline]
    pub(super) fn leave(self, actions: &mut Actions) {
        match self {
            Self::Frame(frame) => actions.push_to_lan(frame),
            Self::Fragments(datagram) => {
                for fragment in datagram.into_fragments() {
                    actions.push_to_lan(fragment);
                }
            }
        }
    }
}

/// The frame that is compared.
impl Deref for Output {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Frame(frame) => frame,
            Self::Fragments(datagram) => &datagram.frame,
        }
    }
}

impl DerefMut for Output {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Frame(frame) => frame,
            Self::Fragments(datagram) => &mut datagram.frame,
        }
    }
}
