//! A guest's disk keeps what fio writes to it on four queues, whatever begins anew: the guest or QEMU.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use colo_lab::{BackEnd, Disk, DiskGuest, DiskGuestImage, Lab, Side};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("fio_finds_what_it_wrote_on_four_queues", fio_finds_what_it_wrote),
        ("data_survives_a_reboot_of_a_guest_with_four_queues", data_survives_a_reboot),
        ("data_survives_the_death_of_qemu_and_the_back_end_goes_on", data_survives_the_death_of_qemu),
        ("a_guest_under_load_sees_that_its_disk_has_grown", a_guest_sees_that_its_disk_has_grown),
    ])
}

/// A laboratory with a disk, of which the first half is a file system, and a guest that has booted from it.
fn boot(lab: &Lab) -> Result<(Disk, DiskGuest)> {
    let host = lab.host(Side::A);
    let disk = Disk::create_with_raw_part(lab.run().directory().join("disk.img"), 64, 64)?;
    let back_end = BackEnd::block(host, "disk", &disk, &["--queues", "4"])?;
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

fn a_guest_sees_that_its_disk_has_grown() -> Result<()> {
    const OLD_MIB: u64 = 128;
    const NEW_MIB: u64 = 160;
    let lab = Lab::build()?;
    let (disk, mut guest) = boot(&lab)?;
    let sectors = |mib: u64| (mib << 11).to_string();
    ensure!(guest.run("cat /sys/block/vda/size")? == sectors(OLD_MIB), "Another length than the image's");
    guest.start_load()?;
    guest.back_end.resize(lab.host(Side::A), NEW_MIB << 20)?;
    // one shell command waits for it, with the limit of any
    let size = sectors(NEW_MIB);
    guest.run(&format!("until [ $(cat /sys/block/vda/size) = {size} ]; do usleep 10000; done"))?;
    guest.run(&format!(
        "set -e; dd if=/dev/urandom of=/tmp/new bs=1M count={more} 2>/dev/null; \
         dd if=/tmp/new of=/dev/vda bs=1M seek={OLD_MIB} oflag=direct 2>/dev/null; \
         dd if=/dev/vda bs=1M skip={OLD_MIB} iflag=direct 2>/dev/null | cmp - /tmp/new",
        more = NEW_MIB - OLD_MIB
    ))?;
    guest.stop_load()?;
    guest.end()?;
    let length = std::fs::metadata(disk.path())?.len();
    ensure!(length == NEW_MIB << 20, "The image has {length} bytes");
    disk.check()
}
