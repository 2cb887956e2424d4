//! Time stamps that cost a few nanoseconds.
#![expect(unsafe_code, reason = "the time stamp counter is read with an intrinsic")]

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: every x86_64 processor has the instruction; it reads a register and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Nanoseconds since the first call, where there is no counter that we know.
#[cfg(not(target_arch = "x86_64"))]
pub fn ticks() -> u64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGAN.elapsed().as_nanos() as u64
}

static PER_NANOSECOND: LazyLock<f64> = LazyLock::new(|| {
    let (began, first) = (Instant::now(), ticks());
    while began.elapsed() < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
    let (nanoseconds, ticks) = (began.elapsed().as_nanos(), ticks() - first);
    #[expect(clippy::cast_precision_loss, reason = "50 ms are far from 2^53 of anything")]
    let rate = ticks as f64 / nanoseconds as f64;
    rate
});

/// Ticks in a nanosecond; the first call measures it for 50 ms.
pub fn ticks_per_nanosecond() -> f64 {
    *PER_NANOSECOND
}

/// So many ticks pass in `time`.
#[expect(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "of a duration")]
pub fn ticks_in(time: Duration) -> u64 {
    (time.as_nanos() as f64 * ticks_per_nanosecond()) as u64
}
