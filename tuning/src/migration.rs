//! QEMU's ordinary live migration, step by step.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::DiskGuest;

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
/// on at the source until [`Migration::finish`].
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
        let passes = |info: &Value| info["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let remaining = |info: &Value| info["ram"]["remaining"].as_u64().unwrap_or(u64::MAX);
        migration.until("first pass", |info| {
            passes(info) >= 2 || passes(info) == 1 && remaining(info) < 64 << 20
        })?;
        migration.set("max-bandwidth", CALM_BYTES_PER_S)?;
        migration.until("second pass", |info| passes(info) >= 2)?;
        migration.set("max-bandwidth", SLOW_BYTES_PER_S)?;
        Ok(migration)
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

    /// Lets the guest go over to `destination`, and returns when it runs there.
    ///
    /// # Errors
    /// QEMU fails or hangs.
    pub fn finish(mut self, destination: &mut DiskGuest) -> Result<Value> {
        self.set("downtime-limit", 2000)?;
        self.set("max-bandwidth", 4 * FAST_BYTES_PER_S)?;
        let info = self.until("end", |info| info["status"] == "completed")?;
        let deadline = Instant::now() + LIMIT;
        while destination.command("query-status", Value::Null)?["status"] != "running" {
            ensure!(Instant::now() < deadline, "The guest does not run at its destination");
            thread::sleep(Duration::from_millis(5));
        }
        destination.run(NOT_DIRTYING)?;
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
