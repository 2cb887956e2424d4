//! What has been read off the link and not applied yet, and the point in the stream where the secondary stands.
//!
//! A write waits while the buffer has no room for it, unless a marker is behind it: then the checkpoint that will
//! empty the buffer is waiting for the write, and the window bounds by how much the buffer grows past its limit.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::wire::WINDOW_BYTES;

/// More markers than this are never on their way: a checkpoint begins when the one before is committed, of which this
/// side's controller may tell the peer's before it tells us.
const MARKERS_MAX: usize = 4;

/// A frame of the primary.
#[derive(Debug)]
pub(super) enum Frame {
    Write { offset: u64, data: Vec<u8> },
    Marker,
}

/// What the applying thread has to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// Tell the controller: everything of the epoch is applied. Nothing follows until its commit.
    Marker {
        epoch: u64,
    },
    /// Tell the controller: nothing follows any more.
    Ended {
        reason: String,
    },
    Stopped,
}

#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    frames: VecDeque<Frame>,
    /// Bytes of writes among the frames or being applied.
    bytes: u64,
    /// Markers among the frames.
    markers: usize,
    /// The epoch that the next frame off the link must carry.
    epoch_received: u64,
    /// The epoch that is running; its writes are being applied.
    epoch: u64,
    /// The marker of `epoch` has been reached.
    at_marker: bool,
    /// Why there will be no more frames; taken when it was told.
    ended: Option<String>,
    stopped: bool,
}

impl Inbox {
    pub(super) fn new(epoch: u64) -> Self {
        let state = State {
            frames: VecDeque::new(),
            bytes: 0,
            markers: 0,
            epoch_received: epoch,
            epoch,
            at_marker: false,
            ended: None,
            stopped: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes a frame off the link. An error says what is wrong with it.
    pub(super) fn push(&self, epoch: u64, frame: Frame) -> Result<(), String> {
        let mut state = self.lock();
        if epoch != state.epoch_received {
            return Err(format!(
                "The peer sent a frame of epoch {epoch} while it is in epoch {}",
                state.epoch_received
            ));
        }
        match &frame {
            Frame::Write { data, .. } => {
                state.bytes += data.len() as u64;
                if state.bytes > WINDOW_BYTES {
                    return Err(format!("The peer sent more than {WINDOW_BYTES} bytes ahead of us"));
                }
            }
            Frame::Marker => {
                if state.markers == MARKERS_MAX {
                    return Err(format!("The peer sent {MARKERS_MAX} markers ahead of us"));
                }
                state.markers += 1;
                state.epoch_received =
                    epoch.checked_add(1).ok_or_else(|| "The peer's epoch is the last number".to_string())?;
            }
        }
        state.frames.push_back(frame);
        self.changed.notify_all();
        Ok(())
    }

    /// The link has ended; what was read before is still to be applied.
    pub(super) fn end(&self, reason: String) {
        self.lock().ended = Some(reason);
        self.changed.notify_all();
    }

    /// The applying thread has to go.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// The controller commits `epoch`, whose marker must have been reached; `empty` is run before anything more is
    /// applied.
    pub(super) fn commit(&self, epoch: u64, empty: impl FnOnce()) -> Result<(), String> {
        let mut state = self.lock();
        if state.epoch != epoch {
            return Err(format!("Commit of epoch {epoch}, but epoch {} is running", state.epoch));
        }
        if !state.at_marker {
            return Err(format!("Commit of epoch {epoch}, but its marker has not arrived on the block link"));
        }
        empty();
        state.at_marker = false;
        state.epoch += 1;
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for something to do.
    pub(super) fn next(&self, has_room: impl Fn(u64, usize) -> bool) -> Next {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Next::Stopped;
            }
            match state.frames.front() {
                _ if state.at_marker => {}
                Some(Frame::Write { offset, data }) if state.markers > 0 || has_room(*offset, data.len()) => {
                    if let Some(Frame::Write { offset, data }) = state.frames.pop_front() {
                        return Next::Write { offset, data };
                    }
                }
                Some(Frame::Marker) => {
                    state.frames.pop_front();
                    state.markers -= 1;
                    state.at_marker = true;
                    return Next::Marker { epoch: state.epoch };
                }
                Some(Frame::Write { .. }) | None => {}
            }
            // Nothing can be done now. If the link has ended, that is worth telling: what is still here waits for a
            // commit, or for a marker that cannot come any more.
            if let Some(reason) = state.ended.take() {
                return Next::Ended { reason };
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A write of so many bytes was applied. Returns whether there is no other to apply at once.
    pub(super) fn applied(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        state.bytes -= bytes as u64;
        !matches!(state.frames.front(), Some(Frame::Write { .. }))
    }

    /// The running epoch and the bytes that wait.
    pub(super) fn status(&self) -> (u64, u64) {
        let state = self.lock();
        (state.epoch, state.bytes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64) -> Frame {
        Frame::Write { offset, data: vec![0; 512] }
    }

    #[test]
    fn a_full_buffer_stops_writes_until_a_marker_is_behind_them() {
        let inbox = Inbox::new(5);
        let full = |_, _| false;
        inbox.push(5, write(0)).unwrap();
        inbox.end("gone".into());
        assert_eq!(inbox.next(full), Next::Ended { reason: "gone".into() });
        inbox.push(5, write(512)).unwrap();
        inbox.push(5, Frame::Marker).unwrap();
        inbox.push(6, write(1024)).unwrap();
        assert!(matches!(inbox.next(full), Next::Write { offset: 0, .. }));
        assert!(inbox.commit(5, || panic!()).unwrap_err().contains("not arrived"));
        assert!(!inbox.applied(512));
        assert!(matches!(inbox.next(full), Next::Write { offset: 512, .. }));
        assert!(inbox.applied(512));
        assert_eq!(inbox.next(full), Next::Marker { epoch: 5 });
        assert!(inbox.commit(6, || panic!()).unwrap_err().contains("epoch 5 is running"));
        inbox.commit(5, || {}).unwrap();
        assert!(matches!(inbox.next(|_, _| true), Next::Write { offset: 1024, .. }));
        assert_eq!(inbox.status(), (6, 512));
        inbox.stop();
        assert_eq!(inbox.next(full), Next::Stopped);
    }

    #[test]
    fn what_a_sound_primary_never_sends_is_refused() {
        let inbox = Inbox::new(1);
        assert!(inbox.push(2, write(0)).is_err());
        for epoch in 1..=4 {
            inbox.push(epoch, Frame::Marker).unwrap();
            assert!(inbox.push(epoch, write(0)).is_err());
        }
        assert!(inbox.push(5, Frame::Marker).unwrap_err().contains("markers"));
        let inbox = Inbox::new(2);
        let most = WINDOW_BYTES as usize;
        inbox.push(2, Frame::Write { offset: 0, data: vec![0; most] }).unwrap();
        assert!(inbox.push(2, write(0)).unwrap_err().contains("ahead of us"));
        let last = Inbox::new(u64::MAX);
        assert!(last.push(u64::MAX, Frame::Marker).is_err());
    }
}
