//! What happened last, for whoever has to find out why.

use std::cell::RefCell;
use std::collections::VecDeque;

const LINES_MAX: usize = 60;

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
            if lines.len() == LINES_MAX {
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
    if lines.is_empty() { printed } else { lines.join(" ") }
}
