//! The LAN, which loses, doubles, delays and damages frames, and the taps at its ends.

use std::rc::Rc;

use super::Side::{Primary, Secondary};
use super::{Event, LATE_US_MAX, Phase, Side, TAP_FRAMES_MAX, World};
use crate::pair::Wish;
use crate::scenario::Weather;
use crate::stack::Frame;
use crate::trace;

impl World {
    /// A frame goes over the LAN, and is lost, doubled, delayed, overtaken or damaged there.
    pub(super) fn cross_lan(&mut self, frame: &Frame, arrives: impl Fn(Frame) -> Event) {
        let weather =
            if self.now_us < self.scenario.clears_up_us { self.scenario.weather } else { Weather::default() };
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
    pub(super) fn damaged(&mut self, frame: &Frame) -> Frame {
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

    pub(super) fn lan_output(&mut self, side: Side, frame: &Frame) {
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

    pub(super) fn lan_input(&mut self, side: Side, frame: Frame) {
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
    pub(super) fn take_from_tap(&mut self, side: Side) {
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

    pub(super) fn look_at_what_the_svm_hears(&mut self, side: Side, sent: &[u8], wishes: &[Wish]) {
        for wish in wishes {
            if let (Secondary, Wish::ToGuest(frame)) = (side, wish) {
                self.oracle.svm_hears(sent, frame);
            }
        }
    }
}
