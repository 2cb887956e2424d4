//! The guest's kernel, initramfs and disks.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::program;

/// Kernel and initramfs, made by `tuning/guest/mkguest.sh`.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// More words for the kernel's command line.
    pub arguments: String,
}

impl GuestImage {
    /// Makes the image, or finds it made.
    ///
    /// # Errors
    /// Packages are missing, or Debian's mirror cannot be reached.
    pub fn make() -> Result<Self> {
        // the script asks apt for versions each time, which takes half a second
        static MADE: OnceLock<GuestImage> = OnceLock::new();
        if let Some(image) = MADE.get() {
            return Ok(image.clone());
        }
        let image = Self::of(&made("mkguest.sh", &program("guest-agent")?)?);
        Ok(MADE.get_or_init(|| image).clone())
    }

    /// The same with a kernel that has drivers of the network cards that QEMU emulates: e1000, rtl8139. It has none for a
    /// disk's file system.
    ///
    /// # Errors
    /// As above.
    pub fn make_for_emulated_cards() -> Result<Self> {
        let mut script = script("mkguest.sh", &program("guest-agent")?);
        script.env("COLO_GUEST_KERNEL", "linux-image-amd64");
        Ok(Self::of(&directory_of(script)?))
    }

    fn of(directory: &Path) -> Self {
        Self { kernel: directory.join("vmlinuz"), initrd: directory.join("initrd"), arguments: String::new() }
    }

    /// The kernel's command line for a guest with this address on the LAN.
    pub fn append(&self, address: &str) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 reboot=t mitigations=off random.trust_cpu=on nowatchdog tsc=reliable \
             transparent_hugepage=never colo.ip={address}/24 {}",
            self.arguments
        )
    }
}

/// A raw image with an ext4 file system.
#[derive(Clone, Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Makes an empty one.
    ///
    /// # Errors
    /// There is no room or no `mke2fs`.
    pub fn create(path: PathBuf, mib: u64) -> Result<Self> {
        let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        file.set_len(mib << 20).with_context(|| path.display().to_string())?;
        let mut command = Command::new("mke2fs");
        // nothing is initialised later on: a background thread of the guest would write for minutes
        command.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&path);
        let output = command.output().context("Cannot run mke2fs: install e2fsprogs")?;
        succeeded(&output, "mke2fs")?;
        Ok(Self { path })
    }

    /// Makes one with `more_mib` behind the file system that belong to nobody.
    ///
    /// # Errors
    /// There is no room or no `mke2fs`.
    pub fn create_with_raw_part(path: PathBuf, mib: u64, more_mib: u64) -> Result<Self> {
        let disk = Self::create(path, mib)?;
        let file = std::fs::File::options().write(true).open(&disk.path).context("An image just made")?;
        file.set_len((mib + more_mib) << 20).context("An image just made")?;
        Ok(disk)
    }

    /// Writes `bytes` at `offset`, past every file system.
    ///
    /// # Errors
    /// There is no room.
    pub fn write_raw(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let file = std::fs::File::options().write(true).open(&self.path);
        let written = file.and_then(|file| file.write_all_at(bytes, offset));
        written.with_context(|| self.path.display().to_string())
    }

    /// A copy with the same content, which is how the two sides of a pair begin.
    ///
    /// # Errors
    /// There is no room.
    pub fn copy_to(&self, path: PathBuf) -> Result<Self> {
        let mut command = Command::new("cp");
        let output =
            command.arg("--sparse=always").arg(&self.path).arg(&path).output().context("Cannot run cp")?;
        succeeded(&output, "cp")?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the file system without a repair. It must have been unmounted.
    ///
    /// # Errors
    /// What `e2fsck` finds.
    pub fn check(&self) -> Result<()> {
        let mut command = Command::new("e2fsck");
        let output = command.arg("-fn").arg(&self.path).output().context("Cannot run e2fsck")?;
        succeeded(&output, "e2fsck -fn").map(drop)
    }

    /// Checks the file system as a guest would find it that starts after a crash: the journal is replayed first, in a
    /// copy, then nothing may need a repair.
    ///
    /// # Errors
    /// What `e2fsck` finds.
    pub fn check_after_crash(&self) -> Result<()> {
        let copy = self.copy_to(self.path.with_extension("check"))?;
        let mut command = Command::new("e2fsck");
        let output = command.args(["-y", "-E", "journal_only"]).arg(&copy.path).output();
        succeeded(&output.context("Cannot run e2fsck")?, "e2fsck -E journal_only")?;
        let checked = copy.check();
        std::fs::remove_file(&copy.path).context("Cannot remove the copy of a disk")?;
        checked
    }
}

/// Runs one of the scripts that make guests; returns the directory that it prints.
pub(crate) fn made(name: &str, argument: &Path) -> Result<PathBuf> {
    directory_of(script(name, argument))
}

fn script(name: &str, argument: &Path) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("guest").join(name));
    command.arg(argument);
    command
}

fn directory_of(mut script: Command) -> Result<PathBuf> {
    let output = script.output().with_context(|| format!("Cannot run {}", script.get_program().display()))?;
    Ok(succeeded(&output, "The guest image cannot be made")?.trim().into())
}

fn succeeded(output: &Output, what: &str) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        output.status.success(),
        "{what}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr).trim()
    );
    Ok(text(&output.stdout))
}
