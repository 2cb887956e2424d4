//! Two back ends that keep two disks: the primary forwards, the secondary applies under the block buffer.
//!
//! - [`primary`]: every write of the PVM goes out in the order in which overlapping ones reach the local disk.
//! - [`secondary`]: the PVM's writes reach the disk, the SVM's only the buffer.
//! - [`stream`]: the connection between the two, which either thread of a side can end.

pub(crate) mod primary;
pub(crate) mod secondary;
pub(crate) mod stream;

use crate::worker::Waker;

/// Wakes the workers whose requests wait for something that the peer or the controller does.
#[derive(Clone, Debug)]
pub(crate) struct Wakers(pub(crate) Vec<Waker>);

impl Wakers {
    pub(crate) fn wake(&self) {
        for waker in &self.0 {
            waker.wake();
        }
    }
}
