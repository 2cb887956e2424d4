//! What must hold on this host and for this VM before it can be protected. Each fault is a sentence with its remedy.

use super::tracker;

/// The oldest QEMU that this was tried with.
pub(super) const VERSION_MIN: (u64, u64) = (7, 2);

/// The first kernel with PAGEMAP_SCAN and asynchronous write protection.
const KERNEL_MIN: (u32, u32) = (6, 7);

/// Version of the running kernel, as far as its name tells.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|character: char| !character.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

pub(super) fn kernel_is_too_old() -> bool {
    kernel_version(&release()).is_some_and(|version| version < KERNEL_MIN)
}

/// Why this kernel cannot tell which pages QEMU wrote, if that is so.
pub(super) fn tracker_failed() -> Option<String> {
    let error = tracker::self_test().err()?;
    let (major, minor) = KERNEL_MIN;
    Some(if kernel_is_too_old() {
        format!(
            "Linux {} cannot tell which pages QEMU wrote: boot {major}.{minor} or later (Debian 12: linux-image-amd64 from \
             bookworm-backports)",
            release()
        )
    } else {
        format!(
            "This kernel ({}) does not tell which pages a process wrote: {error}; it needs userfaultfd with asynchronous write \
             protection and PAGEMAP_SCAN (CONFIG_USERFAULTFD, CONFIG_PTE_MARKER_UFFD_WP, CONFIG_PROC_PAGE_MONITOR)",
            release()
        )
    })
}
