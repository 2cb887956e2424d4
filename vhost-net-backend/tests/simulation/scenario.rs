//! What a seed stands for: what the client wants, how the VMs differ, how the network behaves, and what fails when.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use vhost_net_backend::proxy::Config;

use crate::app::Command;
use crate::client::{Begin, Plan};
use crate::datagrams;
use crate::guest::{Personality, Setup};
use crate::stack::MSS_MAX;
use crate::world::Side;

/// How the LAN behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    pub(crate) loss_percent: f64,
    pub(crate) double_percent: f64,
    pub(crate) damage_percent: f64,
    /// Of frames that come very late.
    pub(crate) late_percent: f64,
    pub(crate) delay_us: u64,
    pub(crate) jitter_us: u64,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            loss_percent: 0.0,
            double_percent: 0.0,
            damage_percent: 0.0,
            late_percent: 0.0,
            delay_us: 50,
            jitter_us: 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    Dies(Side),
    LinkBreaks { winner: Side },
}

#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) setup: Setup,
    pub(crate) config: Config,
    /// With this key the secondary sends digests.
    pub(crate) digest_key: Option<u64>,
    pub(crate) plans: Vec<Plan>,
    pub(crate) datagrams: datagrams::Plan,
    pub(crate) weather: Weather,
    /// From then on the LAN loses nothing.
    pub(crate) clears_up_us: u64,
    /// By then the client must have all that it wants.
    pub(crate) ends_us: u64,
    /// How long a VM waits for the processor at most.
    pub(crate) guest_us_max: [u64; 2],
    /// How often it waits longer, and how long.
    pub(crate) stall_one_in: u32,
    pub(crate) stall_us_max: u64,
    pub(crate) client_us_max: u64,
    pub(crate) link_us: RangeInclusive<u64>,
    pub(crate) control_us_max: u64,
    pub(crate) detection_us_max: u64,
    /// A checkpoint follows on one event of so many; 0 is never.
    pub(crate) checkpoint_every_events: u32,
    /// The failure, if any, comes at this event; or, if in a checkpoint, at some event of one that goes on then or later.
    pub(crate) fails_at_event: Option<u64>,
    pub(crate) fails_in_checkpoint: bool,
    pub(crate) failure: Failure,
}

/// One of the three orders of magnitude, the smallest most often.
fn magnitude(rng: &mut fastrand::Rng, small: u64, medium: u64, large: u64) -> u64 {
    let max = match rng.u32(..6) {
        0..=2 => small,
        3..=4 => medium,
        _ => large,
    };
    rng.u64(0..=max)
}

pub(crate) fn personality(rng: &mut fastrand::Rng) -> Personality {
    Personality {
        draws: rng.u32(1..1000),
        chance: rng.u64(..),
        ack_delay_us: rng.bool().then(|| magnitude(rng, 1_000, 10_000, 200_000)),
        nagle: rng.bool(),
        write_bytes_max: 1 + magnitude(rng, 100, 1_500, 20_000) as usize,
        keep_alive_us: 1_000_000 + magnitude(rng, 1_000_000, 5_000_000, 30_000_000),
        close_us: magnitude(rng, 0, 2_000, 50_000),
        clock_ms: rng.u32(..),
        mss: if rng.bool() { MSS_MAX } else { rng.u16(100..=MSS_MAX) },
    }
}

/// A seed of a stack; every other one makes the first connection's sequence numbers wrap soon.
pub(crate) fn stack_seed(rng: &mut fastrand::Rng) -> u64 {
    let mut seed = rng.u64(..);
    if rng.bool() {
        while first_number(seed) < u32::MAX - 20_000 {
            seed += 1;
        }
    }
    seed
}

/// The first number of smoltcp's generator, sPCG32.
fn first_number(seed: u64) -> u32 {
    let state = seed.wrapping_mul(0xbb2e_fcec_3c39_611d).wrapping_add(0x7590_ef39);
    (state >> (29 - (state >> 61))) as u32
}

fn script(rng: &mut fastrand::Rng, chance: bool) -> Vec<Command> {
    let mut script = Vec::new();
    for _ in 0..rng.u32(1..6) {
        let bytes = magnitude(rng, 300, 5_000, 40_000) as u32;
        let seed = rng.u32(..);
        script.push(match rng.u32(..8) {
            0..=2 => Command::Give { bytes: bytes + 1, seed },
            3 => Command::Take { bytes, seed },
            4 | 5 => Command::Echo { bytes: bytes + 1, seed },
            6 if chance => Command::Chance { bytes: 1 + bytes / 10 },
            _ => Command::Digest,
        });
    }
    script.push(Command::Digest);
    match rng.u32(..8) {
        0..=3 => script.push(Command::Close),
        4 => script.push(Command::Abort),
        _ => {}
    }
    script
}

