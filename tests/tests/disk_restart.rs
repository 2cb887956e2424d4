//! The block back end dies and starts again, and the guest does not notice more than a pause.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::{BackEnd, Dice, Disk, DiskGuest, DiskGuestImage, Lab, Side};

/// QEMU tries once a second to connect again.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    colo_tests::run(&[
        ("kill_9_of_the_back_end_under_load_loses_nothing", kill_9_under_load),
        ("a_write_cache_that_the_guest_switched_off_stays_off", a_write_cache_stays_off),
    ])
}

/// At random moments; `COLO_TEST_ROUNDS` says how often.
fn kill_9_under_load() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let mut dice = Dice::announced();
    let lab = Lab::build()?;
    let host = lab.host(Side::A);
    let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
    let back_end = BackEnd::block(host, "disk", &disk, &["--queues", "4"])?;
    let mut guest = DiskGuest::boot(host, &DiskGuestImage::make()?, back_end)?;
    guest.start_load()?;
    for round in 0..rounds {
        await_transfers(&mut guest).with_context(|| format!("Before kill {round} of {rounds}"))?;
        let at = Duration::from_millis(dice.within(0..1000));
        thread::sleep(at);
        guest.back_end.kill_and_restart(host)?;
    }
    await_transfers(&mut guest).context("After the last kill")?;
    let generation = guest.stop_load()?;
    println!("{rounds} kills while {generation} generations were written and verified");
    guest.end()?;
    disk.check()
}

/// The guest never flushes then, so whoever serves it next must not take it for one that does.
fn a_write_cache_stays_off() -> Result<()> {
    let lab = Lab::build()?;
    let host = lab.host(Side::A);
    let disk = Disk::create(lab.run().directory().join("disk.img"), 64)?;
    let back_end = BackEnd::block(host, "disk", &disk, &["--queues", "4"])?;
    let mut guest = DiskGuest::boot(host, &DiskGuestImage::make()?, back_end)?;
    let seen = |guest: &mut DiskGuest| -> Result<_> {
        let guests = guest.run("cat /sys/block/vda/cache_type")?;
        Ok((guests, guest.back_end.status(host)?["write_cache"].as_str().unwrap_or("").to_owned()))
    };
    let is = |guest: &mut DiskGuest, guests: &str, ours: &str| -> Result<()> {
        let seen = seen(guest)?;
        ensure!(seen == (guests.to_owned(), ours.to_owned()), "The guest and we have it as {seen:?}");
        Ok(())
    };
    is(&mut guest, "write back", "writeback")?;
    guest.run("echo 'write through' >/sys/block/vda/cache_type")?;
    is(&mut guest, "write through", "writethrough")?;
    guest.reboot().context("The guest reboots")?;
    is(&mut guest, "write through", "writethrough").context("After a reboot")?;
    guest.back_end.kill_and_restart(host)?;
    await_transfer(&mut guest)?;
    is(&mut guest, "write through", "writethrough").context("After a kill")?;
    // one that has a cache flushes, and that shows it
    guest.run("echo 'write back' >/sys/block/vda/cache_type")?;
    guest.back_end.kill_and_restart(host)?;
    await_transfer(&mut guest)?;
    is(&mut guest, "write back", "writeback").context("After a kill and a flush")?;
    guest.end()?;
    disk.check()
}

/// Returns when the guest has reached its disk, with a flush if it has a cache.
fn await_transfer(guest: &mut DiskGuest) -> Result<()> {
    guest.run("dd if=/bin/busybox of=/data/file bs=4k count=1 conv=fsync 2>/dev/null").map(drop)
}

/// Waits until the guest has moved some more data to or from its disk.
fn await_transfers(guest: &mut DiskGuest) -> Result<()> {
    let before = guest.requests_ended()?;
    let deadline = Instant::now() + PROGRESS_LIMIT;
    while guest.requests_ended()? < before + 100 {
        guest.loaded_generations()?;
        ensure!(Instant::now() < deadline, "The guest's requests do not end");
    }
    Ok(())
}
