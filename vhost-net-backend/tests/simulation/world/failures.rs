//! Failures: a host dies or the link breaks, and one side goes on.

use super::Side::{Primary, Secondary};
use super::{Event, Phase, Side, World};
use crate::pair::Wish;
use crate::scenario::Failure;
use crate::segment::Segment;
use crate::trace;

impl World {
    pub(super) fn fails(&mut self) {
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

    pub(super) fn detaches(&mut self, side: Side) {
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

    pub(super) fn takes_over(&mut self, side: Side) {
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
            Wish::ToLan(frame) if side == Secondary => Segment::of_guest(frame).map(|segment| segment.flow),
            _ => None,
        });
        host.running = true;
        self.carry_out(side, wishes);
        if side == Primary {
            self.oracle.expect_nothing_held("after it took over");
        }
        self.resume(side);
    }

    pub(super) fn loses(&mut self, side: Side) {
        trace::add(|| format!("{} {side:?} has lost", self.now_us));
        let host = self.host(side);
        host.half.silence();
        host.phase = Phase::Out;
        host.running = false;
    }
}
