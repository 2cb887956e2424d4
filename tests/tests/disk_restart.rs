//! The block back end dies and starts again, and the guest does not notice more than a pause.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use colo_lab::{BlockBackEnd, Dice, Disk, DiskGuest, DiskGuestImage, Lab, Side};

/// QEMU tries once a second to connect again.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    colo_tests::run(&[("kill_9_of_the_back_end_under_load_loses_nothing", kill_9_under_load)])
}

/// At random moments; `COLO_TEST_ROUNDS` says how often.
fn kill_9_under_load() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let mut dice = Dice::announced();
    let lab = Lab::build()?;
    let host = lab.host(Side::A);
    let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
    let back_end = BlockBackEnd::start(host, "disk", &disk, &["--queues", "4"])?;
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
