//! Two QEMUs with a real guest: one is checkpointed into the other again and again, then dies.
//!
//! Needs a Linux kernel and an initial RAM disk with a /bin/busybox in it, named by COLO_TEST_KERNEL and COLO_TEST_INITRD.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::memory::PAGE_BYTES;

const ROUNDS: usize = 20;
const LOADS: usize = 100;
/// What the guests run instead of an init: a line `tick N` on the serial port five times a second.
const TICK: &str = r#"sh -c "i=0; while :; do i=$((i+1)); echo tick $i; /bin/busybox usleep 200000; done""#;
const LIMIT: Duration = Duration::from_secs(60);

struct Guest {
    vm: QemuVm,
    serial: std::path::PathBuf,
}

impl Guest {
    fn launch(directory: &Path, name: &str, (kernel, initrd): &(String, String)) -> Self {
        let serial = directory.join(name);
        let config = QemuConfig {
            memory_bytes: 256 << 20,
            vcpus: 2,
            kernel: Some(kernel.into()),
            initrd: Some(initrd.into()),
            append: Some(format!("console=ttyS0 panic=-1 quiet rdinit=/bin/busybox -- {TICK}")),
            serial: Some(serial.clone()),
            // A block of video RAM, and two option ROMs: private blocks of which two have the same length.
            extra_args: ["-device", "VGA", "-device", "virtio-net-pci"].map(String::from).to_vec(),
            ..QemuConfig::default()
        };
        Self { vm: QemuVm::launch(&config).unwrap(), serial }
    }

    fn ticks(&self) -> u64 {
        let said = std::fs::read(&self.serial).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let tick = |line: &str| line.trim().strip_prefix("tick ")?.parse().ok();
        // The last line may be half written.
        said.rsplit_once('\n').and_then(|(whole, _)| whole.lines().rev().find_map(tick)).unwrap_or(0)
    }

