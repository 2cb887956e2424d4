//! Our comparison as a library, on one core: what each packet costs, and how much memory each flow.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Result, ensure};
use vhost_net_backend::compare::{Compare, CompareStats, Limits};
use vhost_net_backend::packet::Packet;
use vhost_net_backend::proxy::{Action, Actions, Buffer};

use super::{Packets, Protocol, Traffic};
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::net::load::on_core;
use crate::resident::resident_bytes;

/// Packets of the PVM that are held before the SVM says the same: the PVM is ahead, as it is in life.
const BATCH: usize = 64;
const WARM_UP: Duration = Duration::from_millis(50);

/// What one packet of the PVM and the same of the SVM cost, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// From the frame in its buffer to its release.
    pub engine_ns: f64,
    /// The copy that brings the PVM's frame into that buffer.
    pub copy_ns: f64,
    /// To look at each byte of the two once (memcmp).
    pub touch_ns: f64,
}

impl Cost {
    /// Packets that one core compares in a second, with the copy.
    pub fn packets_per_s(&self) -> f64 {
        1e9 / (self.engine_ns + self.copy_ns)
    }
}

/// Measures for so long on `core`.
///
/// # Errors
/// A packet is not released.
pub fn measure(traffic: Traffic, core: usize, duration: Duration) -> Result<Cost> {
    on_core(core, || {
        ticks_per_nanosecond();
        let mut library = Library::new(Limits::default(), traffic)?;
        library.open()?;
        library.run(WARM_UP)?;
        library.run(duration)
    })
}

struct Library {
    compare: Compare,
    actions: Actions,
    packets: Packets,
    pvm: Vec<u8>,
    svm: Vec<u8>,
    buffers: Vec<Buffer>,
    now_us: u64,
}

impl Library {
    fn new(limits: Limits, traffic: Traffic) -> Result<Self> {
        Ok(Self {
            compare: Compare::new(limits),
            actions: Actions::new(),
            packets: Packets::new(traffic)?,
            pvm: Vec::new(),
            svm: Vec::new(),
            buffers: Vec::new(),
            now_us: 0,
        })
    }

    fn open(&mut self) -> Result<()> {
        for frame in self.packets.openings()? {
            self.pvm_says(&frame);
            self.compare.svm_says(&frame, self.now_us, &mut self.actions);
            ensure!(self.released()? == 1, "A SYN was not released");
        }
        Ok(())
    }

    fn pvm_says(&mut self, frame: &[u8]) {
        let buffer = self.actions.pool().copy_of(frame);
        let packet = Packet::parse(&buffer);
        self.compare.pvm_says(buffer, packet, self.now_us, &mut self.actions);
    }

    /// How many packets may leave by now.
    #[inline]
    fn released(&mut self) -> Result<usize> {
        let mut released = 0;
        for action in self.actions.iter() {
            match action {
                Action::ToLan(frame) => {
                    black_box(frame.as_ptr());
                    released += 1;
                }
                other => ensure!(false, "The comparison wants {other:?}"),
            }
        }
        self.actions.clear();
        Ok(released)
    }

    fn run(&mut self, duration: Duration) -> Result<Cost> {
        let began = ticks();
        let (end, per_us) = (began + ticks_in(duration), ticks_per_nanosecond() * 1e3);
        let bytes = self.packets.frame_bytes();
        let (mut copy, mut engine, mut touch, mut count) = (0, 0, 0, 0);
        while ticks() < end {
            self.pvm.clear();
            (0..BATCH).for_each(|_| self.packets.push_next(&mut self.pvm));
            self.svm.clear();
            self.svm.extend_from_slice(&self.pvm);
            let start = ticks();
            for frame in self.pvm.chunks_exact(bytes) {
                let buffer = self.actions.pool().copy_of(frame);
                self.buffers.push(buffer);
            }
            let copied = ticks();
            let released = self.engine(bytes)?;
            let compared = ticks();
            for (pvm, svm) in self.pvm.chunks_exact(bytes).zip(self.svm.chunks_exact(bytes)) {
                black_box(black_box(pvm) == black_box(svm));
            }
            let touched = ticks();
            ensure!(released == BATCH, "{released} of {BATCH} packets were released");
            copy += copied - start;
            engine += compared - copied;
            touch += touched - compared;
            count += BATCH;
            self.now_us += ((ticks() - start) as f64 / per_us) as u64;
        }
        let ns = |ticks: u64| ticks as f64 / ticks_per_nanosecond() / count as f64;
        Ok(Cost { copy_ns: ns(copy), engine_ns: ns(engine), touch_ns: ns(touch) })
    }

    #[inline(never)]
    fn engine(&mut self, frame_bytes: usize) -> Result<usize> {
        let Self { compare, actions, buffers, svm, now_us, .. } = self;
        for buffer in buffers.drain(..) {
            let packet = Packet::parse(&buffer);
            compare.pvm_says(buffer, packet, *now_us, actions);
        }
        for frame in svm.chunks_exact(frame_bytes) {
            compare.svm_says(frame, *now_us, actions);
        }
        self.released()
    }
}

/// What many flows come to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Crowd {
    /// Packets that were released, of one on each flow that were all held at once.
    pub released: u64,
    /// Memory for each flow with its packet.
    pub bytes_per_flow: f64,
    /// Flows in the table after as many others had come.
    pub flows_left: usize,
}

/// The PVM sends a packet on each of so many flows, and only then the SVM does. Then as many others come.
///
/// # Errors
/// The comparison asks for a checkpoint, or the kernel does not tell how much memory is used.
pub fn crowd(flows: u32) -> Result<Crowd> {
    let limits = Limits {
        flows_max: flows as usize,
        held_bytes_max: 1 << 30,
        held_bytes_full: 1 << 30,
        ..Limits::default()
    };
    let before = resident_bytes(std::process::id())?;
    let traffic = Traffic { protocol: Protocol::Tcp, payload_bytes: 64, flows };
    let mut library = Library::new(limits, traffic)?;
    let first = library.packets.clone();
    let mut frame = Vec::new();
    for _ in 0..flows {
        frame.clear();
        library.packets.push_next(&mut frame);
        library.pvm_says(&frame);
    }
    let CompareStats { held_packets, .. } = library.compare.stats();
    ensure!(held_packets == flows as usize, "{held_packets} packets are held");
    let bytes = resident_bytes(std::process::id())?.saturating_sub(before);
    let mut released = 0;
    library.packets = first;
    for _ in 0..flows {
        frame.clear();
        library.packets.push_next(&mut frame);
        library.compare.svm_says(&frame, 0, &mut library.actions);
        released += library.released()? as u64;
    }
    library.packets = Packets::new(traffic)?.from_flow(flows);
    for _ in 0..flows {
        frame.clear();
        library.packets.push_next(&mut frame);
        library.pvm_says(&frame);
        library.compare.svm_says(&frame, 0, &mut library.actions);
        library.released()?;
    }
    let bytes_per_flow = bytes as f64 / f64::from(flows);
    Ok(Crowd { released, bytes_per_flow, flows_left: library.compare.stats().flows })
}
