//! Less disturbance by whatever else the machine does while something is measured.

use std::fs;

use crate::kernel_setting;

const AUTOGROUP: &str = "/proc/self/autogroup";
const HIGHEST: i32 = -20;

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
    // where it is refused, there is only the niceness
    drop(kernel_setting::change(AUTOGROUP, before, &HIGHEST.to_string()));
}
