//! The primary's half of a checkpoint.

use std::io::Read;
use std::net::TcpStream;

use super::record::{PrimarySteps, Record, SecondarySteps, Stopwatch};
use super::stream::UringStream;
use super::wire::{
    BEGIN, COMMITTED, DEVICES, DEVICES_BYTES_MAX, DIGESTS, END, GOODBYE, PAGES, PAGES_MAX, RESUMED,
    STEP_DOWN, Tally, VERIFIED, WANTED, page_numbers,
};
use super::{CheckpointError, Devices, crash_point};
use crate::link::{read_frame, write_frame};
use crate::memory::{PAGE_BYTES, PageSet};
use crate::vm::{RamBlock, Vm};

/// Something that the secondary says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The checkpoint is committed.
    Committed {
        /// Its number.
        epoch: u64,
    },
    /// Digests of consecutive pages, for `--verify`.
    Digests {
        /// The first page.
        first: u64,
        /// One digest a page.
        digests: Vec<u64>,
    },
    /// The secondary's VM runs again: the next checkpoint may begin.
    Resumed {
        /// The checkpoint's number.
        epoch: u64,
        /// What it cost there.
        steps: SecondarySteps,
    },
    /// The secondary needs a checkpoint.
    Wanted {
        /// One word for the statistics.
        cause: String,
        /// For the operator.
        detail: String,
    },
    /// The secondary has claimed the next generation and waits for this side to let go.
    StepDown,
    /// The secondary leaves in order.
    Goodbye(String),
    /// The connection has ended or carried nonsense.
    Lost(String),
}

/// What the primary hears while it takes a checkpoint.
pub trait Hearing {
    /// Waits for the secondary's next reply.
    ///
    /// # Errors
    /// The secondary is lost or takes too long.
    fn reply(&mut self) -> Result<Reply, CheckpointError>;

    /// The output is released and the VM still paused: whatever this side's back ends have wished until now they have.
    fn wishes_are_met(&mut self);
}

/// Reads what the secondary says until the connection ends; the last call is with [`Reply::Lost`].
pub fn read_replies(mut stream: impl Read, mut on_reply: impl FnMut(Reply)) {
    let mut payload = Vec::new();
    let lost = loop {
        let header = match read_frame(&mut stream, &mut payload) {
            Ok(header) => header,
            Err(error) => break error.to_string(),
        };
        let epoch = header.epoch;
        on_reply(match header.kind {
            COMMITTED => Reply::Committed { epoch },
            RESUMED => match serde_json::from_slice(&payload) {
                Ok(steps) => Reply::Resumed { epoch, steps },
                Err(error) => break format!("a malformed report: {error}"),
            },
            DIGESTS if payload.len() % 8 == 0 && !payload.is_empty() => {
                let mut numbers = page_numbers(&payload);
                let first = numbers.next().unwrap_or_default();
                Reply::Digests { first, digests: numbers.collect() }
            }
            WANTED => {
                let text = String::from_utf8_lossy(&payload);
                let (cause, detail) = text.split_once('\n').unwrap_or((&text, ""));
                Reply::Wanted { cause: cause.into(), detail: detail.into() }
            }
            STEP_DOWN => Reply::StepDown,
            GOODBYE => Reply::Goodbye(String::from_utf8_lossy(&payload).into_owned()),
            kind => break format!("an unknown message, kind {kind}"),
        });
    };
    on_reply(Reply::Lost(lost));
}

/// Sends checkpoints. Lives on the thread that drives the VM.
pub struct Primary {
    out: UringStream,
    /// The epoch that runs; the next checkpoint ends it.
    epoch: u64,
    verify: bool,
    dirty: PageSet,
    state: Vec<u8>,
    frame: Vec<u8>,
}

impl Primary {
    /// Prepares for a VM of so many pages.
    ///
    /// # Errors
    /// io_uring cannot be used.
    pub fn new(link: TcpStream, pages: u64, verify: bool) -> std::io::Result<Self> {
        Ok(Self {
            out: UringStream::new(link)?,
            epoch: 0,
            verify,
            dirty: PageSet::new(pages),
            state: Vec::new(),
            frame: Vec::with_capacity(PAGES_MAX * (8 + PAGE_BYTES) + 4),
        })
    }

