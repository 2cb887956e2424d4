//! The primary's end of the flows' numbers.

use super::message::Run;
use crate::packet::FlowKey;

/// Which flow has which number in this epoch.
#[derive(Debug, Default)]
pub(crate) struct Names(Vec<Option<FlowKey>>);

impl Names {
    /// The flow of a run; `None` when the message that named it was lost.
    pub(crate) fn flow_of(&mut self, run: &Run<'_>) -> Option<FlowKey> {
        if let Some(flow) = run.flow {
            if self.0.len() <= run.slot {
                self.0.resize(run.slot + 1, None);
            }
            self.0[run.slot] = Some(flow);
        }
        *self.0.get(run.slot)?
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
