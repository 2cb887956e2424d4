//! How two sides meet: some connections from the primary to one port of the secondary, one for each channel.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

use crate::link::{Channel, Hello, HelloError, accept_hello, offer_hello};

/// How long a connected peer may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// Time between two attempts to reach a peer that is not there yet.
const RETRY: Duration = Duration::from_millis(200);

/// The channels of a VM with so many network cards.
fn channels(cards: usize) -> Vec<Channel> {
    let others = [Channel::Checkpoint, Channel::Heartbeat, Channel::Block];
    others.into_iter().chain((0..cards).map(Channel::Network)).collect()
}

/// The connections of a pair.
pub(super) struct Links {
    pub(super) checkpoint: TcpStream,
    pub(super) heartbeat: TcpStream,
    /// One for each network card.
    pub(super) network: Vec<TcpStream>,
    pub(super) block: TcpStream,
}

impl Links {
    /// Of streams in the order of [`channels`], one for each.
    fn of(streams: Vec<TcpStream>) -> Self {
        let mut streams = streams.into_iter();
        let mut next = || streams.next().expect("one for each channel");
        let (checkpoint, heartbeat, block) = (next(), next(), next());
        Self { checkpoint, heartbeat, network: streams.collect(), block }
    }
}

/// Connects to the secondary of a VM with so many network cards. A peer that is not there yet is waited for, at most `limit`.
pub(super) fn connect(
    to: SocketAddr,
    ours: &Hello,
    cards: usize,
    limit: Option<Duration>,
) -> anyhow::Result<Links> {
    let began = Instant::now();
    let mut told = false;
    loop {
        match try_connect(to, ours, cards) {
            Ok(links) => return Ok(links),
            Err(Failure::NotThere(error)) => {
                if limit.is_some_and(|limit| began.elapsed() > limit) {
                    return Err(error).with_context(|| {
                        format!(
                            "The secondary does not answer at {to}: start `colo run` there, or check the link"
                        )
                    });
                }
                if !told {
                    tracing::info!("Waiting for the secondary at {to} ({error})");
                    told = true;
                }
                std::thread::sleep(RETRY);
            }
            Err(Failure::Final(error)) => {
                return Err(error.context(format!("The peer at {to} cannot be used")));
            }
        }
    }
}

enum Failure {
    NotThere(io::Error),
    Final(anyhow::Error),
}

fn try_connect(to: SocketAddr, ours: &Hello, cards: usize) -> Result<Links, Failure> {
    let open = |channel| {
        let mut stream = TcpStream::connect_timeout(&to, HELLO_LIMIT).map_err(Failure::NotThere)?;
        prepare(&stream).map_err(|error| Failure::Final(error.into()))?;
        match offer_hello(&mut stream, &Hello { channel, ..ours.clone() }) {
            Ok(_) => {}
            // The peer ended, or is not serving yet, between the two steps.
            Err(HelloError::Frame(crate::link::FrameError::Io(error)))
                if error.kind() != io::ErrorKind::WouldBlock && error.kind() != io::ErrorKind::TimedOut =>
            {
                return Err(Failure::NotThere(error));
            }
            Err(error) => return Err(Failure::Final(error.into())),
        }
        stream.set_read_timeout(None).map_err(|error| Failure::Final(error.into()))?;
        Ok(stream)
    };
    let streams = channels(cards).into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    Ok(Links::of(streams))
}

/// Waits for the primary. A stranger at the port is told off and logged, and the wait goes on; a peer of ours that
/// does not fit ends it.
pub(super) fn accept(listener: &TcpListener, ours: &Hello, cards: usize) -> anyhow::Result<Links> {
    let channels = channels(cards);
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    streams.resize_with(channels.len(), || None);
    loop {
        let (mut stream, from) = listener.accept().context("The link port cannot be listened on any more")?;
        prepare(&stream)?;
        let theirs = match accept_hello(&mut stream, |channel| Hello { channel, ..ours.clone() }) {
            Ok(theirs) => theirs,
            Err(error @ HelloError::Mismatch(_)) => {
                return Err(anyhow!(error).context(format!("The peer at {from} cannot be used")));
            }
            Err(error) => {
                tracing::warn!("Connection from {from} refused: {error}");
                continue;
            }
        };
        stream.set_read_timeout(None)?;
        // A primary that begins anew has given up what it opened before.
        if theirs.channel == Channel::Checkpoint {
            streams.fill_with(|| None);
        }
        let Some(at) = channels.iter().position(|channel| *channel == theirs.channel) else {
            bail!("A channel without a place: {:?}", theirs.channel);
        };
        streams[at] = Some(stream);
        if streams.iter().all(Option::is_some) {
            return Ok(Links::of(streams.into_iter().flatten().collect()));
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO_LIMIT))
}
