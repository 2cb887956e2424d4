//! Settings of the kernel that a benchmark changes, and gives back when its program ends (unless it is killed).
#![expect(unsafe_code, reason = "the end of the process is only told to C functions")]

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Where they are, and what they were.
static BEFORE: Mutex<Vec<(&str, String)>> = Mutex::new(Vec::new());

/// Writes `value` to the file at `path`, and `before` to it when the program ends.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn change(path: &'static str, before: &str, value: &str) -> io::Result<()> {
    fs::write(path, value)?;
    let mut all = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    if all.is_empty() {
        // SAFETY: `give_back` does not unwind and uses nothing that ends before the process does.
        unsafe { libc::atexit(give_back) };
    }
    all.push((path, before.to_owned()));
    Ok(())
}

extern "C" fn give_back() {
    let mut all = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    for (path, before) in all.drain(..).rev() {
        // it was allowed before; one that stays changed harms nobody
        drop(fs::write(path, before));
    }
}
