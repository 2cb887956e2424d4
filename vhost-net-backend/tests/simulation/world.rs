//! The world: a client, a LAN, two hosts with a VM each, a link between them, and what may befall them. One generator decides
//! everything, one queue of events orders it.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use vhost_net_backend::proxy::Config;

use crate::app::Hash;
use crate::client::Client;
use crate::guest::{Guest, Personality, Snapshot};
use crate::oracle::Oracle;
use crate::pair::{Half, Message, Wish};
use crate::scenario::{Failure, Scenario, personality, stack_seed};
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
            if self.scenario.fails_at_event == Some(self.figures.events) {
                self.scenario.fails_at_event = None;
                self.happens(Event::Fails);
            } else if self.scenario.checkpoint_every_events > 0
                && self.rng.u32(..self.scenario.checkpoint_every_events) == 0
            {
                self.plan_checkpoint("the interval passed".into());
            }
        } else if self.scenario.fails_at_event.is_some_and(|at| at <= self.figures.events) {
            self.scenario.fails_at_event = None;
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

/// The processors.
impl World {
    fn poll_client_at(&mut self, at_us: u64) {
        if at_us < self.client_poll_us {
            self.client_poll_us = at_us;
            self.at(at_us, Event::PollClient);
        }
    }

    fn poll_client(&mut self) {
        if self.now_us != self.client_poll_us {
            self.figures.events -= 1;
            return;
        }
        self.client_poll_us = NEVER;
        self.client.poll(self.now_us);
        while let Some(frame) = self.client.next_output() {
            for side in [Primary, Secondary] {
                self.cross_lan(&frame, |frame| Event::AtHost(side, frame));
            }
        }
        if let Some(at_us) = self.client.poll_at(self.now_us) {
            let delay_us = self.rng.u64(10..=10 + self.scenario.client_us_max);
            self.poll_client_at(at_us.max(self.now_us) + delay_us);
        }
    }

    fn poll_guest_at(&mut self, side: Side, at_us: u64) {
        let host = self.host(side);
        if at_us < host.poll_us {
            host.poll_us = at_us;
            self.at(at_us, Event::PollGuest(side));
        }
    }

    /// The VM gets the processor soon.
    fn wake_guest(&mut self, side: Side) {
        let mut delay_us = self.rng.u64(0..=self.scenario.guest_us_max[side as usize]);
        if self.scenario.stall_one_in > 0 && self.rng.u32(..self.scenario.stall_one_in) == 0 {
            delay_us += self.rng.u64(0..=self.scenario.stall_us_max);
        }
        self.poll_guest_at(side, self.now_us + delay_us);
    }

    fn poll_guest(&mut self, side: Side) {
        let now_us = self.now_us;
        let host = self.host(side);
        if now_us != host.poll_us {
            self.figures.events -= 1;
            return;
        }
        host.poll_us = NEVER;
        if !host.running || host.phase == Phase::Out {
            return;
        }
        host.guest.poll(now_us);
        self.take_output(side);
        let host = self.host(side);
        if let Some(at_us) = host.guest.poll_at(now_us) {
            let delay_us = 10 + self.rng.u64(0..=self.scenario.guest_us_max[side as usize]);
            self.poll_guest_at(side, at_us.max(now_us) + delay_us);
        }
    }

    /// The host takes what the VM has sent.
    fn take_output(&mut self, side: Side) {
        loop {
            let now_us = self.now_us;
            let host = self.host(side);
            if !matches!(host.phase, Phase::Paired | Phase::Alone) || !host.half.accepts_output() {
                return;
            }
            let Some(frame) = host.guest.next_output() else { return };
            trace::add(|| format!("{now_us} {side:?} VM sends {}", trace::frame(&frame)));
            match side {
                Primary => self.oracle.pvm_says(&frame),
                Secondary => self.oracle.svm_says(&frame),
            }
            let wishes = self.host(side).half.guest_output(&frame, now_us);
            self.carry_out(side, wishes);
        }
    }

    /// What the host's proxy wants.
    fn carry_out(&mut self, side: Side, wishes: Vec<Wish>) {
        for wish in wishes {
            match wish {
                Wish::ToLan(frame) => self.lan_output(side, &frame),
                Wish::ToGuest(frame) => {
                    trace::add(|| format!("{} {side:?} VM gets {}", self.now_us, trace::frame(&frame)));
                    let host = self.host(side);
                    if host.running {
                        host.guest.receive(frame);
                        self.wake_guest(side);
                    } else {
                        host.undelivered.push_back(frame);
                    }
                }
                Wish::ToPeer(message) => self.link_input(side.other(), message),
                Wish::Checkpoint(why) => self.plan_checkpoint(why),
                Wish::MarkerArrived => {
                    self.host(side).awaits_commit = true;
                    self.try_commit();
                }
            }
        }
        self.plan_tick(side);
    }

    fn plan_tick(&mut self, side: Side) {
        let host = self.host(side);
        if !matches!(host.phase, Phase::Paired | Phase::Alone) {
            return;
        }
        if let Some(at_us) = host.half.next_deadline()
            && at_us < host.tick_us
        {
            host.tick_us = at_us;
            self.at(at_us, Event::Tick(side));
        }
    }

    fn tick(&mut self, side: Side) {
        let now_us = self.now_us;
        let host = self.host(side);
        if now_us != host.tick_us {
            self.figures.events -= 1;
            return;
        }
        host.tick_us = NEVER;
        if matches!(host.phase, Phase::Paired | Phase::Alone) {
            let wishes = host.half.tick(now_us);
            self.carry_out(side, wishes);
        }
    }
}

/// The LAN.
impl World {
    /// A frame goes over the LAN, and is lost, doubled, delayed, overtaken or damaged there.
    fn cross_lan(&mut self, frame: &Frame, arrives: impl Fn(Frame) -> Event) {
        let weather = if self.now_us < self.scenario.clears_up_us {
            self.scenario.weather
        } else {
            crate::scenario::Weather::default()
        };
        let chance = |rng: &mut fastrand::Rng, percent: f64| rng.f64() * 100.0 < percent;
        if chance(&mut self.rng, weather.loss_percent) {
            return;
        }
        let copies = 1 + u32::from(chance(&mut self.rng, weather.double_percent));
        for _ in 0..copies {
            let mut frame = Rc::clone(frame);
            if chance(&mut self.rng, weather.damage_percent) {
                frame = self.damaged(&frame);
            }
            let mut us = weather.delay_us + self.rng.u64(0..=weather.jitter_us);
            if chance(&mut self.rng, weather.late_percent) {
                us += self.rng.u64(0..=LATE_US_MAX);
            }
            self.at(self.now_us + us, arrives(frame));
        }
    }

    /// One bit is wrong, where a checksum of TCP or IP covers it.
    fn damaged(&mut self, frame: &Frame) -> Frame {
        let covered = match (&frame[12..14], frame.len()) {
            ([8, 0], length) if frame[23] == 6 => 14..length,
            // the header of IPv6 has no checksum, TCP's covers its addresses and length
            ([0x86, 0xdd], length) if frame[20] == 6 => 54..length,
            _ => return Rc::clone(frame),
        };
        let mut damaged = frame.to_vec();
        damaged[self.rng.usize(covered)] ^= 1 << self.rng.u32(..8);
        damaged.into()
    }

    fn lan_output(&mut self, side: Side, frame: &Frame) {
        trace::add(|| format!("{} {side:?} to LAN: {}", self.now_us, trace::frame(frame)));
        let at_us = self.now_us.to_be_bytes();
        at_us.iter().chain(frame.iter()).for_each(|byte| self.figures.lan.add(*byte));
        let phase = self.host(side).phase;
        match (side, phase) {
            (Primary, Phase::Paired) => self.oracle.primary_sends(frame),
            (Primary, Phase::Alone) => self.oracle.survivor_sends(frame),
            (Secondary, Phase::Alone) => {}
            _ => panic!("fail closed: {side:?} sends while {phase:?}: {}", trace::frame(frame)),
        }
        self.cross_lan(frame, Event::AtClient);
    }

    fn lan_input(&mut self, side: Side, frame: Frame) {
        let now_us = self.now_us;
        let host = self.host(side);
        match (side, host.phase) {
            (_, Phase::Out) => {}
            // a switch may flood it there: it is the primary's
            (Secondary, Phase::Paired) => {
                let wishes = host.half.lan_input(&frame, now_us);
                assert!(wishes.is_empty(), "a secondary does something with a frame from the LAN");
            }
            (_, Phase::Undecided) | (Primary, Phase::Paired) | (_, Phase::Alone) => {
                if host.tap.len() < TAP_FRAMES_MAX {
                    host.tap.push_back(frame);
                }
                self.take_from_tap(side);
            }
        }
    }

    /// Gives the VM, if it can take them, the frames that wait in the tap.
    fn take_from_tap(&mut self, side: Side) {
        let now_us = self.now_us;
        loop {
            let host = self.host(side);
            if !host.running || !matches!(host.phase, Phase::Paired | Phase::Alone) {
                return;
            }
            let Some(frame) = host.tap.pop_front() else { return };
            if side == Primary {
                self.oracle.pvm_hears(&frame);
            }
            let wishes = self.host(side).half.lan_input(&frame, now_us);
            self.look_at_what_the_svm_hears(side, &frame, &wishes);
            self.carry_out(side, wishes);
        }
    }

    fn look_at_what_the_svm_hears(&self, side: Side, sent: &[u8], wishes: &[Wish]) {
        for wish in wishes {
            if let (Secondary, Wish::ToGuest(frame)) = (side, wish) {
                self.oracle.svm_hears(sent, frame);
            }
        }
    }
}

/// The link.
impl World {
    fn link_input(&mut self, to: Side, message: Message) {
        if !self.link_is_up {
            return;
        }
        let delay_us = self.rng.u64(self.scenario.link_us.clone());
        let pipe = &mut self.pipes[to as usize];
        let at_us = (self.now_us + delay_us).max(pipe.last_us);
        pipe.last_us = at_us;
        pipe.messages.push_back((at_us, message));
        self.at(at_us, Event::AtLinkEnd(to));
    }

    fn link_output(&mut self, to: Side) {
        let now_us = self.now_us;
        let pipe = &mut self.pipes[to as usize];
        if pipe.messages.front().is_some_and(|(at_us, _)| *at_us <= now_us)
            && let Some((_, message)) = pipe.messages.pop_front()
        {
            self.host(to).inbox.push_back(message);
            self.read_inbox(to);
        }
    }

    fn read_inbox(&mut self, side: Side) {
        loop {
            let now_us = self.now_us;
            let host = self.host(side);
            if host.awaits_commit || host.phase != Phase::Paired {
                return;
            }
            let Some(message) = host.inbox.pop_front() else { return };
            let wishes = host.half.peer_message(&message, now_us);
            self.look_at_what_the_svm_hears(side, &message.payload, &wishes);
            self.carry_out(side, wishes);
        }
    }
}

/// Checkpoints.
impl World {
    fn plan_checkpoint(&mut self, why: String) {
        if self.checkpoint.is_none() && !self.checkpoint_is_planned {
            trace::add(|| format!("{} a checkpoint is wanted: {why}", self.now_us));
            self.checkpoint_is_planned = true;
            self.after(0..=self.scenario.control_us_max, Event::CheckpointBegins { why });
        } else if self.host(Primary).running {
            // it is of the next epoch, the checkpoint that goes on is over for the primary
            self.checkpoint_is_wanted = Some(why);
        }
    }

    fn checkpoint_begins(&mut self, why: &str) {
        self.checkpoint_is_planned = false;
        if self.host(Primary).phase != Phase::Paired || !self.link_is_up {
            return;
        }
        trace::add(|| format!("{} the PVM is paused: {why}", self.now_us));
        self.take_output(Primary);
        let host = self.host(Primary);
        host.running = false;
        let epoch = host.epoch;
        let wishes = host.half.marker(epoch);
        let snapshot = host.guest.snapshot();
        self.oracle.snapshot();
        self.carry_out(Primary, wishes);
        self.checkpoint = Some(Checkpoint { snapshot, state_is_here: false, committed: None });
        let cut = self.cut;
        self.after(0..=self.scenario.control_us_max, Event::SvmPauses { cut });
        self.after(0..=self.scenario.control_us_max, Event::StateIsHere { cut });
    }

    /// The secondary commits as soon as it has everything.
    fn try_commit(&mut self) {
        let secondary = &self.hosts[Secondary as usize];
        let ready = secondary.awaits_commit && !secondary.running && secondary.phase == Phase::Paired;
        let another = personality(&mut self.rng);
        if let Some(checkpoint) = &mut self.checkpoint
            && ready
            && checkpoint.state_is_here
            && checkpoint.committed.is_none()
        {
            trace::add(|| format!("{} the checkpoint is committed", self.now_us));
            let another = Personality { clock_ms: another.clock_ms % 4, ..another };
            checkpoint.committed =
                Some(self.hosts[Primary as usize].guest.copy(checkpoint.snapshot, another));
            self.oracle.committed();
            self.figures.checkpoints += 1;
            let cut = self.cut;
            self.after(0..=self.scenario.control_us_max, Event::SecondaryCommits);
            self.after(0..=self.scenario.control_us_max, Event::PrimaryCommits { cut });
        }
    }

    /// The SVM becomes what the PVM was.
    fn secondary_commits(&mut self) {
        if self.host(Secondary).phase == Phase::Out {
            return;
        }
        let Some(copy) = self.checkpoint.as_mut().and_then(|checkpoint| checkpoint.committed.take()) else {
            return;
        };
        trace::add(|| format!("{} the SVM is replaced", self.now_us));
        let now_us = self.now_us;
        let host = self.host(Secondary);
        let epoch = host.epoch;
        let wishes = host.half.commit(epoch, now_us);
        host.epoch += 1;
        host.undelivered.clear();
        host.awaits_commit = false;
        host.guest = copy;
        host.running = true;
        self.oracle.svm_replaced();
        self.carry_out(Secondary, wishes);
        self.end_checkpoint();
        self.resume(Secondary);
        self.read_inbox(Secondary);
    }

    /// The order to commit reaches the primary.
    fn primary_commits(&mut self) {
        let now_us = self.now_us;
        let host = self.host(Primary);
        if !matches!(host.phase, Phase::Paired | Phase::Undecided) {
            return;
        }
        trace::add(|| format!("{now_us} the primary hears of the commit"));
        let epoch = host.epoch;
        let wishes = host.half.commit(epoch, now_us);
        host.epoch += 1;
        host.running = true;
        let paired = host.phase == Phase::Paired;
        self.carry_out(Primary, wishes);
        if paired {
            self.oracle.expect_nothing_held("after a commit");
        }
        self.end_checkpoint();
        self.resume(Primary);
    }

    /// The checkpoint is over when both have done their part.
    fn end_checkpoint(&mut self) {
        let [primary, secondary] = &self.hosts;
        if primary.epoch == secondary.epoch || primary.phase == Phase::Out || secondary.phase == Phase::Out {
            self.checkpoint = None;
            if let Some(why) = self.checkpoint_is_wanted.take() {
                self.plan_checkpoint(why);
            }
        }
    }

    /// The VM goes on.
    fn resume(&mut self, side: Side) {
        let host = self.host(side);
        while let Some(frame) = host.undelivered.pop_front() {
            host.guest.receive(frame);
        }
        self.take_output(side);
        self.take_from_tap(side);
        self.wake_guest(side);
    }
}

/// Failures.
impl World {
    fn fails(&mut self) {
        trace::add(|| format!("{} failure: {:?}", self.now_us, self.scenario.failure));
        self.figures.failovers += 1;
        self.link_is_up = false;
        for pipe in &mut self.pipes {
            // what is in flight is lost from some point on
            let kept = self.rng.usize(0..=pipe.messages.len());
            pipe.messages.truncate(kept);
        }
        if self.rng.bool() {
            self.cut += 1;
        }
        let dies = match self.scenario.failure {
            Failure::Dies(side) => Some(side),
            Failure::LinkBreaks { .. } => None,
        };
        if let Some(side) = dies {
            self.host(side).phase = Phase::Out;
            self.host(side).running = false;
        }
        let winner = match self.scenario.failure {
            Failure::Dies(side) => side.other(),
            Failure::LinkBreaks { winner } => winner,
        };
        let detaches_us = self.rng.u64(0..=self.scenario.detection_us_max);
        self.at(self.now_us + detaches_us, Event::Detaches(winner));
        let takes_over_us = detaches_us + self.rng.u64(0..=self.scenario.control_us_max);
        self.at(self.now_us + takes_over_us, Event::TakesOver(winner));
        if dies.is_none() {
            let detaches_us = self.rng.u64(0..=self.scenario.detection_us_max);
            self.at(self.now_us + detaches_us, Event::Detaches(winner.other()));
            let loses_us = detaches_us + self.rng.u64(0..=self.scenario.control_us_max);
            self.at(self.now_us + loses_us, Event::Loses(winner.other()));
        }
    }

    fn detaches(&mut self, side: Side) {
        if side == Secondary {
            // it hears the primary out
            while let Some((_, message)) = self.pipes[side as usize].messages.pop_front() {
                self.host(side).inbox.push_back(message);
            }
            self.read_inbox(side);
        }
        trace::add(|| format!("{} {side:?} detaches", self.now_us));
        self.pipes[side as usize].messages.clear();
        let host = self.host(side);
        if host.phase == Phase::Paired {
            host.inbox.clear();
            host.half.detach();
            host.phase = Phase::Undecided;
        }
    }

    fn takes_over(&mut self, side: Side) {
        trace::add(|| format!("{} {side:?} takes over", self.now_us));
        if side == Secondary {
            // what it has committed it is
            self.secondary_commits();
        }
        self.checkpoint = None;
        let now_us = self.now_us;
        let host = self.host(side);
        host.phase = Phase::Alone;
        host.awaits_commit = false;
        let mut wishes = host.half.take_over(now_us);
        // what waited leaves connection by connection, in no particular order of these
        wishes.sort_by_key(|wish| match wish {
            Wish::ToLan(frame) if side == Secondary => {
                crate::segment::Segment::of_guest(frame).map(|segment| segment.flow)
            }
            _ => None,
        });
        host.running = true;
        self.carry_out(side, wishes);
        if side == Primary {
            self.oracle.expect_nothing_held("after it took over");
        }
        self.resume(side);
    }

    fn loses(&mut self, side: Side) {
        trace::add(|| format!("{} {side:?} has lost", self.now_us));
        let host = self.host(side);
        host.half.silence();
        host.phase = Phase::Out;
        host.running = false;
    }
}
