//! The same I/O on the same file without vhost-user: what a device server could do at best with these means.
#![expect(unsafe_code, reason = "io_uring takes raw buffers")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use core_affinity::CoreId;
use io_uring::{IoUring, opcode, squeue, types};

use super::disk::Aligned;
use super::{Access, Disk, Measured, Pattern};
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::{Histogram, cpu_time};

const WARM_UP: Duration = Duration::from_millis(100);
const BLOCK: usize = 4096;

/// How the bare loop does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// An io_uring with a registered file; with O_DIRECT also with registered buffers.
    IoUring,
    /// One pread or pwrite after the other, so the depth is always 1.
    Synchronous,
}

/// A bare loop on one core.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// By which means.
    pub means: Means,
    /// With O_DIRECT.
    pub direct: bool,
    /// Blocks of 4 KiB in flight.
    pub depth: u16,
    /// Which ones.
    pub access: Access,
    /// Where to run.
    pub core: usize,
    /// How long to measure.
    pub duration: Duration,
}

impl Bare {
    /// Measures it, on a thread of its own.
    ///
    /// # Errors
    /// The file cannot be opened so, or some I/O fails.
    pub fn run(&self, disk: &Disk, blocks: u64) -> Result<Measured> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let file = options.open(disk.path()).context("Cannot open the image")?;
        let mut pattern = Pattern::new(self.access, blocks, 0);
        let work = || {
            ensure!(
                core_affinity::set_for_current(CoreId { id: self.core }),
                "Core {} is not ours",
                self.core
            );
            match self.means {
                Means::IoUring => self.io_uring(&file, &mut pattern),
                Means::Synchronous => self.synchronous(&file, &mut pattern),
            }
        };
        std::thread::scope(|scope| scope.spawn(work).join().map_err(|_| anyhow!("The loop panicked"))?)
    }

    fn synchronous(&self, file: &File, pattern: &mut Pattern) -> Result<Measured> {
        let mut buffer = Aligned::new(BLOCK);
        let mut latencies = Histogram::default();
        let mut window = Window::new(self.duration);
        let mut began = ticks();
        while window.goes_on(began, &mut latencies) {
            let (write, block) = pattern.next_access();
            let offset = block * BLOCK as u64;
            if write {
                file.write_all_at(buffer.bytes_mut(), offset).context("pwrite")?;
            } else {
                file.read_exact_at(buffer.bytes_mut(), offset).context("pread")?;
            }
            let now = ticks();
            latencies.record(now - began);
            began = now;
        }
        window.measured(&latencies)
    }

    fn io_uring(&self, file: &File, pattern: &mut Pattern) -> Result<Measured> {
        let depth = usize::from(self.depth);
        // before the ring: it must outlive all that the kernel has in flight
        let mut memory = Aligned::new(BLOCK * depth);
        let base = memory.bytes_mut().as_mut_ptr();
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(u32::from(self.depth).next_power_of_two())
            .context("io_uring")?;
        ring.submitter().register_files(&[file.as_raw_fd()]).context("io_uring: the file")?;
        self.keep_workers_here(&ring)?;
        if self.direct {
            let whole = libc::iovec { iov_base: base.cast(), iov_len: BLOCK * depth };
            // SAFETY: `memory` outlives the ring, which is dropped first.
            unsafe { ring.submitter().register_buffers(&[whole]) }.context("io_uring: the buffers")?;
        }
        let mut entry = |slot: usize| {
            let buffer = base.wrapping_add(BLOCK * slot);
            let (write, block) = pattern.next_access();
            let (fd, bytes, offset) = (types::Fixed(0), BLOCK as u32, block * BLOCK as u64);
            let entry = match (write, self.direct) {
                (false, true) => opcode::ReadFixed::new(fd, buffer, bytes, 0).offset(offset).build(),
                (true, true) => opcode::WriteFixed::new(fd, buffer, bytes, 0).offset(offset).build(),
                (false, false) => opcode::Read::new(fd, buffer, bytes).offset(offset).build(),
                (true, false) => opcode::Write::new(fd, buffer, bytes).offset(offset).build(),
            };
            entry.user_data(slot as u64)
        };
        let mut stamps = vec![ticks(); depth];
        for slot in 0..depth {
            push(&mut ring, &entry(slot))?;
        }
        let mut latencies = Histogram::default();
        let mut window = Window::new(self.duration);
        let mut ended = Vec::with_capacity(depth);
        while window.goes_on(ticks(), &mut latencies) {
            ring.submit_and_wait(1).context("io_uring_enter")?;
            let now = ticks();
            ended.extend(ring.completion().map(|completion| (completion.user_data(), completion.result())));
            for (slot, result) in ended.drain(..) {
                ensure!(result == BLOCK as i32, "io_uring: a request of {BLOCK} bytes ended with {result}");
                let slot = slot as usize;
                latencies.record(now - stamps[slot]);
                stamps[slot] = now;
                push(&mut ring, &entry(slot))?;
            }
        }
        let measured = window.measured(&latencies)?;
        // some are pushed and not submitted; with all of them in the kernel, all of them come back
        let mut left = depth;
        while left > 0 {
            ring.submit_and_wait(1).context("io_uring_enter")?;
            left -= ring.completion().count();
        }
        Ok(measured)
    }
}

