//! Less disturbance by whatever else the machine does while something is measured.
#![expect(unsafe_code, reason = "the end of the process is only told to C functions")]

use std::fs;
use std::sync::Mutex;

const AUTOGROUP: &str = "/proc/self/autogroup";
const HIGHEST: i32 = -20;

static AUTOGROUP_BEFORE: Mutex<Option<String>> = Mutex::new(None);

/// From now on this program and all that it starts come before others, ours and the peers alike. Says when the system
/// does not allow it.
///
/// Where the scheduler groups processes by session, niceness counts inside of a session only; so the session comes
/// first as well, until this program ends (unless it is killed: `echo 0 >/proc/self/autogroup` undoes that).
pub fn take() {
    if let Err(error) = rustix::process::setpriority_process(None, HIGHEST) {
        eprintln!("No priority over others ({error}): run this as root, or on a machine that is idle");
        return;
    }
    // the file says "/autogroup-8 nice 0"; it is absent or refuses where there are no such groups
    let Ok(text) = fs::read_to_string(AUTOGROUP) else {
        return;
    };
    let Some(before) = text.split_whitespace().last() else {
        return;
    };
    if fs::write(AUTOGROUP, HIGHEST.to_string()).is_ok() {
        *AUTOGROUP_BEFORE.lock().expect("nothing panics while it holds this lock") = Some(before.to_owned());
        // SAFETY: `give_back` does not unwind and uses nothing that ends before the process does.
        unsafe { libc::atexit(give_back) };
    }
}

extern "C" fn give_back() {
    if let Ok(mut before) = AUTOGROUP_BEFORE.lock()
        && let Some(before) = before.take()
    {
        // it was allowed before; a session that stays preferred harms nobody
        drop(fs::write(AUTOGROUP, before));
    }
}
