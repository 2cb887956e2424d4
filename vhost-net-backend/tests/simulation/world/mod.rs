//! The world: a client, a LAN, two hosts with a VM each, a link between them, and what may befall them. One generator decides
//! everything, one queue of events orders it.

mod checkpoints;
mod failures;
mod lan;
mod link;
mod processors;

use std::collections::{BTreeMap, VecDeque};

use vhost_net_backend::proxy::Config;

use crate::app::Hash;
use crate::client::Client;
use crate::guest::{Guest, Snapshot};
use crate::oracle::Oracle;
use crate::pair::{Half, Message};
use crate::scenario::{Scenario, personality, stack_seed};
use crate::stack::Frame;
use crate::trace;

/// Which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Primary,
    Secondary,
}

use Side::{Primary, Secondary};

impl Side {
    fn other(self) -> Self {
        match self {
            Primary => Secondary,
            Secondary => Primary,
        }
    }
}

/// Where a host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Paired,
    Undecided,
    Alone,
    /// Dead, or has lost.
    Out,
}

#[derive(Clone, Debug)]
enum Event {
    PollClient,
    PollGuest(Side),
    Tick(Side),
    /// A frame comes out of the LAN.
    AtClient(Frame),
    AtHost(Side, Frame),
    /// Something comes out of the link to this side.
    AtLinkEnd(Side),
    CheckpointBegins {
        why: String,
    },
    /// The controllers' messages and orders. They are lost with the link if they are of a connection that was cut.
    SvmPauses {
        cut: u32,
    },
    StateIsHere {
        cut: u32,
    },
    SecondaryCommits,
    PrimaryCommits {
        cut: u32,
    },
    Fails,
    Detaches(Side),
    TakesOver(Side),
    Loses(Side),
}

/// One direction of the link between the proxies: in order, and without loss until it is cut.
#[derive(Default)]
struct Pipe {
    messages: VecDeque<(u64, Message)>,
    last_us: u64,
}

struct Host {
    phase: Phase,
    half: Half,
    guest: Guest,
    /// The VM is not paused.
    running: bool,
    /// Frames that the host has not taken from the LAN.
    tap: VecDeque<Frame>,
    /// Frames for the VM, which is paused.
    undelivered: VecDeque<Frame>,
    /// What came out of the link and waits for the commit.
    inbox: VecDeque<Message>,
    awaits_commit: bool,
    poll_us: u64,
    tick_us: u64,
    /// Of the proxy.
    epoch: u64,
}

/// A checkpoint that goes on.
struct Checkpoint {
    snapshot: Snapshot,
    state_is_here: bool,
    /// The secondary has decided: this is what its SVM becomes.
    committed: Option<Guest>,
}

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) events: u64,
    pub(crate) checkpoints: u64,
    pub(crate) failovers: u64,
    pub(crate) released: u64,
    pub(crate) reopened: u64,
    pub(crate) rewritten: u64,
    pub(crate) digests: u64,
    /// Of all that came to the LAN, and when.
    pub(crate) lan: Hash,
}

impl Figures {
    pub(crate) fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.checkpoints += other.checkpoints;
        self.failovers += other.failovers;
        self.released += other.released;
        self.reopened += other.reopened;
        self.rewritten += other.rewritten;
        self.digests += other.digests;
        self.lan.0 ^= other.lan.0;
    }
}

pub(crate) struct World {
    scenario: Scenario,
    rng: fastrand::Rng,
    now_us: u64,
    events: BTreeMap<(u64, u64), Event>,
    order: u64,
    client: Client,
    client_poll_us: u64,
    hosts: [Host; 2],
    /// Into each side.
    pipes: [Pipe; 2],
    link_is_up: bool,
    /// Messages of controllers with another number are lost.
    cut: u32,
    checkpoint: Option<Checkpoint>,
    checkpoint_is_planned: bool,
    /// The proxy wants one, and will not say so again before it has had one.
    checkpoint_is_wanted: Option<String>,
    oracle: Oracle,
    pub(crate) figures: Figures,
}

