//! QEMU's ordinary live migration takes a guest with our disk from host to host, and what the back end writes into the
//! guest's memory meanwhile goes along.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use colo_lab::{BlockBackEnd, Dice, Disk, DiskGuest, DiskGuestImage, INCOMING, Lab, Migration, Side};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("a_guest_migrates_back_and_forth_under_a_write_load", a_guest_migrates_under_load),
        ("the_memory_table_changes_while_a_guest_migrates", the_memory_table_changes_while_a_guest_migrates),
    ])
}

/// One disk that both hosts see, and where the guest is.
struct World {
    lab: Lab,
    image: DiskGuestImage,
    disk: Disk,
    guest: DiskGuest,
    side: Side,
}

impl World {
    fn boot() -> Result<Self> {
        let lab = Lab::build()?;
        let image = DiskGuestImage::make()?;
        let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
        let back_end = BlockBackEnd::start(lab.host(Side::A), "disk", &disk, &["--queues", "4"])?;
        let guest = DiskGuest::boot(lab.host(Side::A), &image, back_end)?;
        Ok(Self { lab, image, disk, guest, side: Side::A })
    }

    /// A QEMU on the other host, with a back end of its own on the same image, that waits for the guest.
    fn destination(&self) -> Result<(DiskGuest, String)> {
        let side = self.side.other();
        let options = [&["--queues", "4"], INCOMING].concat();
        let back_end = BlockBackEnd::start(self.lab.host(side), "disk", &self.disk, &options)?;
        let uri = format!("tcp:{}:4444", side.link_address());
        Ok((DiskGuest::await_from(self.lab.host(side), &self.image, back_end, &uri)?, uri))
    }

    /// Migrates; what `meanwhile` does comes between the first pass over the guest's memory and the switch.
    fn migrate(&mut self, meanwhile: impl FnOnce(&mut DiskGuest) -> Result<()>) -> Result<()> {
        let (mut destination, uri) = self.destination()?;
        let mut migration = Migration::begin(&mut self.guest, &uri)?;
        meanwhile(migration.guest())?;
        let info = migration.finish(&mut destination)?;
        println!(
            "  {} passes, {} MiB in {} ms, {} ms of them without the guest",
            info["ram"]["dirty-sync-count"],
            info["ram"]["transferred"].as_u64().unwrap_or(0) >> 20,
            info["total-time"],
            info["downtime"]
        );
        self.guest = destination;
        self.side = self.side.other();
        Ok(())
    }

    /// Begins to migrate, and thinks better of it.
    fn cancel(&mut self, meanwhile: impl FnOnce(&mut DiskGuest) -> Result<()>) -> Result<()> {
        // this QEMU ends when the migration is cancelled
        let (_destination, uri) = self.destination()?;
        let mut migration = Migration::begin(&mut self.guest, &uri)?;
        meanwhile(migration.guest())?;
        migration.cancel()
    }
}

/// Files of the guest, read from the disk into its page cache at one time and looked at, in memory, at another.
struct Cached {
    sums: String,
}

impl Cached {
    const FILES: &str = "/data/cached0 /data/cached1 /data/cached2";

    /// Puts random data on the disk.
    fn write(guest: &mut DiskGuest) -> Result<Self> {
        guest.run(&format!(
            "for file in {}; do dd if=/dev/urandom of=$file bs=64k count=160 conv=fsync 2>/dev/null || exit 1; done",
            Self::FILES
        ))?;
        Ok(Self { sums: guest.run(&format!("md5sum {}", Self::FILES))? })
    }

    /// Has the disk write them into memory, where nothing but the disk has put them.
    fn read(guest: &mut DiskGuest) -> Result<()> {
        guest.run("sync; echo 1 >/proc/sys/vm/drop_caches")?;
        let before = sectors_read(guest)?;
        guest.run(&format!("cat {} >/dev/null", Self::FILES))?;
        let bytes = (sectors_read(guest)? - before) * 512;
        ensure!(bytes >= 3 * (160 << 16), "Only {bytes} bytes came from the disk");
        Ok(())
    }

    /// That memory holds what is on the disk. Nobody else may read from the disk meanwhile.
    fn verify(&self, guest: &mut DiskGuest) -> Result<()> {
        let before = sectors_read(guest)?;
        let sums = guest.run(&format!("md5sum {}", Self::FILES))?;
        let again = sectors_read(guest)? - before;
        ensure!(again < 2048, "{again} sectors came from the disk again, memory was not looked at");
        ensure!(
            sums == self.sums,
            "The guest's memory holds something else than the disk put there:\n{sums}\ninstead of\n{}",
            self.sums
        );
        Ok(())
    }
}

fn sectors_read(guest: &mut DiskGuest) -> Result<u64> {
    guest.run("set -- $(cat /sys/block/vda/stat); echo $3")?.parse().context("The guest's block statistics")
}

/// `COLO_TEST_ROUNDS` says how often; in one of the rounds the first attempt is cancelled.
fn a_guest_migrates_under_load() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let cancelled = Dice::announced().within(0..rounds);
    let mut world = World::boot()?;
    let cached = Cached::write(&mut world.guest)?;
    for round in 0..rounds {
        let mut migrated = || -> Result<u64> {
            world.guest.start_load()?;
            if round == cancelled {
                world.cancel(Cached::read).context("The migration that is cancelled")?;
            }
            world.migrate(Cached::read)?;
            let generation = world.guest.stop_load()?;
            cached.verify(&mut world.guest)?;
            world.guest.ensure_no_complaint()?;
            Ok(generation)
        };
        let generations = migrated().with_context(|| format!("Round {round}"))?;
        println!("round {round}: {generations} generations written and verified");
    }
    world.guest.end()?;
    world.disk.check()
}

/// As a table of other regions comes while the back end logs and is busy.
fn the_memory_table_changes_while_a_guest_migrates() -> Result<()> {
    let mut world = World::boot()?;
    let cached = Cached::write(&mut world.guest)?;
    world.guest.start_load()?;
    world.migrate(|guest| {
        for _ in 0..5 {
            for mapped in [false, true] {
                let before = guest.back_end.guest_mappings()?;
                guest.map_window(mapped)?;
                let after = guest.back_end.guest_mappings()?;
                ensure!(after != before, "The back end has {after} pieces of guest memory as before");
            }
        }
        guest.map_window(false)?;
        Cached::read(guest)
    })?;
    world.guest.stop_load()?;
    cached.verify(&mut world.guest)?;
    world.guest.end()?;
    world.disk.check()
}
