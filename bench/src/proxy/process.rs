//! Our comparison as a process that stands where colo-compare does: the same three sockets, one thread that polls. It
//! takes no checkpoints, so what differs is held for ever. A thin loop around the library, to tell what of colo-filter's cost
//! is its own ([`super::Contender::Polling`]).

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use vhost_net_backend::compare::{Compare, Limits};
use vhost_net_backend::packet::Packet;
use vhost_net_backend::proxy::{Action, Actions};

use super::filter::{self, Filled, Incoming};
use crate::net::load::pin;

/// With more bytes of released frames than this waiting for their reader, nothing is read.
const OUTGOING_BYTES_MAX: usize = 1 << 20;

/// Serves one connection at each socket, until the primary's ends: the primary's packets come, the secondary's, and
/// what is released goes out.
///
/// # Errors
/// A socket cannot be made or breaks.
pub fn serve([primary, secondary, output]: &[PathBuf; 3], core: usize) -> Result<()> {
    pin(core)?;
    let bind = |path: &PathBuf| UnixListener::bind(path).with_context(|| path.display().to_string());
    let listeners = [bind(primary)?, bind(secondary)?, bind(output)?];
    let accept = |listener: &UnixListener| -> io::Result<UnixStream> {
        let stream = listener.accept()?.0;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let [primary, secondary, output] = listeners.each_ref().map(accept);
    let process = Process {
        primary: Incoming::new(primary?),
        secondary: Incoming::new(secondary?),
        output: output?,
        outgoing: Vec::new(),
        written: 0,
        compare: Compare::new(Limits::default()),
        actions: Actions::new(),
    };
    process.run()
}

struct Process {
    primary: Incoming,
    secondary: Incoming,
    output: UnixStream,
    outgoing: Vec<u8>,
    /// So much of it is written.
    written: usize,
    compare: Compare,
    actions: Actions,
}

impl Process {
    fn run(mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            let now_us = began.elapsed().as_micros() as u64;
            if self.outgoing.len() - self.written < OUTGOING_BYTES_MAX {
                if self.compare.has_room() && self.take_primary(now_us)? == Filled::End {
                    return Ok(());
                }
                self.take_secondary(now_us)?;
            }
            if self.compare.next_deadline().is_some_and(|due_us| due_us <= now_us) {
                self.compare.tick(now_us, &mut self.actions);
            }
            for action in self.actions.iter() {
                if let Action::ToLan(frame) = action {
                    filter::push(frame, &mut self.outgoing);
                }
            }
            self.actions.clear();
            self.write()?;
        }
    }

    fn take_primary(&mut self, now_us: u64) -> Result<Filled> {
        let filled = self.primary.fill().context("The primary's socket")?;
        while let Some(frame) = self.primary.next_frame()? {
            let frame = self.actions.pool().copy_of(frame);
            let packet = Packet::parse(&frame);
            self.compare.pvm_says(frame, packet, now_us, &mut self.actions);
        }
        Ok(filled)
    }

    fn take_secondary(&mut self, now_us: u64) -> Result<()> {
        self.secondary.fill().context("The secondary's socket")?;
        while let Some(frame) = self.secondary.next_frame()? {
            self.compare.svm_says(frame, now_us, &mut self.actions);
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        if self.written == self.outgoing.len() {
            return Ok(());
        }
        match self.output.write(&self.outgoing[self.written..]) {
            Ok(bytes) => self.written += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("The output's socket"),
        }
        if self.written == self.outgoing.len() {
            self.outgoing.clear();
            self.written = 0;
        }
        Ok(())
    }
}
