//! One guest without protection: QEMU with plain back ends, or with QEMU's own devices to compare with.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{Agent, Disk, GUEST, GuestImage, Host, Lab, MAC, Process, Redis, Side, program};

/// Who serves the guest's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// `vhost-net-backend` and `vhost-blk-backend`.
    Ours,
    /// QEMU itself.
    Qemu,
}

/// A guest on one host of the laboratory.
#[derive(Debug)]
pub struct Solo {
    address: &'static str,
    disk: Disk,
    qemu: Process,
    back_ends: Vec<Process>,
}

impl Solo {
    /// Boots a guest on that side's host, and returns when its redis serves. There is room for one on each side, with
    /// an address of its own.
    ///
    /// # Errors
    /// Something cannot be started, or the guest does not serve.
    pub fn start(lab: &Lab, side: Side, image: &GuestImage, devices: Devices) -> Result<Self> {
        let host = lab.host(side);
        let file = |name: &str| host.directory().join(name);
        let disk = Disk::create(file("solo.img"), 128)?;
        host.add_tap("solo0")?;
        let (address, mac) = match side {
            Side::A => (GUEST, MAC),
            Side::B => ("10.77.0.11", "52:54:00:c0:10:02"),
        };
        let mut back_ends = Vec::new();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-display", "none", "-smp", "1", "-m", "256"])
            .args(["-accel", "tcg,thread=multi", "-M", "pc,memory-backend=ram"])
            .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .args(["-append", &format!("{} colo.iperf=yes", image.append(address)), "-serial"])
            .arg(format!("file:{}", file("solo-serial.log").display()));
        match devices {
            Devices::Ours => {
                let (net, block) = (file("solo-net"), file("solo-blk"));
                back_ends.push(start_net(host, &net)?);
                back_ends.push(start_block(host, &block, disk.path())?);
                // vectors=0: under TCG QEMU 7.2 does not start a vhost-user-net device with MSI-X
                qemu.arg("-chardev")
                    .arg(format!("socket,id=net,path={}", net.display()))
                    .args(["-netdev", "vhost-user,id=lan,chardev=net", "-device"])
                    .arg(format!("virtio-net-pci,netdev=lan,mac={mac},vectors=0,romfile="))
                    .arg("-chardev")
                    .arg(format!("socket,id=blk,path={}", block.display()))
                    .args(["-device", "vhost-user-blk-pci,chardev=blk,num-queues=1"]);
            }
            Devices::Qemu => {
                qemu.args(["-netdev", "tap,id=lan,ifname=solo0,script=no,downscript=no", "-device"])
                    .arg(format!("virtio-net-pci,netdev=lan,mac={mac},romfile="))
                    .arg("-drive")
                    .arg(format!("file={},format=raw,if=none,id=disk,cache=none", disk.path().display()))
                    .args(["-device", "virtio-blk-pci,drive=disk"]);
            }
        }
        let qemu = host.start(qemu, "solo-qemu")?;
        let solo = Self { address, disk, qemu, back_ends };
        solo.redis(lab)?;
        Ok(solo)
    }

    /// The guest's address on the LAN.
    pub fn address(&self) -> &'static str {
        self.address
    }

    /// Its disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// A connection to its redis, once that serves.
    ///
    /// # Errors
    /// It does not within a minute.
    pub fn redis(&self, lab: &Lab) -> Result<Redis> {
        Redis::connect(lab.client(), self.address, Duration::from_secs(60))
    }

    /// A connection to its agent.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn agent(&self, lab: &Lab) -> Result<Agent> {
        Agent::connect(lab.client(), self.address)
    }

    /// Ends the guest in good order and gives its disk, to be checked.
    ///
    /// # Errors
    /// The guest cannot unmount its disk.
    pub fn end(mut self, lab: &Lab) -> Result<Disk> {
        self.agent(lab)?.unmount()?;
        for back_end in &mut self.back_ends {
            anyhow::ensure!(back_end.ended()?.is_none(), "A back end has ended: {}", back_end.output());
        }
        drop(self.qemu);
        Ok(self.disk)
    }
}

fn start_net(host: &Host, socket: &Path) -> Result<Process> {
    let mut command = Command::new(program("vhost-net-backend")?);
    command.arg("--socket-path").arg(socket).args(["--tap", "solo0"]);
    serving(host.start(command, "solo-net")?, socket)
}

fn start_block(host: &Host, socket: &Path, disk: &Path) -> Result<Process> {
    let mut command = Command::new(program("vhost-blk-backend")?);
    command.arg("--socket-path").arg(socket).arg("--blk-file").arg(disk);
    serving(host.start(command, "solo-blk")?, socket)
}

fn serving(mut process: Process, socket: &Path) -> Result<Process> {
    let limit = Duration::from_secs(10);
    process.until("socket", limit, || socket.exists().then_some(())).context("A back end")?;
    Ok(process)
}
