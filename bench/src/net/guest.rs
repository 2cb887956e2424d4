//! What a client gets of a real guest whose card is ours, and of the same guest with QEMU's own tap.

use std::time::Duration;

use anyhow::{Context, Result};
use colo_lab::{Devices, Flow, GuestImage, Lab, Side, Solo, iperf3, redis_benchmark, round_trip};

use crate::report::{Row, median};

const REQUESTS: u32 = 20_000;
const CONNECTIONS: u32 = 20;
const PINGS: usize = 500;

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// TCP, as fast as it goes.
    Tcp(Flow),
    /// Requests to redis, on so many connections.
    Requests(u32),
    /// Echo requests, one after the other.
    Ping,
}

impl Work {
    /// Each of them.
    pub const ALL: [Self; 5] = [
        Self::Tcp(Flow::ToGuest),
        Self::Tcp(Flow::FromGuest),
        Self::Requests(CONNECTIONS),
        Self::Requests(1),
        Self::Ping,
    ];

    /// What it is called in the table.
    pub fn name(self) -> String {
        match self {
            Self::Tcp(Flow::ToGuest) => "TCP to a QEMU guest".into(),
            Self::Tcp(Flow::FromGuest) => "TCP from a QEMU guest".into(),
            Self::Requests(1) => "redis in a QEMU guest, 1 connection".into(),
            Self::Requests(number) => format!("redis in a QEMU guest, {number} connections"),
            Self::Ping => "ping to a QEMU guest".into(),
        }
    }

    fn measure(self, lab: &Lab, guest: &Solo, duration: Duration) -> Result<f64> {
        let (client, address) = (lab.client(), guest.address());
        Ok(match self {
            Self::Tcp(flow) => iperf3(client, address, flow, duration)? / 1e6,
            Self::Requests(connections) => {
                let requests = if connections == 1 { REQUESTS / 4 } else { REQUESTS };
                let lines = redis_benchmark(client, address, connections, requests, "get")?;
                lines.first().context("redis-benchmark says nothing")?.per_second
            }
            Self::Ping => round_trip(client, address, PINGS)?.as_secs_f64() * 1e6,
        })
    }

    fn row(self, ours: f64, theirs: f64) -> Row {
        let (name, peer) = (self.name(), ("QEMU's tap", theirs));
        match self {
            Self::Tcp(_) => Row::more_is_better(&name, "MB/s", ours, peer, 1.2),
            Self::Requests(_) => Row::more_is_better(&name, "1/s", ours, peer, 1.0),
            Self::Ping => Row::less_is_better(&name, "us", ours, peer, 1.0),
        }
    }
}

/// Measures each kind of work `rounds` times against either guest in turn, TCP for `duration`. Both guests run all the
/// time; the one that is not measured is idle.
///
/// # Errors
/// A guest does not boot, or a client fails.
pub fn compare(works: &[Work], rounds: u16, duration: Duration) -> Result<Vec<Row>> {
    let lab = Lab::build()?;
    let image = GuestImage::make()?;
    let ours = Solo::start(&lab, Side::A, &image, Devices::Ours)?;
    let theirs = Solo::start(&lab, Side::B, &image, Devices::Qemu)?;
    let mut rows = Vec::new();
    for work in works {
        let mut figures = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (guest, figures) in [&ours, &theirs].into_iter().zip(&mut figures) {
                figures.push(work.measure(&lab, guest, duration).with_context(|| work.name())?);
            }
        }
        let row = work.row(median(&figures[0]), median(&figures[1]));
        eprintln!("{}: {:.2}", row.case, row.ratio);
        rows.push(row);
    }
    Ok(rows)
}
