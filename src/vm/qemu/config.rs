//! What a QEMU is started with, and the command line that says it.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::device_state;

/// The virtual hardware and where its outside is. Everything that the guest can see must be the same on both hosts.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The program.
    pub binary: PathBuf,
    /// The VM's name.
    pub name: String,
    /// Guest RAM: whole MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Machine type, with its options if any, as `pc` or `q35,hpet=off`.
    pub machine: String,
    /// What executes the guest.
    pub accelerator: Accelerator,
    /// CPU model; by default `host` under KVM and `max` under TCG.
    pub cpu: Option<String>,
    /// Kernel to boot directly.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: Option<String>,
    /// File that gets what the guest writes to its first serial port.
    pub serial: Option<PathBuf>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Disks. Without a kernel the guest boots from the first.
    pub disks: Vec<Disk>,
    /// A monitor for the operator, as a Unix socket. It is not safe to change the VM there while it is protected.
    pub operator_qmp: Option<PathBuf>,
    /// Whether QEMU shuts itself into its seccomp sandbox.
    pub sandbox: bool,
    /// More arguments, as they are.
    pub extra_args: Vec<String>,
    /// A QEMU that does not carry out a command within this time is taken for dead.
    pub command_limit: Duration,
}

/// A virtio network card served over vhost-user.
#[derive(Clone, Debug)]
pub struct Nic {
    /// The back end's socket.
    pub socket: PathBuf,
    /// Its MAC address, as `52:54:00:12:34:56`.
    pub mac: String,
}

/// A virtio disk served over vhost-user.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The back end's socket.
    pub socket: PathBuf,
    /// Number of queues; the back end must serve as many.
    pub queues: u16,
}

/// What executes the guest's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where it runs whole guests, else TCG.
    #[default]
    Auto,
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// Decides what `Auto` means on this host.
    pub fn resolve(self) -> Self {
        match self {
            Self::Auto if kvm_runs_guests(Path::new("/")) => Self::Kvm,
            Self::Auto => Self::Tcg,
            chosen => chosen,
        }
    }
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => Err(format!("\"{other}\" is no accelerator: use auto, kvm or tcg")),
        }
    }
}

/// Whether there is a KVM on the processor's own virtualisation. One served by `kvm_pvm` has the same device file, but
/// interprets what is not user mode and boots no ordinary kernel.
fn kvm_runs_guests(root: &Path) -> bool {
    let device = root.join("dev/kvm");
    let modules = root.join("sys/module");
    let opens = std::fs::File::options().read(true).write(true).open(device).is_ok();
    let hardware = modules.join("kvm_intel").exists() || modules.join("kvm_amd").exists();
    opens && hardware && !modules.join("kvm_pvm").exists()
}

impl Default for QemuConfig {
    fn default() -> Self {
        Self {
            binary: "qemu-system-x86_64".into(),
            name: "vm".into(),
            memory_bytes: 256 << 20,
            vcpus: 1,
            machine: "pc".into(),
            accelerator: Accelerator::Auto,
            cpu: None,
            kernel: None,
            initrd: None,
            append: None,
            serial: None,
            nics: Vec::new(),
            disks: Vec::new(),
            operator_qmp: None,
            sandbox: true,
            extra_args: Vec::new(),
            command_limit: Duration::from_secs(10),
        }
    }
}

/// The descriptors that QEMU inherits, by number.
pub(super) struct Inherited {
    pub(super) ram: RawFd,
    pub(super) monitor: RawFd,
    pub(super) vmstate: RawFd,
    pub(super) log: RawFd,
}

/// An argument list that can name paths with any byte in them.
struct Arguments(Vec<OsString>);

impl Arguments {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }

    /// `before`, the path with its commas doubled as QEMU's option parser wants it, `after`.
    fn add_with_path(&mut self, option: &str, before: &str, path: &Path, after: &str) {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let mut value = before.as_bytes().to_vec();
        for byte in path.as_os_str().as_bytes() {
            value.push(*byte);
            if *byte == b',' {
                value.push(b',');
            }
        }
        value.extend_from_slice(after.as_bytes());
        self.add(option, OsString::from_vec(value));
    }
}

impl QemuConfig {
    /// The CPU model. The accelerator must be resolved.
    pub(super) fn cpu_model(&self) -> &str {
        let default = if self.accelerator == Accelerator::Tcg { "max" } else { "host" };
        self.cpu.as_deref().unwrap_or(default)
    }

