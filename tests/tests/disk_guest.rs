//! A guest's disk keeps what fio writes to it on four queues, whatever begins anew: the guest or QEMU.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use colo_lab::{BlockBackEnd, Disk, DiskGuest, DiskGuestImage, Lab, Side};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("fio_finds_what_it_wrote_on_four_queues", fio_finds_what_it_wrote),
        ("data_survives_a_reboot_of_a_guest_with_four_queues", data_survives_a_reboot),
        ("data_survives_the_death_of_qemu_and_the_back_end_goes_on", data_survives_the_death_of_qemu),
    ])
}

/// A laboratory with a disk, of which the first half is a file system, and a guest that has booted from it.
fn boot(lab: &Lab) -> Result<(Disk, DiskGuest)> {
    let host = lab.host(Side::A);
    let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
    let back_end = BlockBackEnd::start(host, "disk", &disk, &["--queues", "4"])?;
    let guest = DiskGuest::boot(host, &DiskGuestImage::make()?, back_end)?;
    Ok((disk, guest))
}

fn fio_finds_what_it_wrote() -> Result<()> {
    let lab = Lab::build()?;
    let (disk, mut guest) = boot(&lab)?;
    let queues = guest.run("ls /sys/block/vda/mq | wc -l")?;
    ensure!(queues == "4", "The guest uses {queues} queues");
    guest.write_generation(1)?;
    guest.verify_generation(1)?;
    guest.end()?;
    disk.check()
}

fn data_survives_a_reboot() -> Result<()> {
    let lab = Lab::build()?;
    let (disk, mut guest) = boot(&lab)?;
    for generation in [1, 2] {
        guest.write_generation(generation)?;
        guest.reboot()?;
        guest.verify_generation(generation)?;
    }
    guest.end()?;
    disk.check()
}

fn data_survives_the_death_of_qemu() -> Result<()> {
    let lab = Lab::build()?;
    let (disk, mut guest) = boot(&lab)?;
    guest.write_generation(1)?;
    // the next guest begins while writes of this one are under way
    guest.start_load()?;
    let back_end = guest.kill_qemu()?;
    let pid = back_end.pid();
    disk.check_after_crash()?;
    let mut guest = DiskGuest::boot(lab.host(Side::A), &DiskGuestImage::make()?, back_end)?;
    guest.write_generation(2)?;
    guest.verify_generation(2)?;
    ensure!(guest.back_end.pid() == pid, "This is another back end");
    guest.end()?;
    disk.check()
}