/// More flows than this no scenario has.
const FLOWS: usize = 20;
/// How late a frame comes that the LAN has kept: its connection may be over.
const LATE_US_MAX: u64 = 5_000_000;
const NEVER: u64 = u64::MAX;
/// Frames that a tap keeps.
const TAP_FRAMES_MAX: usize = 512;

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let scenario = Scenario::new(&mut rng);
        trace::keep_first(|| format!("{scenario:#?}"));
        let config: Config = scenario.config.clone();
        let mut host = |half| Host {
            phase: Phase::Paired,
            half,
            guest: Guest::new(&scenario.setup, stack_seed(&mut rng), personality(&mut rng)),
            running: true,
            tap: VecDeque::new(),
            undelivered: VecDeque::new(),
            inbox: VecDeque::new(),
            awaits_commit: false,
            poll_us: NEVER,
            tick_us: NEVER,
            epoch: 0,
        };
        let hosts = [host(Half::primary(&config)), host(Half::secondary(&config))];
        let client = Client::new(stack_seed(&mut rng), scenario.plans.clone(), scenario.datagrams.clone());
        let mut world = Self {
            rng,
            now_us: 0,
            events: BTreeMap::new(),
            order: 0,
            client,
            client_poll_us: NEVER,
            hosts,
            pipes: [Pipe::default(), Pipe::default()],
            link_is_up: true,
            cut: 0,
            checkpoint: None,
            checkpoint_is_planned: false,
            checkpoint_is_wanted: None,
            oracle: Oracle::new(config.compare.flows_max < FLOWS),
            figures: Figures::default(),
            scenario,
        };
        if let Some(key) = world.scenario.digest_key {
            let wishes = world.host(Primary).half.want_digests(key);
            world.carry_out(Primary, wishes);
        }
        world.poll_client_at(0);
        world.poll_guest_at(Primary, 0);
        world.poll_guest_at(Secondary, 0);
        world.plan_tick(Primary);
        world.plan_tick(Secondary);
        world
    }

    fn host(&mut self, side: Side) -> &mut Host {
        &mut self.hosts[side as usize]
    }

    fn at(&mut self, at_us: u64, event: Event) {
        self.order += 1;
        self.events.insert((at_us.max(self.now_us), self.order), event);
    }

    fn after(&mut self, us: std::ops::RangeInclusive<u64>, event: Event) {
        let us = self.rng.u64(us);
        self.at(self.now_us + us, event);
    }

    /// Runs until the client has all that it wants.
    pub(crate) fn run(&mut self) {
        while !(self.client.is_done() && self.is_at_rest()) {
            let Some(((at_us, _), event)) = self.events.pop_first() else {
                panic!("nothing happens any more, and the client waits:{}", self.client.unfinished());
            };
            self.now_us = at_us;
            assert!(
                self.now_us < self.scenario.ends_us,
                "the client waits for ever:{}\n of the PVM:{}\n of the SVM:{}",
                self.client.unfinished(),
                self.hosts[Primary as usize].guest.describe(),
                self.hosts[Secondary as usize].guest.describe()
            );
            self.figures.events += 1;
            self.happens(event);
            self.disturb();
        }
        self.figures.released = self.oracle.released;
        self.figures.reopened = self.oracle.reopened;
        self.figures.rewritten = self.host(Secondary).half.rewrites();
        self.figures.digests = self.host(Secondary).half.digests();
    }

    /// No failure is under way.
    fn is_at_rest(&self) -> bool {
        self.checkpoint.is_none()
            && match self.hosts.each_ref().map(|host| host.phase) {
                // what is held leaves in the end, with a checkpoint if not otherwise
                [Phase::Paired, Phase::Paired] => self.oracle.nothing_is_held(),
                phases => phases.contains(&Phase::Alone),
            }
    }

    /// Failures and checkpoints come at any event.
    fn disturb(&mut self) {
        let paired = self.hosts.iter().all(|host| host.phase == Phase::Paired);
        if paired && self.link_is_up {
            let due = self.scenario.fails_at_event.is_some_and(|at| at <= self.figures.events);
            let now =
                !self.scenario.fails_in_checkpoint || (self.checkpoint.is_some() && self.rng.u32(..10) == 0);
            if due && now {
                self.scenario.fails_at_event = None;
                self.happens(Event::Fails);
            } else if self.scenario.checkpoint_every_events > 0
                && self.rng.u32(..self.scenario.checkpoint_every_events) == 0
            {
                self.plan_checkpoint("the interval passed".into());
            }
        }
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::PollClient => self.poll_client(),
            Event::PollGuest(side) => self.poll_guest(side),
            Event::Tick(side) => self.tick(side),
            Event::AtClient(frame) => {
                trace::add(|| format!("{} client gets {}", self.now_us, trace::frame(&frame)));
                self.client.receive(frame);
                let delay_us = self.rng.u64(0..=self.scenario.client_us_max);
                self.poll_client_at(self.now_us + delay_us);
            }
            Event::AtHost(side, frame) => self.lan_input(side, frame),
            Event::AtLinkEnd(side) => self.link_output(side),
            Event::CheckpointBegins { why } => self.checkpoint_begins(&why),
            Event::SvmPauses { cut } if cut == self.cut => {
                if self.host(Secondary).phase == Phase::Paired {
                    trace::add(|| format!("{} the SVM is paused", self.now_us));
                    self.host(Secondary).running = false;
                    self.try_commit();
                }
            }
            Event::StateIsHere { cut } if cut == self.cut => {
                if let Some(checkpoint) = &mut self.checkpoint {
                    checkpoint.state_is_here = true;
                    self.try_commit();
                }
            }
            Event::SecondaryCommits => self.secondary_commits(),
            Event::PrimaryCommits { cut } if cut == self.cut => self.primary_commits(),
            Event::SvmPauses { .. } | Event::StateIsHere { .. } | Event::PrimaryCommits { .. } => {}
            Event::Fails => self.fails(),
            Event::Detaches(side) => self.detaches(side),
            Event::TakesOver(side) => self.takes_over(side),
            Event::Loses(side) => self.loses(side),
        }
    }
}
