//! The QEMU process: started, its last words kept, never outliving us.

#![expect(unsafe_code, reason = "what the child does between fork and exec can only be said with pre_exec")]

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};

/// How many lines of what QEMU wrote to stderr are kept for the message that tells its end.
const LINES_MAX: usize = 8;
/// A longer line is cut.
const LINE_BYTES_MAX: u64 = 1024;
/// A guest can make QEMU complain: more lines than this in a second are not logged.
const LOGGED_PER_SECOND: u32 = 10;
/// A killed QEMU that is not gone after this long hangs in the kernel, and is left to it.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A running QEMU. Dropping it kills it; so does the end of this process.
pub(super) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    ending: Arc<Ending>,
}

#[derive(Default)]
struct Ending {
    state: Mutex<EndingState>,
    ended: Condvar,
}

#[derive(Default)]
struct EndingState {
    last_words: VecDeque<String>,
    status: Option<String>,
}

impl Process {
    /// Starts `binary` with the descriptors `inherited` under their own numbers.
    pub(super) fn spawn(binary: &Path, arguments: &[OsString], inherited: &[RawFd]) -> io::Result<Self> {
        let parent = rustix::process::getpid();
        let inherited = inherited.to_vec();
        let mut command = Command::new(binary);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let before_exec = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(parent) {
                return Err(io::Error::from(rustix::io::Errno::SRCH));
            }
            for fd in &inherited {
                // SAFETY: the caller keeps these descriptors open until spawn returns, and the fork has copied them.
                fcntl_setfd(unsafe { BorrowedFd::borrow_raw(*fd) }, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: `before_exec` makes three kinds of system calls and allocates nothing.
        unsafe { command.pre_exec(before_exec) };

        // The kernel sends the death signal when the *thread* that forked ends, so the thread that forks is the one that
        // stays until QEMU is gone.
        let ending = Arc::new(Ending::default());
        let (started, start) = mpsc::channel();
        let keeper = {
            let ending = ending.clone();
            move || {
                let spawned = command.spawn().and_then(|child| {
                    let pid = Pid::from_child(&child);
                    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
                    Ok((child, pidfd.try_clone()?, pidfd, pid))
                });
                match spawned {
                    Err(error) => drop(started.send(Err(error))),
                    Ok((child, ours, theirs, pid)) => {
                        drop(started.send(Ok((theirs, pid))));
                        keep(child, ours.as_fd(), &ending);
                    }
                }
            }
        };
        thread::Builder::new().name("qemu-keeper".into()).spawn(keeper)?;
        let (pidfd, pid) =
            start.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that starts QEMU died")))?;
        Ok(Self { pid, pidfd, ending })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Readable once QEMU has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(super) fn kill(&self) {
        // Fails only when it is gone already.
        let _gone = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// How QEMU ended and its last words, once it has; waits for it up to `limit`.
    pub(super) fn ended(&self, limit: Duration) -> Option<String> {
        let state = self.ending.state.lock().unwrap_or_else(PoisonError::into_inner);
        let running = |state: &mut EndingState| state.status.is_none();
        let (state, _) = self
            .ending
            .ended
            .wait_timeout_while(state, limit, running)
            .unwrap_or_else(PoisonError::into_inner);
        let status = state.status.as_ref()?;
        let words = state.last_words.iter().map(String::as_str).collect::<Vec<_>>().join("; ");
        Some(if words.is_empty() { status.clone() } else { format!("{words} ({status})") })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if self.ended(KILL_LIMIT).is_none() {
            tracing::error!(pid = self.pid.as_raw_nonzero(), "QEMU was killed and does not go");
        }
    }
}

/// Reads what QEMU complains about until it ends, then buries it.
fn keep(mut child: Child, pidfd: BorrowedFd<'_>, ending: &Ending) {
    if let Some(stderr) = child.stderr.take() {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        let (mut second, mut logged) = (Instant::now(), 0);
        loop {
            line.clear();
            match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            if text.is_empty() {
                continue;
            }
            if second.elapsed() > Duration::from_secs(1) {
                (second, logged) = (Instant::now(), 0);
            }
            logged += 1;
            if logged <= LOGGED_PER_SECOND {
                tracing::warn!("QEMU: {text}");
            }
            let mut state = ending.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.last_words.len() == LINES_MAX {
                state.last_words.pop_front();
            }
            state.last_words.push_back(text);
        }
    }
    // While our tracer has QEMU stopped, wait() would take the stops that the tracer waits for; a pidfd tells only the end.
    while poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
    let status = match child.wait() {
        Ok(status) => describe(status),
        Err(_) => "ended".into(),
    };
    ending.state.lock().unwrap_or_else(PoisonError::into_inner).status = Some(status);
    ending.ended.notify_all();
}

fn describe(status: ExitStatus) -> String {
    // The words of the standard library: "exit status: 1", "signal: 9 (SIGKILL)".
    status.to_string()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn shell(script: &str, inherited: &[RawFd]) -> Process {
        Process::spawn(Path::new("/bin/sh"), &["-c".into(), script.into()], inherited).unwrap()
    }

    #[test]
    fn the_last_words_are_kept() {
        let process = shell("echo no such device >&2; exit 3", &[]);
        assert_eq!(process.ended(Duration::from_secs(5)).unwrap(), "no such device (exit status: 3)");
    }

    #[test]
    fn a_missing_program_is_told_at_once() {
        let error = Process::spawn(Path::new("/nonexistent/qemu"), &[], &[]).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn inherits_what_it_is_told_to_and_nothing_else() {
        let told = tempfile::tempfile().unwrap();
        let other = tempfile::tempfile().unwrap();
        let (told, other) = (told.as_raw_fd(), other.as_raw_fd());
        let script = format!("test -e /proc/self/fd/{told} && ! test -e /proc/self/fd/{other}");
        assert_eq!(shell(&script, &[told]).ended(Duration::from_secs(5)).unwrap(), "exit status: 0");
    }

    #[test]
    fn dropping_kills() {
        let process = shell("exec sleep 1000", &[]);
        let pidfd = process.pidfd.try_clone().unwrap();
        drop(process);
        assert!(pidfd_send_signal(&pidfd, Signal::KILL).is_err());
    }
}
