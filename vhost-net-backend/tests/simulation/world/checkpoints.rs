//! Checkpoints: what the two controllers do, in the order that messages make.

use super::Side::{Primary, Secondary};
use super::{Checkpoint, Event, Phase, Side, World};
use crate::guest::Personality;
use crate::scenario::personality;
use crate::trace;

impl World {
    pub(super) fn plan_checkpoint(&mut self, why: String) {
        if self.checkpoint.is_none() && !self.checkpoint_is_planned {
            trace::add(|| format!("{} a checkpoint is wanted: {why}", self.now_us));
            self.checkpoint_is_planned = true;
            self.after(0..=self.scenario.control_us_max, Event::CheckpointBegins { why });
        } else if self.host(Primary).running {
            // it is of the next epoch, the checkpoint that goes on is over for the primary
            self.checkpoint_is_wanted = Some(why);
        }
    }

    pub(super) fn checkpoint_begins(&mut self, why: &str) {
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
    pub(super) fn try_commit(&mut self) {
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
    pub(super) fn secondary_commits(&mut self) {
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
    pub(super) fn primary_commits(&mut self) {
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
    pub(super) fn end_checkpoint(&mut self) {
        let [primary, secondary] = &self.hosts;
        if primary.epoch == secondary.epoch || primary.phase == Phase::Out || secondary.phase == Phase::Out {
            self.checkpoint = None;
            if let Some(why) = self.checkpoint_is_wanted.take() {
                self.plan_checkpoint(why);
            }
        }
    }

    /// The VM goes on.
    pub(super) fn resume(&mut self, side: Side) {
        let host = self.host(side);
        while let Some(frame) = host.undelivered.pop_front() {
            host.guest.receive(frame);
        }
        self.take_output(side);
        self.take_from_tap(side);
        self.wake_guest(side);
    }
}