    /// The epoch that runs.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes one checkpoint and lets the VM run on.
    ///
    /// The checkpoint of epoch 0 synchronises everything; the VM is already paused then.
    ///
    /// # Errors
    /// After an error the VM is paused, or half way to it, and the caller decides how it goes on.
    pub fn checkpoint(
        &mut self,
        vm: &mut dyn Vm,
        devices: &mut dyn Devices,
        cause: &str,
        hearing: &mut dyn Hearing,
    ) -> Result<Record, CheckpointError> {
        let epoch = self.epoch;
        let mut steps = PrimarySteps::default();
        let mut watch = Stopwatch::start();
        // The secondary pauses while we do.
        write_frame(&mut self.out, BEGIN, epoch, &[cause.as_bytes()])?;
        crash_point("begin");
        if epoch > 0 {
            vm.pause()?;
        }
        steps.stop_us = watch.step_us();
        crash_point("paused");
        devices.marker(epoch)?;
        steps.marker_us = watch.step_us();
        crash_point("marked");
        vm.save_devices(&mut self.state)?;
        steps.save_us = watch.step_us();
        crash_point("saved");
        self.dirty.clear();
        devices.take_dirty(&mut self.dirty);
        if epoch == 0 {
            vm.start_tracking(&mut self.dirty)?;
        } else {
            vm.take_dirty(&mut self.dirty)?;
        }
        steps.dirty_us = watch.step_us();
        let pages = self.dirty.len();
        self.send(vm)?;
        steps.send_us = watch.step_us();
        crash_point("sent");
        match hearing.reply()? {
            Reply::Committed { epoch: of } if of == epoch => {}
            other => {
                return Err(CheckpointError::Peer(format!("{other:?} instead of its commit of {epoch}")));
            }
        }
        steps.commit_us = watch.step_us();
        crash_point("committed");
        if self.verify {
            self.compare(vm, hearing)?;
            write_frame(&mut self.out, VERIFIED, epoch, &[])?;
            steps.verify_us = watch.step_us();
        }
        devices.commit(epoch)?;
        steps.release_us = watch.step_us();
        crash_point("released");
        hearing.wishes_are_met();
        vm.resume()?;
        steps.resume_us = watch.step_us();
        self.epoch += 1;
        Ok(Record {
            epoch,
            cause: cause.to_owned(),
            pause_us: watch.total_us(),
            pages,
            device_bytes: self.state.len() as u64,
            primary: steps,
            secondary: None,
        })
    }

    /// Tells the secondary that protection ends in order.
    ///
    /// # Errors
    /// The connection is gone, which comes to the same.
    pub fn goodbye(&mut self, why: &str) -> std::io::Result<()> {
        write_frame(&mut self.out, GOODBYE, self.epoch, &[why.as_bytes()])
    }

    fn send(&mut self, vm: &dyn Vm) -> Result<(), CheckpointError> {
        let mut tally = Tally::default();
        let mut pages = self.dirty.iter();
        let mut batch = Vec::with_capacity(PAGES_MAX);
        let mut sent = 0;
        loop {
            batch.clear();
            batch.extend(pages.by_ref().take(PAGES_MAX));
            if batch.is_empty() {
                break;
            }
            self.frame.clear();
            self.frame.extend_from_slice(&(batch.len() as u32).to_be_bytes());
            for page in &batch {
                self.frame.extend_from_slice(&page.to_be_bytes());
            }
            tally.pages(&self.frame[4..]);
            let contents = self.frame.len();
            self.frame.resize(contents + batch.len() * PAGE_BYTES, 0);
            vm.read_pages(&batch, &mut self.frame[contents..])?;
            write_frame(&mut self.out, PAGES, self.epoch, &[&self.frame])?;
            if sent == 0 {
                crash_point("sending");
            }
            sent += batch.len();
        }
        for piece in self.state.chunks(DEVICES_BYTES_MAX) {
            tally.devices(piece);
            write_frame(&mut self.out, DEVICES, self.epoch, &[piece])?;
        }
        let end = serde_json::to_vec(&tally.end(self.verify)).expect("always JSON");
        write_frame(&mut self.out, END, self.epoch, &[&end])?;
        Ok(())
    }

    /// Compares the digests of all pages with the secondary's.
    fn compare(&mut self, vm: &dyn Vm, hearing: &mut dyn Hearing) -> Result<(), CheckpointError> {
        let ours = digests(vm)?;
        let mut different = Vec::new();
        let mut seen = 0;
        while seen < ours.len() {
            let (first, theirs) = match hearing.reply()? {
                Reply::Digests { first, digests } => (first as usize, digests),
                other => return Err(CheckpointError::Peer(format!("{other:?} instead of its digests"))),
            };
            let Some(ours) = ours.get(first..first + theirs.len()).filter(|_| first == seen) else {
                return Err(CheckpointError::Peer("digests of pages that do not exist".into()));
            };
            let unequal = ours.iter().zip(&theirs).enumerate().filter(|(_, (a, b))| a != b);
            different.extend(unequal.map(|(at, _)| (first + at) as u64));
            seen += theirs.len();
        }
        if different.is_empty() {
            return Ok(());
        }
        let first: Vec<String> =
            different.iter().take(16).map(|page| name_page(vm.ram_blocks(), *page)).collect();
        Err(CheckpointError::Verify {
            epoch: self.epoch,
            count: different.len() as u64,
            pages: first.join(", "),
        })
    }
}

/// One digest for each page of a VM.
pub(super) fn digests(vm: &dyn Vm) -> Result<Vec<u64>, CheckpointError> {
    let pages: Vec<u64> = (0..vm.pages()).collect();
    let mut contents = vec![0; PAGES_MAX * PAGE_BYTES];
    let mut digests = Vec::with_capacity(pages.len());
    for batch in pages.chunks(PAGES_MAX) {
        let contents = &mut contents[..batch.len() * PAGE_BYTES];
        vm.read_pages(batch, contents)?;
        digests.extend(contents.chunks_exact(PAGE_BYTES).map(xxhash_rust::xxh3::xxh3_64));
    }
    Ok(digests)
}

fn name_page(blocks: &[RamBlock], page: u64) -> String {
    match blocks.iter().rev().find(|block| block.first_page <= page) {
        Some(block) => format!("{}+{:#x}", block.name, (page - block.first_page) * PAGE_BYTES as u64),
        None => format!("page {page}"),
    }
}
