//! The link between the two proxies.

use super::{Event, Phase, Side, World};
use crate::pair::Message;

impl World {
    pub(super) fn link_input(&mut self, to: Side, message: Message) {
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

    pub(super) fn link_output(&mut self, to: Side) {
        let now_us = self.now_us;
        let pipe = &mut self.pipes[to as usize];
        if pipe.messages.front().is_some_and(|(at_us, _)| *at_us <= now_us)
            && let Some((_, message)) = pipe.messages.pop_front()
        {
            self.host(to).inbox.push_back(message);
            self.read_inbox(to);
        }
    }

    pub(super) fn read_inbox(&mut self, side: Side) {
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
