//! Signs of life between the hosts, on a connection of their own.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::config::HeartbeatConfig;
use crate::link::{Decoder, write_frame};

const BEAT: u16 = 2;

/// Why the peer is taken for lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkLoss {
    /// Nothing was heard for longer than the limit.
    #[error("no heartbeat for {silent_ms} ms")]
    Silent {
        /// How long, in milliseconds.
        silent_ms: u64,
    },
    /// The peer's process has ended: its system closed the connection.
    #[error("the peer's program has ended")]
    Closed,
    /// The connection broke or carried nonsense.
    #[error("the heartbeat connection failed: {0}")]
    Failed(String),
}

/// The thread that beats and listens. It ends after it has reported a loss, or when this is dropped.
#[derive(Debug)]
pub struct Heartbeat {
    ended: Arc<AtomicBool>,
}

impl Heartbeat {
    /// Starts beating on a connection; `on_loss` is called once, when the peer is lost.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        stream: TcpStream,
        config: HeartbeatConfig,
        on_loss: impl FnOnce(LinkLoss) + Send + 'static,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let ended = Arc::new(AtomicBool::new(false));
        let thread_ended = ended.clone();
        std::thread::Builder::new().name("heartbeat".into()).spawn(move || {
            crate::runtime::prefer_this_thread();
            let loss = beat(stream, &config, &thread_ended);
            if let Some(loss) = loss
                && !thread_ended.swap(true, Ordering::Relaxed)
            {
                on_loss(loss);
            }
        })?;
        Ok(Self { ended })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn beat(mut stream: TcpStream, config: &HeartbeatConfig, ended: &AtomicBool) -> Option<LinkLoss> {
    let mut decoder = Decoder::default();
    let mut heard = Instant::now();
    let mut next_beat = heard;
    let mut number = 0;
    while !ended.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= next_beat {
            // A full socket buffer is no loss by itself: the peer's silence will tell.
            match write_frame(&mut stream, BEAT, number, &[]) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Some(loss_of(&error)),
                _ => {}
            }
            number += 1;
            next_beat = now + config.interval();
        }
        let wake = next_beat.min(heard + config.limit()).saturating_duration_since(now);
        match wait_readable(&stream, wake) {
            Ok(()) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Some(LinkLoss::Failed(error.to_string())),
        }
        // What has arrived counts before the clock does: if this thread was kept from running, the peer is not to blame.
        match take_beats(&mut stream, &mut decoder) {
            Ok(true) => heard = Instant::now(),
            Ok(false) => {}
            Err(loss) => return Some(loss),
        }
        let silent = heard.elapsed();
        if silent >= config.limit() {
            return Some(LinkLoss::Silent { silent_ms: silent.as_millis() as u64 });
        }
    }
    None
}

fn wait_readable(stream: &TcpStream, limit: Duration) -> Result<(), rustix::io::Errno> {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&limit)).map(|_| ())
}

/// Reads what is there; true when a heartbeat was among it.
fn take_beats(stream: &mut impl Read, decoder: &mut Decoder) -> Result<bool, LinkLoss> {
    let mut heard = false;
    loop {
        match decoder.fill(stream) {
            Ok(0) => return Err(LinkLoss::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(heard),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(loss_of(&error)),
        }
        while let Some((header, _)) = decoder.next_frame().map_err(|e| LinkLoss::Failed(e.to_string()))? {
            heard |= header.kind == BEAT;
        }
    }
}

fn loss_of(error: &io::Error) -> LinkLoss {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => LinkLoss::Closed,
        _ => LinkLoss::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use crossbeam_channel::{Receiver, unbounded};

    use super::*;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let left = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (left, listener.accept().unwrap().0)
    }

    fn start(stream: TcpStream) -> (Heartbeat, Receiver<LinkLoss>) {
        let (sender, losses) = unbounded();
        let config = HeartbeatConfig { interval_ms: 20, limit_ms: 300 };
        (Heartbeat::start(stream, config, move |loss| sender.send(loss).unwrap()).unwrap(), losses)
    }

    #[test]
    fn two_that_beat_lose_nothing_and_an_end_is_noticed_at_once() {
        let (left, right) = connection();
        let (left, left_losses) = start(left);
        let (_right, right_losses) = start(right);
        assert!(left_losses.recv_timeout(Duration::from_secs(1)).is_err(), "lost while both beat");
        drop(left);
        assert_eq!(right_losses.recv_timeout(Duration::from_secs(2)), Ok(LinkLoss::Closed));
        assert!(left_losses.try_recv().is_err(), "a dropped heartbeat reports nothing");
    }

    #[test]
    fn silence_is_noticed_after_the_limit() {
        let (left, _silent) = connection();
        let began = Instant::now();
        let (_left, losses) = start(left);
        let loss = losses.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(matches!(loss, LinkLoss::Silent { silent_ms } if silent_ms >= 300), "{loss:?}");
        assert!(began.elapsed() >= Duration::from_millis(300));
    }

    #[test]
    fn nonsense_is_a_loss() {
        let (left, mut right) = connection();
        let (_left, losses) = start(left);
        io::Write::write_all(&mut right, &[b'x'; 64]).unwrap();
        let loss = losses.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(matches!(loss, LinkLoss::Failed(_)), "{loss:?}");
    }
}
