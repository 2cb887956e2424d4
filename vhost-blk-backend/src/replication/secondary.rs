//! The secondary's half: the PVM's writes go to the disk, the SVM sees the buffer over it.
//!
//! One lock covers buffer and disk. Whoever reads or writes the SVM's disk or applies a write of the PVM holds it for
//! the whole of it, so the SVM never sees half of a PVM write.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use colo::control::{Event, EventSender};
use serde_json::{Value, json};

use super::Wakers;
use super::stream::LinkStream;
use crate::block_buffer::{BLOCK_BYTES, BlockBuffer, SECTOR_BYTES};
use crate::image::Image;
use crate::wire::Message;

mod inbox;
mod write_back;

use inbox::{Frame, Inbox, Next};

/// Acknowledge at least this often. Far below the window, far above a frame.
const APPLIED_BYTES_STEP: u64 = 4 << 20;

/// A secondary that is, or was, attached to its peer.
#[derive(Debug)]
pub(crate) struct Secondary {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    view: Mutex<View>,
    inbox: Inbox,
    image: Arc<Image>,
    stream: LinkStream,
    events: EventSender,
    wakers: Wakers,
}

/// The disk as the SVM sees it.
#[derive(Debug)]
struct View {
    buffer: BlockBuffer,
    /// A checkpoint was asked for in this epoch.
    wanted: bool,
    applied_writes: u64,
    applied_bytes: u64,
}

