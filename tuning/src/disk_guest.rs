//! A guest that does nothing but use its devices: four CPUs, a disk with four queues, fio, a shell on a serial port, and a
//! network card if it is given one.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo::vm::qemu::Qmp;
use serde_json::{Value, json};

use crate::guest::made;
use crate::{BackEnd, Console, GuestImage, Host, Process};

/// Queues of the disk, and CPUs of the guest.
const QUEUES: usize = 4;

const MEMORY_MIB: u32 = 512;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// For a shell command that needs the disk only a little.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// For all of a generation on four emulated CPUs, on a host that is busy otherwise.
const GENERATION_LIMIT: Duration = Duration::from_secs(240);

/// What the guest boots from, made by `tuning/guest/mkguest.sh` and `mkdiskguest.sh`.
#[derive(Clone, Debug)]
pub struct DiskGuestImage {
    guest: GuestImage,
    tools: PathBuf,
}

impl DiskGuestImage {
    /// Makes the image, or finds it made.
    ///
    /// # Errors
    /// Packages are missing, or Debian's mirror cannot be reached.
    pub fn make() -> Result<Self> {
        static MADE: OnceLock<DiskGuestImage> = OnceLock::new();
        if let Some(image) = MADE.get() {
            return Ok(image.clone());
        }
        let base = GuestImage::make()?;
        let directory = made("mkdiskguest.sh", base.kernel.parent().context("The kernel has no directory")?)?;
        let guest = GuestImage { initrd: directory.join("initrd"), ..base };
        let image = Self { guest, tools: directory.join("tools.img") };
        Ok(MADE.get_or_init(|| image).clone())
    }
}

/// A network card.
pub struct Card {
    /// What serves it.
    pub back_end: BackEnd,
    /// How many queue pairs QEMU has for it.
    pub pairs: usize,
    /// Its hardware address.
    pub mac: &'static str,
    /// Its address on the LAN.
    pub address: &'static str,
    /// More properties of QEMU's virtio-net-pci, each with a comma before it.
    pub properties: String,
}

/// A running guest, its QEMU and its back ends.
pub struct DiskGuest {
    /// What serves its disk.
    pub back_end: BackEnd,
    /// Its network card.
    pub card: Option<Card>,
    /// Its shell.
    pub console: Console,
    qemu: Process,
    qmp: Qmp,
}

impl DiskGuest {
    /// Boots a guest on a host, and returns when its shell is there. The file system on its disk is mounted at `/data`.
    ///
    /// # Errors
    /// QEMU cannot be started, or the guest does not boot.
    pub fn boot(host: &Host, image: &DiskGuestImage, back_end: BackEnd) -> Result<Self> {
        Self::boot_with(host, image, back_end, None)
    }

    /// The same for a guest that has a network card as well.
    ///
    /// # Errors
    /// As above.
    pub fn boot_with(
        host: &Host,
        image: &DiskGuestImage,
        back_end: BackEnd,
        card: Option<Card>,
    ) -> Result<Self> {
        // stopped at first: nothing that the guest says may go by before somebody listens
        let mut guest = Self::start(host, image, back_end, card, &["-S"])?;
        guest.command("cont", Value::Null)?;
        if let Err(error) = guest.await_boot() {
            return Err(error.context(guest.whereabouts(host)));
        }
        Ok(guest)
    }

