//! The primary's half: what of the PVM's writes is on its way to the secondary.
//!
//! A write is admitted, which puts it on the link, and then written locally. One that overlaps a write that is still
//! on its way to the local disk is not admitted, so that both disks see overlapping writes in the same order. Nor is
//! one that would exceed the window, or any once the link is lost: those wait in the guest's ring.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use colo::control::EventSender;
use colo::link::read_frame;
use crossbeam_channel::{Receiver, Sender, unbounded};
use serde_json::{Value, json};

use super::Wakers;
use super::stream::LinkStream;
use crate::wire::{Message, WINDOW_BYTES, WRITE_BYTES_MAX};

/// A primary that is attached to its peer.
#[derive(Debug)]
pub(crate) struct Primary {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    stream: LinkStream,
    wakers: Wakers,
}

#[derive(Debug)]
struct State {
    epoch: u64,
    /// Admitted writes that are not yet on the local disk.
    writing: Vec<Range<u64>>,
    forwarded_writes: u64,
    forwarded_bytes: u64,
    /// What the secondary has acknowledged of them.
    applied_bytes: u64,
    /// A request was turned away and wants to be told when to try again.
    waiting: bool,
    /// `None` when the link is not to be used any more.
    outgoing: Option<Sender<Outgoing>>,
}

/// What the sending thread has to send. The window bounds what is in its queue.
#[derive(Debug)]
enum Outgoing {
    Write { offset: u64, data: Arc<Vec<u8>> },
    Marker,
}

impl Primary {
    /// Starts to serve the link; `epoch` is running.
    ///
    /// # Errors
    /// The link is no socket, or there are no threads.
    pub(crate) fn attach(
        link: OwnedFd,
        epoch: u64,
        events: EventSender,
        wakers: Wakers,
    ) -> io::Result<Arc<Self>> {
        let stream = LinkStream::new(link, events)?;
        let (outgoing, frames) = unbounded();
        let state = State {
            epoch,
            writing: Vec::new(),
            forwarded_writes: 0,
            forwarded_bytes: 0,
            applied_bytes: 0,
            waiting: false,
            outgoing: Some(outgoing),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), stream: stream.clone(), wakers });
        let primary = Arc::new(Self { shared: shared.clone(), threads: Mutex::default() });
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
            primary.threads().push(thread);
            io::Result::Ok(())
        };
        let sender = stream.clone();
        spawn("link-send", Box::new(move || send(sender, epoch, &frames)))?;
        spawn("link-acks", Box::new(move || shared.receive(stream)))?;
        Ok(primary)
    }

    /// Puts a write on the link, if it may go now. Then write it locally and tell with [`Primary::written`]. `false`:
    /// the workers will be woken when it is worth another try.
    pub(crate) fn admit(&self, offset: u64, data: &Arc<Vec<u8>>) -> bool {
        let bytes = data.len() as u64;
        let range = offset..offset + bytes;
        let mut state = self.shared.lock();
        let under_way = state.forwarded_bytes - state.applied_bytes;
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let admitted = match &state.outgoing {
            Some(outgoing) if under_way + bytes <= WINDOW_BYTES && !state.writing.iter().any(overlaps) => {
                outgoing.send(Outgoing::Write { offset, data: data.clone() }).is_ok()
            }
            _ => false,
        };
        if admitted {
            state.writing.push(range);
            state.forwarded_writes += 1;
            state.forwarded_bytes += bytes;
        } else {
            state.waiting = true;
        }
        admitted
    }

    /// An admitted write has ended on the local disk, well or badly.
    pub(crate) fn written(&self, offset: u64, bytes: u64) {
        let mut state = self.shared.lock();
        let ended = offset..offset + bytes;
        if let Some(at) = state.writing.iter().position(|range| *range == ended) {
            state.writing.swap_remove(at);
        }
        self.shared.wake(&mut state);
    }

    /// Ends `epoch` on the link. A link that is lost is told by an event, to a controller that may not have heard it yet;
    /// its marker goes the way of all that is sent there.
    ///
    /// # Errors
    /// Another epoch is running.
    pub(crate) fn marker(&self, epoch: u64) -> Result<(), String> {
        let mut state = self.shared.lock();
        if state.epoch != epoch {
            return Err(format!("Marker for epoch {epoch}, epoch {} is running", state.epoch));
        }
        if let Some(outgoing) = &state.outgoing {
            // fails only when the link is lost
            let _ = outgoing.send(Outgoing::Marker);
        }
        state.epoch += 1;
        Ok(())
    }

    /// The peer has committed `epoch`. Nothing is held back here.
    ///
    /// # Errors
    /// It is not the epoch whose marker was sent last.
    pub(crate) fn commit(&self, epoch: u64) -> Result<(), String> {
        let state = self.shared.lock();
        if epoch.checked_add(1) != Some(state.epoch) {
            return Err(format!("Commit of epoch {epoch}, but epoch {} is running", state.epoch));
        }
        Ok(())
    }

    /// Ends the link and its threads. Writes that wait go on waiting until the workers have another mode.
    pub(crate) fn detach(&self) {
        self.shared.lock().outgoing = None;
        self.shared.stream.close();
        for thread in self.threads().drain(..) {
            drop(thread.join());
        }
    }

    pub(crate) fn status(&self) -> Value {
        let state = self.shared.lock();
        json!({
            "epoch": state.epoch,
            "forwarded_writes": state.forwarded_writes,
            "forwarded_bytes": state.forwarded_bytes,
            "link_queue_bytes": state.forwarded_bytes - state.applied_bytes,
            "link_queue_bytes_max": WINDOW_BYTES,
            "link_lost": self.shared.stream.is_closed(),
        })
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        if std::mem::take(&mut state.waiting) {
            self.wakers.wake();
        }
    }

    /// The thread that takes acknowledgements until the link ends.
    fn receive(&self, mut stream: LinkStream) {
        let mut payload = Vec::new();
        let reason = loop {
            let header = match read_frame(&mut stream, &mut payload) {
                Ok(header) => header,
                Err(error) => break error.to_string(),
            };
            match Message::parse(&header, &payload) {
                Ok(Message::Applied { bytes }) => {
                    let mut state = self.lock();
                    if bytes < state.applied_bytes || bytes > state.forwarded_bytes {
                        break format!("The peer acknowledges {bytes} bytes, which cannot be");
                    }
                    state.applied_bytes = bytes;
                    self.wake(&mut state);
                }
                Ok(_) => break "The secondary sent what only a primary sends".into(),
                Err(error) => break error.to_string(),
            }
        };
        // from here on nothing is admitted
        self.lock().outgoing = None;
        self.stream.lost(reason);
    }
}

