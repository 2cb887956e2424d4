//! The processors: when the client and the VMs run, and what the hosts do with what the VMs send.

use vhost_net_backend::wire::OUTPUT;

use super::Side::{Primary, Secondary};
use super::{Event, NEVER, Phase, Side, World};
use crate::pair::Wish;
use crate::trace;

impl World {
    pub(super) fn poll_client_at(&mut self, at_us: u64) {
        if at_us < self.client_poll_us {
            self.client_poll_us = at_us;
            self.at(at_us, Event::PollClient);
        }
    }

    pub(super) fn poll_client(&mut self) {
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

    pub(super) fn poll_guest_at(&mut self, side: Side, at_us: u64) {
        let host = self.host(side);
        if at_us < host.poll_us {
            host.poll_us = at_us;
            self.at(at_us, Event::PollGuest(side));
        }
    }

    /// The VM gets the processor soon.
    pub(super) fn wake_guest(&mut self, side: Side) {
        let mut delay_us = self.rng.u64(0..=self.scenario.guest_us_max[side as usize]);
        if self.scenario.stall_one_in > 0 && self.rng.u32(..self.scenario.stall_one_in) == 0 {
            delay_us += self.rng.u64(0..=self.scenario.stall_us_max);
        }
        self.poll_guest_at(side, self.now_us + delay_us);
    }

    pub(super) fn poll_guest(&mut self, side: Side) {
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
        let wishes = self.host(side).half.guest_pauses();
        self.carry_out(side, wishes);
        let host = self.host(side);
        if let Some(at_us) = host.guest.poll_at(now_us) {
            let delay_us = 10 + self.rng.u64(0..=self.scenario.guest_us_max[side as usize]);
            self.poll_guest_at(side, at_us.max(now_us) + delay_us);
        }
    }

    /// The host takes what the VM has sent.
    pub(super) fn take_output(&mut self, side: Side) {
        loop {
            let now_us = self.now_us;
            let host = self.host(side);
            if (side, host.phase) == (Secondary, Phase::Undecided)
                && let Some(frame) = host.guest.peek_output()
            {
                let wishes = host.half.guest_output(&frame, now_us);
                assert!(
                    wishes.is_empty(),
                    "fail closed: the secondary does {wishes:?} while nothing is decided"
                );
            }
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
            for wish in &wishes {
                match (side, wish) {
                    (Secondary, Wish::ToLan(sent)) => self.oracle.secondary_sends(&frame, sent),
                    (Secondary, Wish::ToPeer(sent)) if sent.kind == OUTPUT => {
                        self.oracle.secondary_sends(&frame, &sent.payload);
                    }
                    _ => {}
                }
            }
            self.carry_out(side, wishes);
        }
    }

    /// What the host's proxy wants.
    pub(super) fn carry_out(&mut self, side: Side, wishes: Vec<Wish>) {
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

    pub(super) fn plan_tick(&mut self, side: Side) {
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

    pub(super) fn tick(&mut self, side: Side) {
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
