//! The scheduling class of a thread that must run on time.

/// Asks for the lowest real-time priority for the calling thread, so that busy guests on the same cores do not make
/// it late. Without the right to it (CAP_SYS_NICE) the thread stays as it is: later, not wrong.
#[expect(unsafe_code, reason = "sched_setscheduler has no safe wrapper in our dependencies")]
pub fn prefer_this_thread() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: thread 0 is the calling one, and the parameter is a valid struct that outlives the call.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameter) };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!("No real-time priority: {error}");
    }
}
