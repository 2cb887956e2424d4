//! QEMU's ordinary live migration takes a guest with our disk from host to host, and what the back end writes into the
//! guest's memory meanwhile goes along.
//!
//! That is seen in the guest's memory, before the guest runs on: both QEMUs have stopped then. Only what the disk has
//! written must be there by our doing. QEMU 7.2 itself loses what emulated CPUs write, with its own virtio-blk as with us;
//! such pages are put right before the guest runs on (`DiskGuest::go_on`), except that it loses most when the guest
//! reboots meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use colo_lab::{BackEnd, Dice, Disk, DiskGuest, DiskGuestImage, INCOMING, Lab, Migration, Side};

const PAGE_BYTES: usize = 4096;

fn main() -> ExitCode {
    colo_tests::run(&[
        ("a_guest_migrates_back_and_forth_under_a_write_load", a_guest_migrates_under_load),
        ("the_memory_table_changes_while_a_guest_migrates", the_memory_table_changes_while_a_guest_migrates),
        ("a_guest_reboots_while_it_migrates", a_guest_reboots_while_it_migrates),
    ])
}

/// One disk that both hosts see, and where the guest is.
struct World {
    lab: Lab,
    image: DiskGuestImage,
    disk: Disk,
    known: Known,
    guest: DiskGuest,
    side: Side,
}

impl World {
    fn boot() -> Result<Self> {
        let lab = Lab::build()?;
        let image = DiskGuestImage::make()?;
        let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
        let known = Known::write(&disk)?;
        let back_end = BackEnd::block(lab.host(Side::A), "disk", &disk, &["--queues", "4"])?;
        let guest = DiskGuest::boot(lab.host(Side::A), &image, back_end)?;
        Ok(Self { lab, image, disk, known, guest, side: Side::A })
    }

    /// A QEMU on the other host, with a back end of its own on the same image, that waits for the guest.
    fn destination(&self) -> Result<(DiskGuest, String)> {
        let side = self.side.other();
        let options = [&["--queues", "4"], INCOMING].concat();
        let back_end = BackEnd::block(self.lab.host(side), "disk", &self.disk, &options)?;
        let uri = format!("tcp:{}:4444", side.link_address());
        Ok((DiskGuest::await_from(self.lab.host(side), &self.image, back_end, None, &uri)?, uri))
    }

    /// Migrates. What `meanwhile` does comes between the first pass over the guest's memory and the switch, and so does
    /// then what the disk writes into memory and must be found at the destination. Returns the guest there, which does
    /// not run yet.
    fn arrive(&mut self, meanwhile: impl FnOnce(&mut Migration) -> Result<()>) -> Result<DiskGuest> {
        let (mut destination, uri) = self.destination()?;
        let mut migration = Migration::begin(&mut self.guest, &uri)?;
        meanwhile(&mut migration)?;
        Known::read(migration.guest())?;
        let info = migration.arrive(&mut destination)?;
        println!(
            "  {} passes, {} MiB in {} ms, {} ms of them without the guest",
            info["ram"]["dirty-sync-count"],
            info["ram"]["transferred"].as_u64().unwrap_or(0) >> 20,
            info["total-time"],
            info["downtime"]
        );
        self.known.ensure_arrived(&self.guest.memory()?, &destination.memory()?)?;
        Ok(destination)
    }

    /// As [`World::arrive`], and then the guest runs on over there.
    fn migrate(&mut self, meanwhile: impl FnOnce(&mut Migration) -> Result<()>) -> Result<()> {
        let mut destination = self.arrive(meanwhile)?;
        let mended = destination.go_on(&mut self.guest, |_| false)?;
        println!("  {mended} pages that QEMU had lost");
        self.guest = destination;
        self.side = self.side.other();
        Ok(())
    }

    /// Begins to migrate, and thinks better of it.
    fn cancel(&mut self) -> Result<()> {
        // this QEMU ends when the migration is cancelled
        let (_destination, uri) = self.destination()?;
        let mut migration = Migration::begin(&mut self.guest, &uri)?;
        Known::read(migration.guest())?;
        migration.cancel()
    }
}

/// A part of the disk that nobody writes to, no two pages of which are the same.
struct Known {
    content: Vec<u8>,
    /// Where in it, by the first bytes of each page.
    pages: HashMap<[u8; 8], usize>,
}

impl Known {
    const MIB: usize = 16;
    /// Behind all that `generation` writes.
    const AT_MIB: usize = 112;

