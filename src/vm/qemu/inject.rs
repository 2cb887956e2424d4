//! Makes another process carry out a system call, as a debugger would, and leaves no trace in it.

#![expect(unsafe_code, reason = "ptrace")]

use std::ffi::{c_uint, c_void};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;

use rustix::process::Pid;

/// The instruction `syscall` of x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of the kernel's signal set.
const SIGNAL_SET_BYTES: usize = 8;
/// A process that needs more steps for one instruction is being stopped by somebody else.
const STEPS_MAX: usize = 64;

/// A stopped thread. It goes on where it was when this is dropped, in the middle of a system call if it was there. Its other
/// threads go on all the time.
pub(super) struct Stopped {
    thread: Pid,
    registers: libc::user_regs_struct,
    signals_blocked: u64,
    syscall_at: u64,
    /// ptrace is bound to the thread that attached.
    _not_send: PhantomData<*const ()>,
}

impl Stopped {
    /// Stops the main thread of `process`.
    ///
    /// It is best done while that waits in a system call, as the main thread of an idle program does: one that is stopped
    /// inside a restartable sequence would not be told.
    pub(super) fn seize(process: Pid) -> io::Result<Self> {
        let syscall_at = find_syscall(process)?;
        ptrace(libc::PTRACE_SEIZE, process, 0, std::ptr::null_mut())?;
        let attached = Attached(process);
        ptrace(libc::PTRACE_INTERRUPT, process, 0, std::ptr::null_mut())?;
        // A signal may come first: let it be delivered.
        while let Stop::Signal(signal) = wait(process)? {
            ptrace(libc::PTRACE_CONT, process, 0, signal as usize as *mut c_void)?;
        }
        let registers = get_registers(process)?;
        let mut signals_blocked = 0u64;
        ptrace(libc::PTRACE_GETSIGMASK, process, SIGNAL_SET_BYTES, (&raw mut signals_blocked).cast())?;
        let mut all_but_trap = !(1u64 << (libc::SIGTRAP - 1));
        ptrace(libc::PTRACE_SETSIGMASK, process, SIGNAL_SET_BYTES, (&raw mut all_but_trap).cast())?;
        std::mem::forget(attached);
        Ok(Self { thread: process, registers, signals_blocked, syscall_at, _not_send: PhantomData })
    }