    /// The command line, without the program. The accelerator must be resolved.
    pub(super) fn arguments(&self, inherited: &Inherited) -> Vec<OsString> {
        let tcg = self.accelerator == Accelerator::Tcg;
        let mut arguments = Arguments(Vec::new());
        for flag in ["-nodefaults", "-no-user-config", "-S"] {
            arguments.0.push(flag.into());
        }
        arguments.add("-display", "none");
        arguments.add("-name", self.name.replace(',', ",,"));
        arguments.add("-accel", if tcg { "tcg,thread=multi" } else { "kvm" });
        arguments.add("-cpu", self.cpu_model());
        arguments.add("-smp", self.vcpus.to_string());
        arguments.add("-m", format!("{}K", self.memory_bytes / 1024));
        // The description of the device state is 15 times its size, and nobody reads it.
        arguments.add("-machine", format!("{},memory-backend=ram,suppress-vmdesc=on", self.machine));
        arguments.add(
            "-object",
            format!(
                "memory-backend-file,id=ram,size={},share=on,mem-path=/proc/self/fd/{}",
                self.memory_bytes, inherited.ram
            ),
        );
        // What xen-save-devices-state writes has no configuration section, so the loader must not expect one.
        arguments.add("-global", "migration.send-configuration=off");
        arguments.add(
            "-blockdev",
            format!(
                "driver=qcow2,node-name={},cache.no-flush=on,file.driver=file,file.locking=off,file.filename=/proc/self/fd/{}",
                device_state::NODE,
                inherited.vmstate
            ),
        );
        // QEMU before 8.2 tells nowhere else where its private RAM blocks are.
        arguments.add("-trace", "qemu_anon_ram_alloc");
        arguments.add("-D", format!("/proc/self/fd/{}", inherited.log));
        arguments.add("-chardev", format!("socket,id=monitor,fd={}", inherited.monitor));
        arguments.add("-mon", "chardev=monitor,mode=control");
        if let Some(path) = &self.operator_qmp {
            arguments.add_with_path("-qmp", "unix:", path, ",server=on,wait=off");
        }
        if self.sandbox {
            arguments
                .add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        }
        if let Some(path) = &self.serial {
            arguments.add_with_path("-chardev", "file,id=serial,append=on,path=", path, "");
            arguments.add("-serial", "chardev:serial");
        }
        if let Some(kernel) = &self.kernel {
            arguments.add("-kernel", kernel);
            if let Some(initrd) = &self.initrd {
                arguments.add("-initrd", initrd);
            }
            if let Some(append) = &self.append {
                arguments.add("-append", append);
            }
        }
        // QEMU 7.2 under TCG: with MSI-X it crashes when the guest's driver starts a vhost-user network card; with INTx it works.
        // The control queue stays, which QEMU serves itself: without it Linux refuses the features that QEMU offers with it.
        let vectors = if tcg { ",vectors=0" } else { "" };
        for (index, nic) in self.nics.iter().enumerate() {
            arguments.add_with_path(
                "-chardev",
                &format!("socket,id=net{index}-socket,path="),
                &nic.socket,
                "",
            );
            arguments.add("-netdev", format!("vhost-user,id=net{index},chardev=net{index}-socket"));
            let device = format!("virtio-net-pci,netdev=net{index},mac={},romfile={vectors}", nic.mac);
            arguments.add("-device", device);
        }
        for (index, disk) in self.disks.iter().enumerate() {
            arguments.add_with_path(
                "-chardev",
                &format!("socket,id=disk{index}-socket,path="),
                &disk.socket,
                "",
            );
            let (queues, boot) = (disk.queues, index + 1);
            let device =
                format!("vhost-user-blk-pci,chardev=disk{index}-socket,num-queues={queues},bootindex={boot}");
            arguments.add("-device", device);
        }
        arguments.0.extend(self.extra_args.iter().map(OsString::from));
        arguments.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(config: &QemuConfig) -> String {
        let inherited = Inherited { ram: 10, monitor: 11, vmstate: 12, log: 13 };
        let arguments = config.arguments(&inherited);
        arguments.iter().map(|part| part.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        let disk = Disk { socket: "/run/a,b/blk".into(), queues: 2 };
        let config = QemuConfig { disks: vec![disk], ..QemuConfig::default() };
        let line = line(&config);
        assert!(line.contains("-chardev socket,id=disk0-socket,path=/run/a,,b/blk"), "{line}");
        assert!(line.contains("vhost-user-blk-pci,chardev=disk0-socket,num-queues=2"), "{line}");
    }

    #[test]
    fn msix_is_left_out_under_tcg_only() {
        let nics = vec![Nic { socket: "/run/net".into(), mac: "52:54:00:00:00:01".into() }];
        let config = |accelerator| QemuConfig { nics: nics.clone(), accelerator, ..QemuConfig::default() };
        assert!(line(&config(Accelerator::Tcg)).contains(",vectors=0"));
        assert!(!line(&config(Accelerator::Kvm)).contains(",vectors=0"));
    }

    #[test]
    fn a_software_kvm_is_not_taken() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["dev", "sys/module/kvm_intel"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        assert!(!kvm_runs_guests(root.path()));
        std::fs::write(root.path().join("dev/kvm"), "").unwrap();
        assert!(kvm_runs_guests(root.path()));
        std::fs::create_dir(root.path().join("sys/module/kvm_pvm")).unwrap();
        assert!(!kvm_runs_guests(root.path()));
    }
}