    fn write(disk: &Disk) -> Result<Self> {
        let content = Dice::new(1).bytes(Self::MIB << 20);
        disk.write_raw(&content, (Self::AT_MIB << 20) as u64)?;
        let starts = (0..content.len()).step_by(PAGE_BYTES);
        let pages: HashMap<_, _> = starts.map(|at| (first_bytes(&content[at..]), at)).collect();
        ensure!(pages.len() == content.len() / PAGE_BYTES, "Two pages begin alike");
        Ok(Self { content, pages })
    }

    /// Has the disk write it into the guest's page cache, into memory that nobody else writes to.
    fn read(guest: &mut DiskGuest) -> Result<()> {
        guest.run("sync; echo 1 >/proc/sys/vm/drop_caches")?;
        let before = sectors_read(guest)?;
        let (skip, count) = (Self::AT_MIB, Self::MIB);
        guest.run(&format!("dd if=/dev/vda of=/dev/null bs=1M skip={skip} count={count} 2>/dev/null"))?;
        let bytes = (sectors_read(guest)? - before) * 512;
        ensure!(bytes >= (Self::MIB as u64) << 20, "Only {bytes} bytes came from the disk");
        Ok(())
    }

    /// That what the disk has written into a guest's memory at the source is in the same place at the destination.
    fn ensure_arrived(&self, source: &File, destination: &File) -> Result<()> {
        let (mut here, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let (mut found, mut lost) = (0, Vec::new());
        for start in (0..source.metadata()?.len()).step_by(here.len()) {
            source.read_exact_at(&mut here, start)?;
            destination.read_exact_at(&mut there, start)?;
            for (index, (page, arrived)) in here.chunks(PAGE_BYTES).zip(there.chunks(PAGE_BYTES)).enumerate()
            {
                let Some(at) = self.pages.get(&first_bytes(page)) else { continue };
                if page == &self.content[*at..][..PAGE_BYTES] {
                    found += 1;
                    if arrived != page {
                        lost.push(start + (index * PAGE_BYTES) as u64);
                    }
                }
            }
        }
        let all = self.pages.len();
        ensure!(found >= all, "Only {found} of {all} pages of the disk are in the guest's memory");
        ensure!(
            lost.is_empty(),
            "{} pages that the disk wrote were not sent: {:x?}",
            lost.len(),
            &lost[..lost.len().min(20)]
        );
        Ok(())
    }
}

fn first_bytes(page: &[u8]) -> [u8; 8] {
    page[..8].try_into().expect("a page is longer")
}

fn sectors_read(guest: &mut DiskGuest) -> Result<u64> {
    guest.run("set -- $(cat /sys/block/vda/stat); echo $3")?.parse().context("The guest's block statistics")
}

/// `COLO_TEST_ROUNDS` says how often; in one of the rounds the first attempt is cancelled.
fn a_guest_migrates_under_load() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let cancelled = Dice::announced().within(0..rounds);
    let mut world = World::boot()?;
    for round in 0..rounds {
        let mut migrated = || -> Result<u64> {
            world.guest.start_load()?;
            if round == cancelled {
                world.cancel().context("The migration that is cancelled")?;
            }
            world.migrate(|_| Ok(()))?;
            let generation = world.guest.stop_load()?;
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
    world.guest.start_load()?;
    world.migrate(|migration| {
        let guest = migration.guest();
        for _ in 0..5 {
            for mapped in [false, true] {
                let before = guest.back_end.guest_mappings()?;
                guest.map_window(mapped)?;
                let after = guest.back_end.guest_mappings()?;
                ensure!(after != before, "The back end has {after} pieces of guest memory as before");
            }
        }
        guest.map_window(false)
    })?;
    world.guest.stop_load()?;
    world.guest.end()?;
    world.disk.check()
}

/// The rings stop and start again while the back end logs, with another log each time, and the firmware changes the
/// memory map. The guest does not run at the destination: QEMU has lost pages of its CPUs then (see above).
fn a_guest_reboots_while_it_migrates() -> Result<()> {
    let mut world = World::boot()?;
    world.guest.write_generation(1)?;
    let mut destination = world.arrive(|migration| {
        migration.guest().reboot()?;
        migration.send_changes()
    })?;
    destination.back_end.ensure_running()?;
    world.guest.back_end.ensure_running()?;
    world.disk.check_after_crash()
}
