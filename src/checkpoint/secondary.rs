//! The secondary's half of a checkpoint.

use std::io::Read;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::Cache;
use super::primary::digests;
use super::record::{SecondarySteps, Stopwatch};
use super::stream::UringStream;
use super::wire::{
    BEGIN, COMMITTED, DEVICES, DIGESTS, END, End, GOODBYE, PAGES, PAGES_MAX, RESUMED, STATE_BYTES_MAX,
    STEP_DOWN, Tally, VERIFIED, WANTED, split_pages,
};
use super::{CheckpointError, Devices, crash_point};
use crate::link::{read_frame, write_frame};
use crate::memory::PageSet;
use crate::vm::Vm;

/// Something that the primary says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A checkpoint begins: pause the VM.
    Begin {
        /// Its number.
        epoch: u64,
        /// What asked for it.
        cause: String,
    },
    /// Everything of it has arrived and is in the cache.
    Complete {
        /// Its number.
        epoch: u64,
        /// What does not fit into the cache.
        received: Received,
    },
    /// `--verify` found no difference.
    Verified {
        /// The checkpoint's number.
        epoch: u64,
    },
    /// The primary ends protection, and its VM, in order.
    Goodbye(String),
    /// The connection has ended or carried nonsense.
    Lost(String),
}

/// The part of a checkpoint that is not pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    state: Vec<u8>,
    verify: bool,
}

/// The cache, shared between the thread that receives and the one that applies. The protocol keeps them apart in
/// time: the primary sends nothing between its `END` and the secondary's `RESUMED`.
#[derive(Clone)]
pub struct SharedCache(Arc<Mutex<Cache>>);

impl SharedCache {
    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Receives checkpoints until the connection ends; the last call is with [`Incoming::Lost`].
pub fn read_checkpoints(mut stream: impl Read, cache: &SharedCache, mut on_message: impl FnMut(Incoming)) {
    let lost = receive(&mut stream, cache, &mut on_message);
    on_message(Incoming::Lost(lost));
}

fn receive(stream: &mut impl Read, cache: &SharedCache, on_message: &mut impl FnMut(Incoming)) -> String {
    let mut payload = Vec::new();
    let mut state = Vec::new();
    let mut tally = Tally::default();
    loop {
        let header = match read_frame(stream, &mut payload) {
            Ok(header) => header,
            Err(error) => return error.to_string(),
        };
        let epoch = header.epoch;
        match header.kind {
            BEGIN => {
                state.clear();
                tally = Tally::default();
                on_message(Incoming::Begin { epoch, cause: String::from_utf8_lossy(&payload).into_owned() });
            }
            PAGES => {
                match split_pages(&payload) {
                    Ok((numbers, _)) => tally.pages(numbers),
                    Err(error) => return error.to_string(),
                }
                let mut cache = cache.lock();
                if let Err(error) = cache.receive(&payload) {
                    return error.to_string();
                }
            }
            DEVICES => {
                tally.devices(&payload);
                state.extend_from_slice(&payload);
                if state.len() > STATE_BYTES_MAX {
                    return format!("more than {STATE_BYTES_MAX} bytes of device state");
                }
            }
            END => {
                let end: End = match serde_json::from_slice(&payload) {
                    Ok(end) => end,
                    Err(error) => return format!("a malformed end of a checkpoint: {error}"),
                };
                let counted = tally.end(end.verify);
                if end != counted {
                    return format!("checkpoint {epoch} is incomplete: {end:?} sent, {counted:?} received");
                }
                let received = Received { state: std::mem::take(&mut state), verify: end.verify };
                on_message(Incoming::Complete { epoch, received });
            }
            VERIFIED => on_message(Incoming::Verified { epoch }),
            GOODBYE => on_message(Incoming::Goodbye(String::from_utf8_lossy(&payload).into_owned())),
            kind => return format!("an unknown message, kind {kind}"),
        }
    }
}

/// Applies checkpoints. Lives on the thread that drives the VM.
pub struct Secondary {
    out: UringStream,
    cache: SharedCache,
    pages: PageSet,
    bytes: Vec<u8>,
}

impl Secondary {
    /// Prepares for a VM of so many pages.
    ///
    /// # Errors
    /// io_uring cannot be used, or there is no memory for the cache.
    pub fn new(link: TcpStream, pages: u64) -> std::io::Result<Self> {
        Ok(Self {
            out: UringStream::new(link)?,
            cache: SharedCache(Arc::new(Mutex::new(Cache::new(pages)?))),
            pages: PageSet::new(pages),
            bytes: Vec::new(),
        })
    }

    /// What [`read_checkpoints`] receives into.
    pub fn cache(&self) -> SharedCache {
        self.cache.clone()
    }

