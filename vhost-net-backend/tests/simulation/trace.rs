//! What happened last, for whoever has to find out why.

use std::cell::RefCell;
use std::collections::VecDeque;

use crate::segment::Segment;

/// Events that are kept, unless `COLO_SIM_LINES` says otherwise.
const LINES_MAX: u64 = 60;

thread_local! {
    static LINES: RefCell<Option<VecDeque<String>>> = const { RefCell::new(None) };
    static FIRST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// From now on events are kept, or are not.
pub(crate) fn keep(keep: bool) {
    LINES.set(keep.then(VecDeque::new));
}

/// What stands above the events: the scenario.
pub(crate) fn keep_first(line: impl FnOnce() -> String) {
    if LINES.with_borrow(Option::is_some) {
        FIRST.set(line());
    }
}

/// The scenario and the last events.
pub(crate) fn lines() -> Vec<String> {
    std::iter::once(FIRST.take()).chain(LINES.take().unwrap_or_default()).collect()
}

pub(crate) fn add(line: impl FnOnce() -> String) {
    LINES.with_borrow_mut(|lines| {
        if let Some(lines) = lines {
            if lines.len() as u64 >= crate::variable("COLO_SIM_LINES").unwrap_or(LINES_MAX) {
                lines.pop_front();
            }
            lines.push_back(line());
        }
    });
}

/// A frame in a line: what smoltcp reads in it.
pub(crate) fn frame(frame: &[u8]) -> String {
    let printed =
        smoltcp::wire::PrettyPrinter::<smoltcp::wire::EthernetFrame<&[u8]>>::new("", &frame).to_string();
    let lines: Vec<_> =
        printed.lines().skip(1).map(|line| line.trim_matches([' ', '\\', '└', '─'])).collect();
    let clock = Segment::of_guest(frame).and_then(|segment| segment.timestamps);
    let clock = clock.map_or_else(String::new, |(value, echo)| format!(" ts={value} echo={echo}"));
    if lines.is_empty() { printed } else { lines.join(" ") + &clock }
}
