//! QEMU's ordinary live migration, step by step.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::DiskGuest;

const PAGE_BYTES: usize = 4096;
const FAST_BYTES_PER_S: u64 = 256 << 20;
/// What is dirtied meanwhile takes so long that the passes cannot run away from whoever watches them.
const CALM_BYTES_PER_S: u64 = 16 << 20;
/// Less than [`DIRTYING`] writes: the migration goes on until it is told to end.
const SLOW_BYTES_PER_S: u64 = 1 << 20;
/// Changes 4 MiB of memory without end, for a migration of an idle guest would end by itself.
const DIRTYING: &str = "touch /tmp/migrates; (while [ -e /tmp/migrates ]; do \
    dd if=/dev/zero of=/tmp/dirt bs=64k count=64 conv=notrunc 2>/dev/null; done) >/dev/null 2>&1 &";
const NOT_DIRTYING: &str = "rm -f /tmp/migrates";
const LIMIT: Duration = Duration::from_secs(60);

/// A migration under way: the guest's memory has been sent once, what changes is sent again, slowly, and the guest runs
/// on at the source until [`Migration::arrive`].
#[must_use]
pub struct Migration<'a> {
    source: &'a mut DiskGuest,
}

impl<'a> Migration<'a> {
    /// Starts one to `uri`, where a QEMU waits; returns when all memory has been sent once.
    ///
    /// # Errors
    /// QEMU refuses or fails.
    pub fn begin(source: &'a mut DiskGuest, uri: &str) -> Result<Self> {
        source.run(DIRTYING)?;
        let start = json!({"max-bandwidth": FAST_BYTES_PER_S, "downtime-limit": 1});
        source.command("migrate-set-parameters", start)?;
        source.command("migrate", json!({"uri": uri}))?;
        let mut migration = Self { source };
        let remaining = |info: &Value| info["ram"]["remaining"].as_u64().unwrap_or(u64::MAX);
        migration.until("first pass", |info| {
            passes(info) >= 2 || passes(info) == 1 && remaining(info) < 64 << 20
        })?;
        migration.calmly_until(2)?;
        Ok(migration)
    }

    /// Sends all that has changed in the guest's memory, to begin anew with the changes. For a guest that has rebooted:
    /// what it wrote then would be sent in any case, and hide what else was written to the same pages.
    ///
    /// # Errors
    /// QEMU fails, or the guest does not answer.
    pub fn send_changes(&mut self) -> Result<()> {
        self.source.run(DIRTYING)?;
        // the pass under way takes what changed before it began, the next one all until now
        let now = passes(&self.info()?);
        self.calmly_until(now + 2)
    }

    fn calmly_until(&mut self, pass: u64) -> Result<()> {
        self.set("max-bandwidth", CALM_BYTES_PER_S)?;
        self.until("next pass", |info| passes(info) >= pass)?;
        self.set("max-bandwidth", SLOW_BYTES_PER_S)
    }

    /// The guest, which runs at the source.
    pub fn guest(&mut self) -> &mut DiskGuest {
        self.source
    }

    /// Cancels it; the guest runs on at the source.
    ///
    /// # Errors
    /// QEMU hangs, or the migration had ended otherwise.
    pub fn cancel(mut self) -> Result<()> {
        let before = self.info()?;
        ensure!(before["status"] == "active", "The migration to be cancelled is {}", before["status"]);
        self.source.command("migrate_cancel", Value::Null)?;
        self.until("cancellation", |info| info["status"] == "cancelled")?;
        self.source.run(NOT_DIRTYING).map(drop)
    }

    /// Lets the guest go over to `destination`. Then it has stopped here, is there, and does not run before
    /// [`DiskGuest::go_on`].
    ///
    /// # Errors
    /// QEMU fails or hangs.
    pub fn arrive(mut self, destination: &mut DiskGuest) -> Result<Value> {
        self.set("downtime-limit", 2000)?;
        self.set("max-bandwidth", 4 * FAST_BYTES_PER_S)?;
        let info = self.until("end", |info| info["status"] == "completed")?;
        let deadline = Instant::now() + LIMIT;
        while destination.command("query-status", Value::Null)?["status"] != "paused" {
            ensure!(Instant::now() < deadline, "The guest does not arrive at its destination");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(info)
    }

    fn set(&mut self, parameter: &str, value: u64) -> Result<()> {
        self.source.command("migrate-set-parameters", json!({parameter: value})).map(drop)
    }

    fn info(&mut self) -> Result<Value> {
        self.source.command("query-migrate", Value::Null)
    }

    fn until(&mut self, what: &str, done: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let info = self.info()?;
            if done(&info) {
                return Ok(info);
            }
            if ["failed", "cancelled", "completed"].iter().any(|end| info["status"] == *end) {
                bail!("The migration has come to an end before its {what}: {info}");
            }
            ensure!(Instant::now() < deadline, "No {what} of the migration: {info}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn passes(info: &Value) -> u64 {
    info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

impl DiskGuest {
    /// Runs on after [`Migration::arrive`] from `source`, with what QEMU has lost on the way put right: how many pages.
    ///
    /// While QEMU 7.2 migrates a guest that it emulates, it now and then takes a page that a CPU is just writing to for
    /// one that has not changed (`notdirty_write` against `tlb_reset_dirty`), and the guest's kernel falls over its own
    /// older lists and timers at the destination. Such pages are copied here. What a back end has written must have
    /// come by itself: the used rings, and whatever `by_device` knows. (A used ring is one page here, so that one mark of
    /// several brings all of it: each mark by itself is tested in `src/vhost_user/tests/ring.rs`.)
    ///
    /// # Errors
    /// A page that a back end has written is not there. QEMU refuses, or the guest does not answer.
    pub fn go_on(&mut self, source: &mut DiskGuest, by_device: impl Fn(&[u8]) -> bool) -> Result<usize> {
        let used_rings = source.used_rings()?;
        let (from, to) = (source.memory()?, self.memory()?);
        let (mut here, mut there) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let mut mended = 0;
        for at in (0..from.metadata()?.len()).step_by(PAGE_BYTES) {
            from.read_exact_at(&mut here, at)?;
            to.read_exact_at(&mut there, at)?;
            if here == there {
                continue;
            }
            ensure!(!used_rings.contains(&at), "The used ring at {at:#x} was not sent as it is");
            ensure!(
                !by_device(&here),
                "The page at {at:#x}, which a device has written, was not sent as it is"
            );
            to.write_all_at(&here, at)?;
            mended += 1;
        }
        self.command("cont", Value::Null)?;
        self.run(NOT_DIRTYING)?;
        Ok(mended)
    }

    /// The pages of the used rings, which nobody but the devices writes to.
    fn used_rings(&mut self) -> Result<Vec<u64>> {
        let devices = self.command("x-query-virtio", Value::Null)?;
        let mut pages = Vec::new();
        for device in devices.as_array().context("QEMU's virtio devices")? {
            let path = &device["path"];
            let count = self.command("x-query-virtio-status", json!({"path": path}))?["num-vqs"].clone();
            for queue in 0..count.as_u64().context("The number of queues")? {
                let queue = json!({"path": path, "queue": queue});
                let ring = self.command("x-query-virtio-queue-status", queue)?;
                if let Some(used) = ring["vring-used"].as_u64().filter(|&used| used != 0) {
                    pages.push(used / PAGE_BYTES as u64 * PAGE_BYTES as u64);
                }
            }
        }
        ensure!(!pages.is_empty(), "The guest has no used ring: {devices}");
        Ok(pages)
    }
}