    /// Starts a QEMU that waits for a guest to come from elsewhere to `uri`, and does not run it by itself then.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn await_from(
        host: &Host,
        image: &DiskGuestImage,
        back_end: BackEnd,
        card: Option<Card>,
        uri: &str,
    ) -> Result<Self> {
        Self::start(host, image, back_end, card, &["-S", "-incoming", uri])
    }

    fn start(
        host: &Host,
        image: &DiskGuestImage,
        mut back_end: BackEnd,
        card: Option<Card>,
        more: &[&str],
    ) -> Result<Self> {
        let socket = |name: &str| host.directory().join(format!("disk-guest.{name}"));
        let (monitor, console) = (socket("qmp"), socket("console"));
        let cpus = QUEUES.to_string();
        // A page that the guest clears before the disk fills it is dirty by the guest's own doing, and would be
        // migrated whether the back end logs it or not.
        let address = card.as_ref().map_or("0.0.0.0", |card| card.address);
        let append = format!("{} init_on_alloc=0", image.guest.append(address));
        let mut command = Command::new("qemu-system-x86_64");
        // One thread for all CPUs. With a thread for each, QEMU 7.2 now and then leaves the guest's kernel hanging in its
        // boot: two CPUs spin in hrtimer_start_range_ns with interrupts off, the others are idle, and the disk has
        // answered all that it was asked (1 boot in some hundred). On two cores it is slower as well.
        command
            .args(["-nodefaults", "-display", "none", "-smp", &cpus, "-m", &MEMORY_MIB.to_string()])
            .args(["-accel", "tcg,thread=single", "-M", "pc,memory-backend=ram", "-object"])
            .arg(format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"))
            .arg("-kernel")
            .arg(&image.guest.kernel)
            .arg("-initrd")
            .arg(&image.guest.initrd)
            .args(["-append", &append, "-serial"])
            .arg(format!("file:{}", socket("log").display()))
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=off", console.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={},reconnect=1", back_end.socket().display()))
            .args(["-device", &format!("vhost-user-blk-pci,chardev=disk,num-queues={cpus},addr=4")])
            .arg("-drive")
            .arg(format!("file={},format=raw,if=none,id=tools,readonly=on", image.tools.display()))
            .args(["-device", "virtio-blk-pci,drive=tools,addr=5"])
            // memory that the guest can take out of its address space and put back
            .args(["-object", "memory-backend-memfd,id=window,size=1M,share=on"])
            .args(["-device", "ivshmem-plain,memdev=window,master=on,addr=6"])
            .args(more);
        if let Some(Card { back_end, pairs, mac, properties, .. }) = &card {
            // vectors=0: under TCG QEMU 7.2 does not start a vhost-user-net device with MSI-X
            command
                .arg("-chardev")
                .arg(format!("socket,id=card,path={},reconnect=1", back_end.socket().display()))
                .args(["-netdev", &format!("vhost-user,id=lan,chardev=card,queues={pairs}"), "-device"])
                .arg(format!(
                    "virtio-net-pci,netdev=lan,mac={mac},mq={},vectors=0,romfile=,addr=7{properties}",
                    if *pairs > 1 { "on" } else { "off" }
                ));
        }
        for path in [&monitor, &console] {
            drop(std::fs::remove_file(path));
        }
        let mut qemu = host.start(command, "disk-guest-qemu")?;
        let limit = Duration::from_secs(20);
        let stream = qemu.until("monitor", limit, || UnixStream::connect(&monitor).ok())?;
        let console = qemu.until("console", limit, || Console::connect(&console).ok())?;
        let qmp = Qmp::connect(stream, limit, limit);
        let qmp = qmp.with_context(|| format!("QEMU says: {}", qemu.output()))?;
        back_end.ensure_running()?;
        Ok(Self { back_end, card, console, qemu, qmp })
    }

    /// What the guest's processors are at, and how far its devices have come.
    fn whereabouts(&mut self, host: &Host) -> String {
        let registers =
            match self.command("human-monitor-command", json!({"command-line": "info registers -a"})) {
                Ok(text) => text.as_str().unwrap_or_default().replace("\r\n", "\n"),
                Err(error) => format!("{error:#}"),
            };
        let processors = registers.lines().filter(|line| line.starts_with("CPU#") || line.contains("IP="));
        let processors: Vec<&str> = processors.collect();
        let figures = |back_end: &BackEnd| match back_end.status(host) {
            Ok(figures) => figures.to_string(),
            Err(error) => format!("{error:#}"),
        };
        let card = self.card.as_ref().map(|card| figures(&card.back_end)).unwrap_or_default();
        format!("{}\ndisk: {}\ncard: {card}\n", processors.join("\n"), figures(&self.back_end))
    }

    /// The file that is the guest's memory.
    ///
    /// # Errors
    /// QEMU has ended.
    pub fn memory(&self) -> Result<File> {
        let directory = format!("/proc/{}/fd", self.qemu.pid());
        for entry in std::fs::read_dir(&directory).context(directory)? {
            let path = entry?.path();
            let Ok(target) = std::fs::read_link(&path) else { continue };
            if !target.to_string_lossy().contains("memory-backend-memfd") {
                continue;
            }
            let file = File::options().read(true).write(true).open(&path).context("The guest's memory")?;
            if file.metadata()?.len() == u64::from(MEMORY_MIB) << 20 {
                return Ok(file);
            }
        }
        anyhow::bail!("QEMU has no guest memory open")
    }

    /// One command to QEMU's monitor.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub fn command(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let result = self.qmp.execute(command, arguments);
        result.with_context(|| format!("QEMU says: {}", self.qemu.output()))
    }

    /// Waits until the guest has booted again.
    ///
    /// # Errors
    /// It does not.
    pub fn await_boot(&mut self) -> Result<()> {
        self.console.await_boot(BOOT_LIMIT)
    }

    /// Runs a line of shell in the guest and returns what it prints.
    ///
    /// # Errors
    /// It fails or takes too long.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.console.run(command, COMMAND_LIMIT)
    }

    /// Takes some memory out of the guest's address space, or puts it back, by the command register of the device that
    /// has it. Every back end gets another memory table.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn map_window(&mut self, mapped: bool) -> Result<()> {
        let bits = if mapped { "\\002" } else { "\\000" };
        let register =
            "/sys/bus/pci/devices/0000:00:06.0/config bs=1 seek=4 count=1 conv=notrunc 2>/dev/null";
        self.run(&format!("printf '{bits}' | dd of={register}")).map(drop)
    }

    /// Fills the raw part of the disk and writes a file, see `tuning/guest/disk/generation`.
    ///
    /// # Errors
    /// fio finds something wrong.
    pub fn write_generation(&mut self, number: u64) -> Result<()> {
        self.console.run(&format!("generation write {number}"), GENERATION_LIMIT).map(drop)
    }

    /// That the generation is on the disk, to the last byte.
    ///
    /// # Errors
    /// fio finds something else.
    pub fn verify_generation(&mut self, number: u64) -> Result<()> {
        self.console.run(&format!("generation verify {number}"), GENERATION_LIMIT).map(drop)
    }

    /// Begins to write and verify one generation after the other.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn start_load(&mut self) -> Result<()> {
        self.run("rm -f /tmp/stop /tmp/load.end /tmp/generation; load >/dev/null 2>&1 &").map(drop)
    }

    /// How many generations are whole, while the load goes on.
    ///
    /// # Errors
    /// The load has ended: something was wrong.
    pub fn loaded_generations(&mut self) -> Result<u64> {
        let text = self
            .run("cat /tmp/load.end 2>/dev/null && cat /tmp/load.log; cat /tmp/generation 2>/dev/null; :")?;
        if text.is_empty() {
            return Ok(0);
        }
        text.parse().with_context(|| format!("The load has ended: {text}"))
    }

    /// How many of the guest's reads and writes have ended since it booted.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn requests_ended(&mut self) -> Result<u64> {
        let text = self.run("set -- $(cat /sys/block/vda/stat); echo $(($1 + $5))")?;
        text.parse().with_context(|| format!("The guest's block statistics: {text}"))
    }

    /// Ends the load with the generation that is being written. Returns that generation, verified once more.
    ///
    /// # Errors
    /// fio has found something wrong, before or now, or does not end.
    pub fn stop_load(&mut self) -> Result<u64> {
        let wait = "touch /tmp/stop; while [ ! -e /tmp/load.end ]; do usleep 20000; done; cat /tmp/load.end";
        let end = match self.console.run(wait, GENERATION_LIMIT * 2) {
            Ok(end) => end,
            Err(error) => return Err(error.context(self.kernel_log())),
        };
        if end != "ok" {
            let log = self.run("cat /tmp/load.log")?;
            anyhow::bail!("The load in the guest: {end}\n{log}\n{}", self.kernel_log());
        }
        let generation = self.run("cat /tmp/generation")?.parse().context("The last generation")?;
        self.verify_generation(generation)?;
        Ok(generation)
    }

    /// That the guest's kernel has not complained of its disk, its file system or a task that hangs.
    ///
    /// # Errors
    /// It has.
    pub fn ensure_no_complaint(&mut self) -> Result<()> {
        let words = "I/O error|critical|EXT4-fs (error|warning)|JBD2:|blocked for more|timeout|Call Trace|BUG|virtio.*(fail|reset)";
        let (lines, status) = self.console.status_of(&format!("dmesg | grep -E '{words}'"), COMMAND_LIMIT)?;
        ensure!(status == 1, "The guest's kernel complains:\n{lines}");
        Ok(())
    }

    fn kernel_log(&mut self) -> String {
        self.run("dmesg | tail -n 30").unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Unmounts, reboots, and returns when the shell is there again.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reboot(&mut self) -> Result<()> {
        self.run("umount /data")?;
        self.console.send("reboot -f")?;
        self.await_boot()
    }

    /// QEMU dies by SIGKILL. Gives the back end, which lives.
    ///
    /// # Errors
    /// The back end has ended.
    pub fn kill_qemu(mut self) -> Result<BackEnd> {
        self.qemu.kill()?;
        self.back_end.ensure_running()?;
        Ok(self.back_end)
    }

    /// Ends the guest in good order: nothing complained of, the file system unmounted. The disk can be checked then.
    ///
    /// # Errors
    /// The guest complains or cannot unmount, or the back end has ended.
    pub fn end(mut self) -> Result<()> {
        self.ensure_no_complaint()?;
        self.run("umount /data")?;
        self.back_end.ensure_running()?;
        self.command("quit", json!({}))?;
        let status = self.qemu.wait(Duration::from_secs(20))?;
        ensure!(status.success(), "QEMU ends with {status}: {}", self.qemu.output());
        self.back_end.ensure_running()
    }
}