/// The thread that sends until nobody gives it more, or the link fails.
fn send(mut stream: LinkStream, mut epoch: u64, frames: &Receiver<Outgoing>) {
    for frame in frames {
        let sent = match frame {
            Outgoing::Write { offset, data } => data
                .chunks(WRITE_BYTES_MAX)
                .zip((offset..).step_by(WRITE_BYTES_MAX))
                .try_for_each(|(data, offset)| Message::Write { offset, data }.send(&mut stream, epoch)),
            Outgoing::Marker => {
                epoch += 1;
                Message::Marker.send(&mut stream, epoch - 1)
            }
        };
        if let Err(error) = sent {
            // the receiving thread sees the end as well and closes the queue
            return stream.lost(format!("The link failed: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn attached() -> (Arc<Primary>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let primary = Primary::attach(ours.into(), 1, EventSender::default(), Wakers(Vec::new())).unwrap();
        (primary, theirs)
    }

    fn data(sectors: usize) -> Arc<Vec<u8>> {
        Arc::new(vec![1; sectors * 512])
    }

    #[test]
    fn a_write_that_overlaps_one_on_its_way_waits_for_it() {
        let (primary, _peer) = attached();
        assert!(primary.admit(1024, &data(4)));
        assert!(primary.admit(0, &data(2)) && primary.admit(3072, &data(1)), "neighbours do not overlap");
        for (offset, sectors) in [(1024, 4), (512, 2), (2560, 1), (0, 20)] {
            assert!(!primary.admit(offset, &data(sectors)), "{sectors} sectors at {offset}");
        }
        assert!(primary.shared.lock().waiting);
        primary.written(1024, 2048);
        assert!(!primary.shared.lock().waiting);
        assert!(primary.admit(1536, &data(2)));
    }

    #[test]
    fn acknowledgements_open_the_window_and_false_ones_end_the_link() {
        let (primary, mut peer) = attached();
        let most = Arc::new(vec![0; WINDOW_BYTES as usize]);
        assert!(primary.admit(0, &most));
        assert!(!primary.admit(WINDOW_BYTES, &data(1)));
        Message::Applied { bytes: 512 }.send(&mut peer, 0).unwrap();
        while primary.shared.lock().applied_bytes == 0 {
            std::thread::yield_now();
        }
        assert!(primary.admit(WINDOW_BYTES, &data(1)));
        Message::Applied { bytes: WINDOW_BYTES + 513 }.send(&mut peer, 0).unwrap();
        while !primary.shared.stream.is_closed() {
            std::thread::yield_now();
        }
        assert!(!primary.admit(2 * WINDOW_BYTES, &data(1)));
        primary.marker(1).unwrap();
        assert!(primary.marker(1).is_err());
    }
}
