//! What must hold on this host and for this VM before it can be protected. Each fault is a sentence with its remedy.

use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::config::{Accelerator, QemuConfig};
use super::qmp::{Qmp, QmpError};
use super::{QemuVm, tracker};
use crate::memory::PageSet;
use crate::vm::{Vm, VmError};

/// The oldest QEMU that this was tried with.
pub(super) const VERSION_MIN: (u64, u64) = (7, 2);

/// The first kernel with PAGEMAP_SCAN and asynchronous write protection.
const KERNEL_MIN: (u32, u32) = (6, 7);

/// Devices whose doings a checkpoint would miss, by how their type begins, and why.
const UNFIT_DEVICES: [(&str, &str); 7] = [
    ("vfio-", "it passes a device of this host through, whose state and writes nobody can see"),
    ("vhost-", "another process serves it and writes guest memory unseen"),
    ("virtio-balloon", "it takes pages away without marking them as written"),
    ("virtio-mem", "it plugs memory in while the guest runs"),
    ("pc-dimm", "it is memory besides guest RAM"),
    ("nvdimm", "it is memory besides guest RAM"),
    ("ivshmem", "it shares memory with other VMs"),
];

/// Tries whether the VM can be protected on this host: starts it paused, without its network cards and disks, which need their
/// back ends, and without its kernel, and takes it through everything that a checkpoint does. Returns what does not work.
pub fn host(config: &QemuConfig) -> Vec<String> {
    let mut faults = Vec::new();
    faults.extend(tracker_failed());
    faults.extend(accelerator_fault(config.accelerator, Path::new("/")));
    let trial = QemuConfig {
        nics: Vec::new(),
        disks: Vec::new(),
        kernel: None,
        serial: None,
        operator_qmp: None,
        accelerator: config.accelerator.resolve(),
        ..config.clone()
    };
    match QemuVm::launch(&trial) {
        Err(error) => faults.push(error.to_string()),
        Ok(mut vm) => {
            match inspect(vm.qmp()) {
                // A device that cannot be saved may take QEMU down when it is.
                Ok(unfit) if !unfit.is_empty() => faults.extend(unfit),
                Err(error) => faults.push(error.to_string()),
                Ok(_) => {
                    // What is wrong with the kernel is there already.
                    let failed = rehearse(&mut vm).err().map(|error| error.to_string());
                    faults.extend(
                        failed.filter(|error| !faults.contains(error)).into_iter().collect::<Vec<_>>(),
                    );
                }
            }
        }
    }
    faults
}

/// A checkpoint of a VM into itself.
fn rehearse(vm: &mut QemuVm) -> Result<(), VmError> {
    let mut pages = PageSet::new(vm.pages());
    vm.start_tracking(&mut pages)?;
    let mut state = Vec::new();
    vm.save_devices(&mut state)?;
    vm.take_dirty(&mut pages)?;
    vm.load_devices(&state)
}

/// What this VM has that cannot be protected.
fn inspect(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let [named, unnamed, migration, blocks, networks, memory] = qmp.execute_all([
        ("qom-list", json!({"path": "/machine/peripheral"})),
        ("qom-list", json!({"path": "/machine/peripheral-anon"})),
        ("query-migrate", Value::Null),
        ("query-block", Value::Null),
        ("human-monitor-command", json!({"command-line": "info network"})),
        ("query-memory-size-summary", Value::Null),
    ])?;
    let mut faults = Vec::new();
    for list in [&named, &unnamed] {
        let kinds = list.as_array().into_iter().flatten().filter_map(|device| device["type"].as_str());
        faults.extend(kinds.filter_map(unfit_device));
    }
    for reason in migration["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        faults
            .push(format!("QEMU cannot save this VM: {reason}; remove what it names from the configuration"));
    }
    for block in blocks.as_array().into_iter().flatten().filter(|block| block.get("inserted").is_some()) {
        faults.push(format!(
            "The disk {} is served by QEMU itself, so its writes are not replicated: give the guest only the disk of the \
             configuration",
            block["inserted"]["file"].as_str().unwrap_or("?")
        ));
    }
    faults.extend(networks.as_str().unwrap_or("").lines().filter_map(unfit_network));
    if memory["plugged-memory"].as_u64().unwrap_or(0) > 0 {
        faults.push(
            "The VM has plugged-in memory, which is not replicated: give it all its memory at start".into(),
        );
    }
    Ok(faults)
}

