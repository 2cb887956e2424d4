//! Ctrl-C and SIGTERM end a program only after its laboratories are gone.
#![expect(unsafe_code, reason = "signal masks have no safe interface in our dependencies")]

use std::thread;

use crate::run::end_runs;

/// Call it first in `main`, before any thread is started: from then on SIGINT, SIGTERM and SIGHUP remove all
/// laboratories of this process and then end it, with the status that a shell expects.
///
/// # Panics
/// When no thread can be started.
pub fn end_on_signals() {
    // SAFETY: sigset_t is plain data, valid when zeroed, and initialised by sigemptyset before use; the calls get
    // pointers to a local that outlives them.
    let signals = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&raw mut signals, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        signals
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: both point to locals of this closure.
            let result = unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
            if result == 0 {
                eprintln!("\nInterrupted, cleaning up");
                end_runs(|_| true);
                std::process::exit(128 + signal);
            }
        })
        .expect("a thread can be started at the beginning of a program");
}
