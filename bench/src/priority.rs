//! Less disturbance by whatever else the machine does while something is measured.

use std::fs;

const AUTOGROUP: &str = "/proc/self/autogroup";
const HIGHEST: i32 = -20;

/// This program and all that it starts come before others, as long as the value lives. Ours and the peers alike.
#[derive(Debug)]
pub struct Priority {
    autogroup_before: Option<String>,
}

impl Priority {
    /// Takes it as far as the system allows, and says when it does not.
    pub fn take() -> Self {
        let mut priority = Self { autogroup_before: None };
        if let Err(error) = rustix::process::setpriority_process(None, HIGHEST) {
            eprintln!("No priority over others ({error}): run this as root, or on a machine that is idle");
            return priority;
        }
        // Where the scheduler groups by session, niceness counts only inside of a session; this is the session's own.
        // The file says "/autogroup-8 nice 0", and is absent where there are no such groups.
        if let Ok(text) = fs::read_to_string(AUTOGROUP)
            && let Some(before) = text.split_whitespace().last()
            && fs::write(AUTOGROUP, HIGHEST.to_string()).is_ok()
        {
            priority.autogroup_before = Some(before.to_owned());
        }
        priority
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = &self.autogroup_before {
            // it was allowed before; a session that stays preferred harms nobody
            drop(fs::write(AUTOGROUP, before));
        }
    }
}