impl Secondary {
    /// Starts to serve the link; `epoch` is running.
    ///
    /// # Errors
    /// The link is no socket, or there are no threads.
    pub(crate) fn attach(
        link: OwnedFd,
        epoch: u64,
        image: Arc<Image>,
        buffer_bytes: usize,
        events: EventSender,
        wakers: Wakers,
    ) -> io::Result<Arc<Self>> {
        let stream = LinkStream::new(link, events.clone())?;
        let buffer = BlockBuffer::new(buffer_bytes / BLOCK_BYTES);
        let view = View { buffer, wanted: false, applied_writes: 0, applied_bytes: 0 };
        let inbox = Inbox::new(epoch);
        let shared =
            Arc::new(Shared { view: Mutex::new(view), inbox, image, stream: stream.clone(), events, wakers });
        let secondary = Arc::new(Self { shared: shared.clone(), threads: Mutex::default() });
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
            secondary.threads().push(thread);
            io::Result::Ok(())
        };
        let (receiver, to_receive) = (shared.clone(), stream.clone());
        spawn("link-receive", Box::new(move || receiver.receive(to_receive)))?;
        spawn("link-apply", Box::new(move || shared.apply_all(stream)))?;
        Ok(secondary)
    }

    /// Reads what the SVM has at `offset`.
    ///
    /// # Errors
    /// What the disk says.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let sector = offset / SECTOR_BYTES as u64;
        let view = self.shared.lock();
        if !view.buffer.covers(sector, data.len()) {
            self.shared.image.read_at(data, offset)?;
        }
        view.buffer.overlay(sector, data);
        Ok(())
    }

    /// Writes for the SVM. `false`: the buffer is full; the workers will be woken when it is worth another try.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> bool {
        let sector = offset / SECTOR_BYTES as u64;
        let mut view = self.shared.lock();
        let room = view.buffer.has_room(sector, data.len());
        if room {
            view.buffer.write(sector, data);
        }
        self.shared.want_checkpoint(&mut view, !room);
        room
    }

    /// `epoch` is committed: what the disk holds is what the SVM sees.
    ///
    /// # Errors
    /// The marker of that epoch has not arrived.
    pub(crate) fn commit(&self, epoch: u64) -> Result<(), String> {
        self.shared.inbox.commit(epoch, || {
            let mut view = self.shared.lock();
            view.buffer.clear();
            view.wanted = false;
        })?;
        self.shared.wakers.wake();
        Ok(())
    }

    /// Ends the link and its threads; nothing is applied any more. The SVM's view stays.
    pub(crate) fn detach(&self) {
        self.shared.inbox.stop();
        self.shared.stream.close();
        for thread in self.threads().drain(..) {
            drop(thread.join());
        }
    }

    /// Writes to the disk what the SVM sees. Afterwards the buffer is empty.
    ///
    /// # Errors
    /// What the disk says; the buffer is then as it was, and it may be tried again.
    ///
    /// # Panics
    /// While attached.
    pub(crate) fn write_back(&self) -> io::Result<()> {
        assert!(self.threads().is_empty(), "detach comes before write-back");
        let mut view = self.shared.lock();
        write_back::write_back(&view.buffer, &self.shared.image)?;
        view.buffer.clear();
        Ok(())
    }

    pub(crate) fn status(&self) -> Value {
        let (epoch, inbox_bytes) = self.shared.inbox.status();
        let view = self.shared.lock();
        let (active, hidden) = view.buffer.sectors();
        json!({
            "epoch": epoch,
            "applied_writes": view.applied_writes,
            "applied_bytes": view.applied_bytes,
            "link_queue_bytes": inbox_bytes,
            "link_lost": self.shared.stream.is_closed(),
            "buffer_blocks": view.buffer.blocks(),
            "buffer_bytes": view.buffer.blocks() * BLOCK_BYTES,
            "buffer_bytes_max": view.buffer.blocks_max() * BLOCK_BYTES,
            "buffer_bytes_high_water": view.buffer.blocks_high_water() * BLOCK_BYTES,
            "buffer_active_bytes": active * SECTOR_BYTES as u64,
            "buffer_hidden_bytes": hidden * SECTOR_BYTES as u64,
        })
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Secondary {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a checkpoint, once an epoch, when the buffer is nearly full or somebody waits for it.
    fn want_checkpoint(&self, view: &mut View, waits: bool) {
        let (blocks, most) = (view.buffer.blocks(), view.buffer.blocks_max());
        if (waits || blocks > most / 4 * 3) && !std::mem::replace(&mut view.wanted, true) {
            let detail = format!("The block buffer holds {blocks} of {most} blocks");
            self.events.send(&Event::CheckpointWanted { cause: "buffer".into(), detail });
        }
    }

    /// The thread that reads the link until it ends. It never waits for the disk: the primary's window bounds what
    /// piles up here.
    fn receive(&self, mut stream: LinkStream) {
        let mut payload = Vec::new();
        let reason = loop {
            let header = match colo::link::read_frame(&mut stream, &mut payload) {
                Ok(header) => header,
                Err(error) => break error.to_string(),
            };
            let frame = match Message::parse(&header, &payload) {
                Ok(Message::Write { offset, data }) => {
                    if !self.image.holds(offset, data.len() as u64) {
                        break format!(
                            "The peer writes {} bytes at {offset}, past the end of our disk",
                            data.len()
                        );
                    }
                    Frame::Write { offset, data: data.to_vec() }
                }
                Ok(Message::Marker) => Frame::Marker,
                Ok(Message::Applied { .. }) => break "The primary sent what only a secondary sends".into(),
                Err(error) => break error.to_string(),
            };
            if let Err(reason) = self.inbox.push(header.epoch, frame) {
                break reason;
            }
        };
        self.inbox.end(reason);
    }

    /// The thread that applies what was read, strictly in order.
    fn apply_all(&self, mut stream: LinkStream) {
        let mut acknowledged = 0;
        loop {
            let has_room = |offset: u64, bytes| self.has_room(offset, bytes);
            match self.inbox.next(has_room) {
                Next::Write { offset, data } => match self.apply(offset, &data) {
                    Ok(applied_bytes) => {
                        let idle = self.inbox.applied(data.len());
                        if idle || applied_bytes - acknowledged >= APPLIED_BYTES_STEP {
                            acknowledged = applied_bytes;
                            let message = Message::Applied { bytes: applied_bytes };
                            // if the link has just ended, the receiving thread tells it
                            drop(message.send(&mut stream, 0));
                        }
                    }
                    Err(error) => {
                        let disk = self.image.path().display();
                        return stream.lost(format!("A write of the peer failed on disk {disk}: {error}"));
                    }
                },
                Next::Marker { epoch } => self.events.send(&Event::Marker { epoch }),
                Next::Ended { reason } => stream.lost(reason),
                Next::Stopped => return,
            }
        }
    }

    fn has_room(&self, offset: u64, bytes: usize) -> bool {
        let mut view = self.lock();
        let room = view.buffer.has_room(offset / SECTOR_BYTES as u64, bytes);
        if !room {
            self.want_checkpoint(&mut view, true);
        }
        room
    }

    /// One write of the PVM: the old content is saved for the SVM, then the disk gets the new.
    fn apply(&self, offset: u64, data: &[u8]) -> io::Result<u64> {
        let sector = offset / SECTOR_BYTES as u64;
        let mut view = self.lock();
        let mut old = Vec::new();
        for run in view.buffer.unsaved(sector, data.len()) {
            old.resize((run.end - run.start) as usize * SECTOR_BYTES, 0);
            self.image.read_at(&mut old, run.start * SECTOR_BYTES as u64)?;
            view.buffer.save(run.start, &old);
        }
        self.image.write_at(data, offset)?;
        view.applied_writes += 1;
        view.applied_bytes += data.len() as u64;
        self.want_checkpoint(&mut view, false);
        Ok(view.applied_bytes)
    }
}