/// `kind` is a property's type, as `child<virtio-net-pci>`.
fn unfit_device(kind: &str) -> Option<String> {
    let device = kind.strip_prefix("child<")?.strip_suffix('>')?;
    let (_, why) = UNFIT_DEVICES.iter().find(|(begin, _)| device.starts_with(begin))?;
    Some(format!("The device {device} cannot be protected, because {why}: remove it from the configuration"))
}

/// `line` is one of `info network`. The cards themselves are of the type `nic`; what they are connected to has another.
fn unfit_network(line: &str) -> Option<String> {
    let (name, facts) = line.trim().trim_start_matches('\\').split_once(": ")?;
    let kind = facts.split(',').find_map(|fact| fact.strip_prefix("type="))?;
    (kind != "nic").then(|| {
        format!(
            "The network {} (type {kind}) is connected to QEMU itself, so its packets would leave uncompared: give the guest \
             only the network card of the configuration",
            name.trim()
        )
    })
}

fn accelerator_fault(accelerator: Accelerator, root: &Path) -> Option<String> {
    let software = root.join("sys/module/kvm_pvm").exists();
    (accelerator == Accelerator::Kvm && software).then(|| {
        "The KVM of this host (kvm_pvm) is a software one, which boots no ordinary kernel: set accel to \"tcg\" or \"auto\"".into()
    })
}

/// Version of the running kernel, as far as its name tells.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|character: char| !character.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Why this kernel cannot tell which pages QEMU wrote, if that is so.
fn tracker_failed() -> Option<String> {
    let error = tracker::self_test().err()?;
    let (release, (major, minor)) = (release(), KERNEL_MIN);
    Some(if kernel_version(&release).is_some_and(|version| version < KERNEL_MIN) {
        format!(
            "Linux {release} cannot tell which pages QEMU wrote: boot {major}.{minor} or later (Debian 12: linux-image-amd64 \
             from bookworm-backports)"
        )
    } else {
        format!(
            "Linux {release} does not tell which pages a process wrote ({error}): boot one with userfaultfd, its asynchronous \
             write protection and PAGEMAP_SCAN (CONFIG_USERFAULTFD, CONFIG_PTE_MARKER_UFFD_WP, CONFIG_PROC_PAGE_MONITOR)"
        )
    })
}

/// What it means that the tracker cannot be attached to QEMU.
pub(super) fn attach_failed(error: io::Error) -> VmError {
    if let Some(why) = tracker_failed() {
        return VmError::Unsupported(why);
    }
    if error.kind() == io::ErrorKind::PermissionDenied {
        let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let yama = yama.map_or_else(
            |_| String::new(),
            |scope| format!(" (kernel.yama.ptrace_scope is {})", scope.trim()),
        );
        return VmError::Unsupported(format!(
            "This process may not trace QEMU{yama}: run it as root or with CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 1"
        ));
    }
    VmError::Io { what: "Cannot track the writes of QEMU".into(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_are_understood() {
        assert_eq!(kernel_version("6.1.0-37-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(kernel_version("linux"), None);
    }

    #[test]
    fn devices_and_networks_that_do_not_fit_are_named() {
        assert!(unfit_device("child<vfio-pci>").unwrap().contains("The device vfio-pci cannot be protected"));
        assert_eq!(unfit_device("child<virtio-net-pci>"), None);
        assert_eq!(unfit_device("string"), None);
        assert_eq!(
            unfit_network("virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54"),
            None
        );
        let user = unfit_network(" \\ n: index=0,type=user,net=10.0.2.0,restrict=off").unwrap();
        assert!(user.starts_with("The network n (type user)"), "{user}");
    }

    #[test]
    fn a_vm_with_devices_of_its_own_is_refused_by_name() {
        if std::process::Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
            println!("skipped: no qemu-system-x86_64");
            return;
        }
        let words = |line: &str| line.split(' ').map(String::from).collect();
        let config =
            |line| QemuConfig { extra_args: words(line), memory_bytes: 32 << 20, ..QemuConfig::default() };
        let plain = host(&config("-device VGA"));
        assert_eq!(plain, Vec::<String>::new());
        let faults = host(&config(
            "-netdev user,id=n -device e1000,netdev=n -drive file=/dev/null,format=raw,if=ide -device nvme,serial=x \
             -device virtio-balloon",
        ));
        for named in
            ["network n (type user)", "disk /dev/null", "non-migratable device", "device virtio-balloon-pci"]
        {
            assert!(faults.iter().any(|fault| fault.contains(named)), "{named}: {faults:#?}");
        }
    }
}