impl Scenario {
    pub(crate) fn new(rng: &mut fastrand::Rng) -> Self {
        let timestamps = rng.bool();
        let chance = rng.u32(..3) == 0;
        let setup = Setup {
            rx_bytes: [1_000, 4_000, 16_000, 100_000][rng.usize(..4)],
            tx_bytes: [1_000, 4_000, 16_000, 100_000][rng.usize(..4)],
            timestamps,
        };
        let mut plans = Vec::new();
        for index in 0..rng.u16(1..=6) {
            let v6 = rng.bool();
            let begin = if index > 0 && index % 3 == 0 {
                // the connection before asks the guest to open this one
                let port = 7_000 + index;
                let before: &mut Plan = plans.last_mut().unwrap();
                before.script.push_front(Command::Open { port, v6 });
                before.abandons_at = None;
                Begin::Accepts { port }
            } else {
                Begin::Opens { at_us: magnitude(rng, 1_000, 50_000, 500_000) }
            };
            plans.push(Plan {
                begin,
                v6,
                // what the client ends is over when it says so
                again: if rng.u32(..6) == 0 { script(rng, chance).into() } else { VecDeque::new() },
                script: script(rng, chance).into(),
                abandons_at: (rng.u32(..12) == 0).then(|| magnitude(rng, 100, 1_000, 20_000)),
                pipeline: rng.usize(1..4),
                half_close: rng.bool(),
                read_bytes_max: [200, 4_000, 100_000][rng.usize(..3)],
                rx_bytes: [1_000, 4_000, 16_000, 100_000][rng.usize(..4)],
                timestamps: timestamps || rng.bool(),
            });
        }
        let datagrams = datagrams::Plan {
            count: if rng.u32(..3) == 0 { rng.u32(..50) } else { 0 },
            bytes_max: magnitude(rng, 20, 300, 1_400) as u32,
            every_us: magnitude(rng, 200, 2_000, 100_000),
            v6: rng.bool(),
        };
        let rough = rng.u32(..3);
        let weather = Weather {
            loss_percent: [0.0, 1.0, 8.0][rough as usize] * rng.f64(),
            double_percent: [0.0, 2.0, 10.0][rough as usize] * rng.f64(),
            damage_percent: [0.0, 1.0, 5.0][rough as usize] * rng.f64(),
            late_percent: [0.0, 0.5, 2.0][rough as usize] * rng.f64(),
            delay_us: magnitude(rng, 100, 1_000, 20_000),
            jitter_us: if rough == 0 { 0 } else { magnitude(rng, 100, 1_000, 20_000) },
        };
        let mut config = Config::default();
        config.compare.held_us_max = [5_000, 30_000, 100_000][rng.usize(..3)];
        config.compare.patient_us_max = config.compare.held_us_max * 2;
        config.compare.disputed_us_max = config.compare.held_us_max / 3;
        if rng.u32(..4) == 0 {
            config.compare.held_bytes_max = 3_000;
            config.compare.held_bytes_full = 6_000;
        }
        if rng.u32(..4) == 0 {
            config.compare.svm_bytes_max = 3_000;
        }
        if rng.u32(..6) == 0 {
            config.compare.flows_max = 3;
        }
        let sides = [Side::Primary, Side::Secondary];
        let side = sides[rng.usize(..2)];
        Self {
            setup,
            config,
            digest_key: rng.bool().then(|| rng.u64(1..1 << 60)),
            plans,
            datagrams,
            weather,
            clears_up_us: 20_000_000,
            ends_us: 900_000_000,
            guest_us_max: [magnitude(rng, 100, 1_000, 10_000), magnitude(rng, 100, 1_000, 10_000)],
            stall_one_in: [0, 100, 1000][rng.usize(..3)],
            stall_us_max: magnitude(rng, 1_000, 50_000, 400_000),
            client_us_max: magnitude(rng, 100, 1_000, 10_000),
            link_us: 1..=1 + magnitude(rng, 100, 1_000, 10_000),
            control_us_max: magnitude(rng, 500, 5_000, 50_000),
            detection_us_max: magnitude(rng, 500, 50_000, 300_000),
            checkpoint_every_events: [0, 0, 1000, 300][rng.usize(..4)],
            fails_in_checkpoint: rng.u32(..3) == 0,
            fails_at_event: (rng.u32(..8) > 0).then(|| magnitude(rng, 300, 1_500, 6_000)),
            failure: if rng.u32(..3) == 0 {
                Failure::LinkBreaks { winner: side }
            } else {
                Failure::Dies(sides[usize::from(rng.u32(..3) == 0)])
            },
        }
    }
}