    /// Has it carry out one system call and returns its result.
    pub(super) fn syscall(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<u64> {
        let mut registers = self.registers;
        registers.rip = self.syscall_at;
        registers.rax = number as u64;
        // Not in a system call: the kernel must not try to restart one.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
        set_registers(self.thread, &registers)?;
        for _ in 0..STEPS_MAX {
            ptrace(libc::PTRACE_SINGLESTEP, self.thread, 0, std::ptr::null_mut())?;
            wait(self.thread)?;
            let after = get_registers(self.thread)?;
            if after.rip == self.syscall_at + SYSCALL.len() as u64 {
                return match after.rax as i64 {
                    error @ -4095..0 => Err(io::Error::from_raw_os_error(-error as i32)),
                    result => Ok(result as u64),
                };
            }
        }
        Err(io::Error::other("the process was stopped again and again by somebody else"))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // None of these fails unless the process is gone.
        let _gone = set_registers(self.thread, &self.registers);
        let mask = (&raw mut self.signals_blocked).cast();
        let _gone = ptrace(libc::PTRACE_SETSIGMASK, self.thread, SIGNAL_SET_BYTES, mask);
        drop(Attached(self.thread));
    }
}

/// Detaches when dropped.
struct Attached(Pid);

impl Drop for Attached {
    fn drop(&mut self) {
        let _gone = ptrace(libc::PTRACE_DETACH, self.0, 0, std::ptr::null_mut());
    }
}

/// `data` is what the request wants: a number, null, or a pointer to what it reads or writes.
fn ptrace(request: c_uint, thread: Pid, address: usize, data: *mut c_void) -> io::Result<()> {
    // SAFETY: the requests of this module read or write at most a register set or a signal set at `data`, and the callers give
    // pointers to exactly these.
    match unsafe { libc::ptrace(request, thread.as_raw_nonzero().get(), address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn get_registers(thread: Pid) -> io::Result<libc::user_regs_struct> {
    // SAFETY: a plain structure of integers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, thread, 0, (&raw mut registers).cast())?;
    Ok(registers)
}

fn set_registers(thread: Pid, registers: &libc::user_regs_struct) -> io::Result<()> {
    ptrace(libc::PTRACE_SETREGS, thread, 0, std::ptr::from_ref(registers).cast_mut().cast())
}

/// Why a thread stopped.
enum Stop {
    /// We asked for it.
    Asked,
    /// A signal is about to be delivered.
    Signal(i32),
}

fn wait(thread: Pid) -> io::Result<Stop> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is an integer to be written.
        let waited = unsafe { libc::waitpid(thread.as_raw_nonzero().get(), &raw mut status, libc::__WALL) };
        if waited != -1 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if !libc::WIFSTOPPED(status) {
        return Err(io::Error::other("the process has ended"));
    }
    if status >> 16 == libc::PTRACE_EVENT_STOP {
        Ok(Stop::Asked)
    } else {
        Ok(Stop::Signal(libc::WSTOPSIG(status)))
    }
}

/// The address of a `syscall` instruction in the process: the vDSO has one, and so has every C library.
fn find_syscall(process: Pid) -> io::Result<u64> {
    let pid = process.as_raw_nonzero();
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let maps = BufReader::new(File::open(format!("/proc/{pid}/maps"))?);
    let mut code = Vec::new();
    for line in maps.lines() {
        let line = line?;
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(protection)) = (fields.next(), fields.next()) else { continue };
        let name = fields.nth(3).unwrap_or("");
        let wanted = name == "[vdso]" || name.contains("/libc");
        if let Some((from, to)) = range.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
            && wanted
            && protection.starts_with("r-x")
        {
            code.resize((to - from) as usize, 0);
            memory.read_exact_at(&mut code, from)?;
            if let Some(offset) = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL) {
                return Ok(from + offset as u64);
            }
        }
    }
    Err(io::Error::other("no system call instruction found in the process"))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    fn sleeper(seconds: &str) -> Child {
        let child = Command::new("sleep").arg(seconds).spawn().unwrap();
        // Until it has executed the program and waits in its system call.
        let syscall = format!("/proc/{}/syscall", child.id());
        let waits = |text: String| text.starts_with(&libc::SYS_clock_nanosleep.to_string());
        while !std::fs::read_to_string(&syscall).is_ok_and(waits) {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn the_call_is_made_by_the_other_process_which_sleeps_on() {
        let began = Instant::now();
        let mut child = sleeper("0.5");
        let pid = Pid::from_child(&child);
        for _ in 0..20 {
            let mut stopped = Stopped::seize(pid).unwrap();
            let told = stopped.syscall(libc::SYS_getpid, [0; 6]).unwrap();
            assert_eq!(told, u64::from(child.id()));
            let error = stopped.syscall(libc::SYS_close, [u64::MAX, 0, 0, 0, 0, 0]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
        assert!(child.wait().unwrap().success());
        assert!(began.elapsed() >= Duration::from_millis(500));
    }

    #[test]
    fn signals_wait_and_are_delivered_afterwards() {
        let mut child = sleeper("1000");
        let pid = Pid::from_child(&child);
        let mut stopped = Stopped::seize(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(stopped.syscall(libc::SYS_getpid, [0; 6]).unwrap(), u64::from(child.id()));
        drop(stopped);
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(libc::SIGTERM)
        );
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        child.wait().unwrap();
        assert!(Stopped::seize(pid).is_err());
    }
}