    /// Goes through one checkpoint whose `BEGIN` has just arrived.
    ///
    /// `complete` waits until the rest of it and the markers of all devices are here. Up to there nothing has
    /// changed, and an error leaves the old state, paused; [`CheckpointError::Peer`] comes from there only. From then on
    /// it is committed, and an error means that this side's VM is lost, or with `--verify`, unequal.
    ///
    /// # Errors
    /// See above.
    pub fn checkpoint(
        &mut self,
        epoch: u64,
        vm: &mut dyn Vm,
        devices: &mut dyn Devices,
        complete: &mut dyn FnMut() -> Result<Received, CheckpointError>,
        verified: &mut dyn FnMut() -> Result<(), CheckpointError>,
    ) -> Result<SecondarySteps, CheckpointError> {
        let mut steps = SecondarySteps::default();
        let mut watch = Stopwatch::start();
        crash_point("secondary-begin");
        if epoch > 0 {
            vm.pause()?;
        }
        steps.stop_us = watch.step_us();
        crash_point("secondary-paused");
        let received = complete()?;
        steps.receive_us = watch.step_us();
        crash_point("secondary-complete");
        if let Err(error) = write_frame(&mut self.out, COMMITTED, epoch, &[]) {
            // The primary will never know, but all of its state is here: go through with it.
            tracing::warn!("Checkpoint {epoch} is committed, the primary cannot be told: {error}");
        }
        crash_point("secondary-committed");
        self.pages.clear();
        devices.take_dirty(&mut self.pages);
        if epoch == 0 {
            vm.start_tracking(&mut self.pages)?;
        } else {
            vm.take_dirty(&mut self.pages)?;
        }
        steps.dirty_us = watch.step_us();
        self.cache.lock().take_received(&mut self.pages);
        steps.pages = self.copy(vm)?;
        steps.copy_us = watch.step_us();
        crash_point("secondary-copied");
        vm.load_devices(&received.state)?;
        // The load resets the machine first, which may write guest memory.
        self.pages.clear();
        vm.take_dirty(&mut self.pages)?;
        steps.load_pages = self.copy(vm)?;
        steps.load_us = watch.step_us();
        crash_point("secondary-loaded");
        if received.verify {
            match self.send_digests(epoch, vm) {
                Ok(()) => verified()?,
                // Committed is committed: without a primary there is nobody to compare with.
                Err(CheckpointError::Peer(error)) => {
                    tracing::warn!("Checkpoint {epoch} cannot be verified: {error}");
                }
                Err(error) => return Err(error),
            }
            steps.verify_us = watch.step_us();
        }
        devices.commit(epoch)?;
        steps.commit_us = watch.step_us();
        crash_point("secondary-forgotten");
        vm.resume()?;
        steps.resume_us = watch.step_us();
        steps.pause_us = watch.total_us();
        let report = serde_json::to_vec(&steps).expect("always JSON");
        if let Err(error) = write_frame(&mut self.out, RESUMED, epoch, &[&report]) {
            tracing::warn!("Checkpoint {epoch} is applied, the primary cannot be told: {error}");
        }
        Ok(steps)
    }

    /// Asks the primary for a checkpoint.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn ask_checkpoint(&mut self, cause: &str, detail: &str) -> std::io::Result<()> {
        write_frame(&mut self.out, WANTED, 0, &[cause.as_bytes(), b"\n", detail.as_bytes()])
    }

    /// Tells the primary that this side has claimed the VM's next generation.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn ask_step_down(&mut self) -> std::io::Result<()> {
        write_frame(&mut self.out, STEP_DOWN, 0, &[])
    }

    /// Tells the primary that protection ends in order.
    ///
    /// # Errors
    /// The connection is gone, which comes to the same.
    pub fn goodbye(&mut self, why: &str) -> std::io::Result<()> {
        write_frame(&mut self.out, GOODBYE, 0, &[why.as_bytes()])
    }

    /// Copies the pages in `self.pages` from the cache to the VM.
    fn copy(&mut self, vm: &mut dyn Vm) -> Result<u64, CheckpointError> {
        let cache = self.cache.lock();
        let mut pages = self.pages.iter();
        let mut batch = Vec::with_capacity(PAGES_MAX);
        let mut copied = 0;
        loop {
            batch.clear();
            batch.extend(pages.by_ref().take(PAGES_MAX));
            if batch.is_empty() {
                return Ok(copied);
            }
            self.bytes.clear();
            for page in &batch {
                self.bytes.extend_from_slice(cache.page(*page));
            }
            vm.write_pages(&batch, &self.bytes)?;
            copied += batch.len() as u64;
        }
    }

    fn send_digests(&mut self, epoch: u64, vm: &dyn Vm) -> Result<(), CheckpointError> {
        const DIGESTS_MAX: usize = 16 << 10;
        let mut first = 0u64;
        for batch in digests(vm)?.chunks(DIGESTS_MAX) {
            self.bytes.clear();
            self.bytes.extend_from_slice(&first.to_be_bytes());
            for digest in batch {
                self.bytes.extend_from_slice(&digest.to_be_bytes());
            }
            write_frame(&mut self.out, DIGESTS, epoch, &[&self.bytes])?;
            first += batch.len() as u64;
        }
        Ok(())
    }
}
