//! Datagrams to the guest's echo and back, as a DNS client would send them.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::stall::Stalls;
use crate::{GUEST, Namespace};

/// Time after which a datagram counts as lost and is sent again, as a resolver would.
const PATIENCE: Duration = Duration::from_millis(500);

/// Asks the guest's echo without end, one question at a time.
#[derive(Debug)]
pub struct UdpEcho {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<UdpResult>>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct UdpResult {
    /// Questions asked.
    pub sent: u64,
    /// Questions that had to be asked again.
    pub lost: u64,
    /// How long the answers took.
    pub stalls: Stalls,
}

impl UdpEcho {
    /// Starts asking from inside `namespace`, with `pause` between questions.
    ///
    /// # Errors
    /// No socket can be opened.
    pub fn start(namespace: &Namespace, pause: Duration) -> Result<Self> {
        let socket = namespace.run(|| UdpSocket::bind("0.0.0.0:0"))?.context("Cannot open a UDP socket")?;
        socket.connect((GUEST, 7))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut result = UdpResult::default();
            while !stopping.load(Ordering::Relaxed) {
                result.sent += 1;
                ask(&socket, &mut result)?;
                thread::sleep(pause);
            }
            Ok(result)
        });
        Ok(Self { stop, thread })
    }

    /// Ends it.
    ///
    /// # Errors
    /// An answer was wrong, or none came however often the question was asked.
    pub fn stop(self) -> Result<UdpResult> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("The client panicked"))?
    }
}

fn ask(socket: &UdpSocket, result: &mut UdpResult) -> Result<()> {
    let question = format!("question {}", result.sent);
    let began = Instant::now();
    for attempt in 0..20 {
        if attempt > 0 {
            result.lost += 1;
        }
        socket.send(question.as_bytes()).context("Cannot send a datagram")?;
        let mut answer = [0; 100];
        // the answer to an earlier attempt at an earlier question may still come; anything else is wrong
        while let Ok(bytes) = socket.recv(&mut answer) {
            let answer = String::from_utf8_lossy(&answer[..bytes]);
            if answer == question {
                result.stalls.record(began);
                return Ok(());
            }
            let number = answer.strip_prefix("question ").and_then(|number| number.parse::<u64>().ok());
            ensure!(
                number.is_some_and(|number| number < result.sent),
                "{question:?} was answered by {answer:?}"
            );
        }
    }
    Err(anyhow!("{question:?} has no answer after {:?}", began.elapsed()))
}