impl Bare {
    /// The kernel's helper threads run where the loop does, as those of the daemon do.
    fn keep_workers_here(&self, ring: &IoUring) -> Result<()> {
        // SAFETY: a set of plain bits, for which zeros are the empty one.
        let mut cores: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: a core beyond the set is ignored.
        unsafe { libc::CPU_SET(self.core, &mut cores) };
        ring.submitter().register_iowq_aff(&cores).context("io_uring: the core of its workers")
    }
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> Result<()> {
    // SAFETY: the buffer is a part of `memory`, of this slot only, and stays until everything has ended.
    unsafe { ring.submission().push(entry) }.context("io_uring: its queue is full")
}

/// The time that is measured, behind one that is not.
struct Window {
    duration: u64,
    end: u64,
    warm: bool,
    began: Instant,
    cpu: Result<Duration>,
}

impl Window {
    fn new(duration: Duration) -> Self {
        ticks_per_nanosecond();
        Self {
            duration: ticks_in(duration),
            end: ticks() + ticks_in(WARM_UP),
            warm: false,
            began: Instant::now(),
            cpu: Ok(Duration::ZERO),
        }
    }

    /// Whether there is time left; forgets the latencies when the measurement begins.
    fn goes_on(&mut self, now: u64, latencies: &mut Histogram) -> bool {
        if now < self.end {
            return true;
        }
        if self.warm {
            return false;
        }
        self.warm = true;
        *latencies = Histogram::default();
        self.began = Instant::now();
        self.cpu = cpu_time(std::process::id());
        self.end = now + self.duration;
        true
    }

    /// Also ends it. The processor time is that of the whole program, whose other threads sleep: the kernel's helpers
    /// (io-wq) are among its threads.
    fn measured(self, latencies: &Histogram) -> Result<Measured> {
        let elapsed = self.began.elapsed();
        let cpu = cpu_time(std::process::id())?.saturating_sub(self.cpu?);
        Ok(Measured::new(latencies, elapsed, cpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_means_read_and_write_their_file() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::create(directory.path(), 4 << 20, false).unwrap();
        let mut before = [0; BLOCK];
        disk.read_exact_at(&mut before, 0).unwrap();
        for means in [Means::IoUring, Means::Synchronous] {
            for access in [Access::READ, Access::WRITE] {
                let core = core_affinity::get_core_ids().unwrap()[0].id;
                let duration = Duration::from_millis(20);
                let bare = Bare { means, direct: false, depth: 4, access, core, duration };
                let measured = bare.run(&disk, 1).unwrap();
                assert!(measured.iops > 0.0 && measured.p50_us > 0.0, "{measured:?}");
                let mut after = [0; BLOCK];
                disk.read_exact_at(&mut after, 0).unwrap();
                // what the buffers hold: nothing was read into them by then
                let unchanged = after == before;
                assert_eq!(unchanged, access == Access::READ, "{means:?} {access:?}");
                before = [1; BLOCK];
                let written = std::fs::OpenOptions::new().write(true).open(disk.path()).unwrap();
                written.write_all_at(&before, 0).unwrap();
            }
        }
    }
}