    fn wait_for_tick(&self, tick: u64) {
        let began = Instant::now();
        while self.ticks() < tick {
            let said = std::fs::read_to_string(&self.serial).unwrap_or_default();
            assert!(began.elapsed() < LIMIT, "tick {tick} never came: {:?} {said}", self.vm.ended());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The steps whose durations are printed.
#[derive(Default)]
struct Durations(Vec<(&'static str, Vec<Duration>)>);

impl Durations {
    fn measure<T>(&mut self, step: &'static str, action: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = action();
        let took = began.elapsed();
        match self.0.iter_mut().find(|(name, _)| *name == step) {
            Some((_, durations)) => durations.push(took),
            None => self.0.push((step, vec![took])),
        }
        result
    }

    fn print(&mut self) {
        for (step, durations) in &mut self.0 {
            durations.sort();
            println!(
                "{step:>12}: median {:?}, most {:?}",
                durations[durations.len() / 2],
                durations[durations.len() - 1]
            );
        }
    }
}

fn copy(from: &QemuVm, to: &mut QemuVm, pages: &PageSet) {
    let pages = pages.iter().collect::<Vec<_>>();
    for some in pages.chunks(1024) {
        let mut bytes = vec![0; some.len() * PAGE_BYTES];
        from.read_pages(some, &mut bytes).unwrap();
        to.write_pages(some, &bytes).unwrap();
    }
}

fn assert_equal(primary: &QemuVm, secondary: &QemuVm, pages: u64, round: usize) {
    let all = (0..pages).collect::<Vec<_>>();
    let mut differ = Vec::new();
    let (mut ours, mut theirs) = (vec![0; 1024 * PAGE_BYTES], vec![0; 1024 * PAGE_BYTES]);
    for some in all.chunks(1024) {
        let bytes = some.len() * PAGE_BYTES;
        primary.read_pages(some, &mut ours[..bytes]).unwrap();
        secondary.read_pages(some, &mut theirs[..bytes]).unwrap();
        let page = |index: usize| index * PAGE_BYTES..(index + 1) * PAGE_BYTES;
        differ.extend(
            (0..some.len()).filter(|index| ours[page(*index)] != theirs[page(*index)]).map(|i| some[i]),
        );
    }
    assert!(differ.is_empty(), "round {round}: pages {differ:?} differ");
}

/// Kernel and initial RAM disk.
fn guest() -> Option<(String, String)> {
    let guest = (std::env::var("COLO_TEST_KERNEL"), std::env::var("COLO_TEST_INITRD"));
    if let (Ok(kernel), Ok(initrd)) = guest {
        return Some((kernel, initrd));
    }
    println!("skipped: COLO_TEST_KERNEL and COLO_TEST_INITRD name no guest");
    None
}

fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: no {program}");
    }
    found
}

#[test]
fn a_guest_goes_on_in_the_other_qemu() {
    let Some(guest) = guest() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut primary = Guest::launch(directory.path(), "primary", &guest);
    let mut secondary = Guest::launch(directory.path(), "secondary", &guest);
    assert_eq!(primary.vm.ram_blocks(), secondary.vm.ram_blocks());
    assert_eq!(primary.vm.identity(), secondary.vm.identity());
    let pages = primary.vm.ram_blocks().iter().map(|block| block.bytes / PAGE_BYTES as u64).sum();
    primary.vm.resume().unwrap();
    primary.wait_for_tick(3);

    let mut durations = Durations::default();
    let (mut state, mut dirty_counts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut dirty = PageSet::new(pages);
        durations.measure("stop PVM", || primary.vm.pause()).unwrap();
        if round == 0 {
            primary.vm.start_tracking(&mut dirty).unwrap();
            secondary.vm.start_tracking(&mut dirty).unwrap();
        } else {
            durations.measure("stop SVM", || secondary.vm.pause()).unwrap();
            durations.measure("scan PVM", || primary.vm.take_dirty(&mut dirty)).unwrap();
            durations.measure("scan SVM", || secondary.vm.take_dirty(&mut dirty)).unwrap();
            dirty_counts.push(dirty.len());
        }
        durations.measure("save", || primary.vm.save_devices(&mut state)).unwrap();
        // Saving may write guest memory too.
        primary.vm.take_dirty(&mut dirty).unwrap();
        durations.measure("copy", || copy(&primary.vm, &mut secondary.vm, &dirty));
        durations.measure("load", || secondary.vm.load_devices(&state)).unwrap();
        let mut touched = PageSet::new(pages);
        secondary.vm.take_dirty(&mut touched).unwrap();
        copy(&primary.vm, &mut secondary.vm, &touched);
        assert_equal(&primary.vm, &secondary.vm, pages, round);
        let tick = primary.ticks();
        durations.measure("cont", || primary.vm.resume()).unwrap();
        secondary.vm.resume().unwrap();
        primary.wait_for_tick(tick + 2);
        secondary.wait_for_tick(tick + 2);
        if round % 10 == 0 {
            println!(
                "round {round}: {} pages, {} touched by the load, state {} B",
                dirty.len(),
                touched.len(),
                state.len()
            );
        }
    }
    dirty_counts.sort_unstable();
    println!("{pages} pages, dirty per round: median {}", dirty_counts[dirty_counts.len() / 2]);
    durations.print();

    drop(primary);
    let tick = secondary.ticks();
    secondary.wait_for_tick(tick + 5);
    assert_eq!(secondary.vm.ended(), None);
}

#[test]
fn what_qemu_cannot_do_is_told_in_its_words() {
    let launch = |config: QemuConfig| QemuVm::launch(&config).err().unwrap().to_string();
    let missing = launch(QemuConfig { binary: "/nonexistent/qemu".into(), ..QemuConfig::default() });
    assert!(missing.contains("/nonexistent/qemu") && missing.contains("install QEMU"), "{missing}");
    if !installed("qemu-system-x86_64") {
        return;
    }
    let machine = launch(QemuConfig { machine: "nonsense".into(), ..QemuConfig::default() });
    assert!(machine.contains("unsupported machine type"), "{machine}");
    let disk = Disk { socket: "/nonexistent/blk.sock".into(), queues: 1 };
    let socket = launch(QemuConfig { disks: vec![disk], ..QemuConfig::default() });
    assert!(socket.contains("/nonexistent/blk.sock"), "{socket}");
}

#[test]
fn loading_leaves_the_image_sound() {
    if !installed("qemu-system-x86_64") || !installed("qemu-img") {
        return;
    }
    let mut vm = QemuVm::launch(&QemuConfig { memory_bytes: 32 << 20, ..QemuConfig::default() }).unwrap();
    let mut state = Vec::new();
    for _ in 0..LOADS {
        vm.save_devices(&mut state).unwrap();
        vm.load_devices(&state).unwrap();
    }
    let copy = tempfile::NamedTempFile::new().unwrap();
    std::fs::copy(format!("/proc/self/fd/{}", vm.devices.image_fd().as_raw_fd()), copy.path()).unwrap();
    let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(copy.path()).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout) + String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success() && said.contains("No errors were found"), "{said}");
}
