//! QEMU's own COLO migration (`x-colo`) as the one that takes checkpoints, seen and steered through a monitor (QMP) of the
//! primary's QEMU. No I/O: lines in, lines out.
//!
//! QEMU has no event for a committed checkpoint. But it stops the VM for one, in the state `colo`, and lets it run again only
//! when the secondary has loaded the whole of it. A VM that was stopped by an operator is in another state. A checkpoint is
//! forced by setting the delay between two of them, to what it is.

use serde_json::{Value, json};

/// A line longer than this is no monitor's.
const LINE_BYTES_MAX: usize = 1 << 20;

/// A wish that is not fulfilled is repeated: it is lost on a migration that has not come to COLO yet.
const REPEAT_US: u64 = 1_000_000;

/// The VM runs for so long before the next checkpoint is forced: QEMU 7.2 was seen to hang in one that begins as soon as the
/// one before has ended.
const RUN_US: u64 = 100_000;

/// What the monitor has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// The secondary has a checkpoint, and the VM is about to run again.
    Committed,
    /// The operator has decided that the primary goes on alone.
    GoesOnAlone,
    /// COLO has failed, and nothing is decided.
    Failed,
}

/// What makes the connection worthless.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MonitorError {
    #[error("A line of more than {LINE_BYTES_MAX} bytes came: is it a monitor of QEMU (-qmp)?")]
    TooLong,
    #[error("What came is no JSON: is it a monitor of QEMU (-qmp)?")]
    NoJson,
}

/// Whether the VM stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    Runs,
    /// It does, for a reason that the question of this number will tell.
    Stopped(u64),
    /// It does for a checkpoint.
    Checkpoint,
}

/// One connection with the monitor.
#[derive(Debug)]
pub(super) struct Monitor {
    bytes: Vec<u8>,
    pause: Pause,
    /// Time between two checkpoints in milliseconds, once it is known.
    delay_ms: Option<u64>,
    /// When the next one may be forced.
    next_us: u64,
    questions: u64,
}

impl Monitor {
    /// It will greet.
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), pause: Pause::Runs, delay_ms: None, next_us: 0, questions: 0 }
    }

    /// Adds what was read. All lines must have been taken out before, so that it does not grow.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Goes through what was read, up to the next news. What is to be answered is appended to `out`.
    ///
    /// # Errors
    /// No monitor is at the other end.
    pub(super) fn next_news(&mut self, now_us: u64, out: &mut Vec<u8>) -> Result<Option<News>, MonitorError> {
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line: Value = serde_json::from_slice(&line).map_err(|_| MonitorError::NoJson)?;
            tracing::debug!("qmp: {line}");
            if let Some(news) = self.hear(&line, now_us, out) {
                return Ok(Some(news));
            }
        }
        if self.bytes.len() > LINE_BYTES_MAX { Err(MonitorError::TooLong) } else { Ok(None) }
    }

    fn hear(&mut self, line: &Value, now_us: u64, out: &mut Vec<u8>) -> Option<News> {
        if line.get("QMP").is_some() {
            say(out, &json!({"execute": "qmp_capabilities", "id": "hello"}));
        }
        match (line["event"].as_str(), line["id"].as_str()) {
            (Some("STOP"), _) => {
                self.questions += 1;
                self.pause = Pause::Stopped(self.questions);
                say(out, &json!({"execute": "query-status", "id": question(self.questions)}));
            }
            (Some("RESUME"), _) => {
                let committed = self.pause == Pause::Checkpoint;
                self.pause = Pause::Runs;
                self.next_us = now_us + RUN_US;
                return committed.then_some(News::Committed);
            }
            (Some("COLO_EXIT"), _) => {
                self.pause = Pause::Runs;
                let requested = line["data"]["reason"] == "request";
                return Some(if requested { News::GoesOnAlone } else { News::Failed });
            }
            (None, Some("hello")) => {
                say(out, &json!({"execute": "query-migrate-parameters", "id": "parameters"}));
            }
            (None, Some("parameters")) => self.delay_ms = line["return"]["x-checkpoint-delay"].as_u64(),
            (None, Some(id)) => {
                if let Pause::Stopped(number) = self.pause
                    && id == question(number)
                    && line["return"]["status"] == "colo"
                {
                    self.pause = Pause::Checkpoint;
                }
            }
            _ => {}
        }
        None
    }

    /// When [`Monitor::ask`] has something to do, if a checkpoint is wanted.
    pub(super) fn deadline(&self) -> Option<u64> {
        (self.delay_ms.is_some() && self.pause == Pause::Runs).then_some(self.next_us)
    }

    /// A checkpoint is wanted: forces one, if that was not done just before.
    pub(super) fn ask(&mut self, now_us: u64, out: &mut Vec<u8>) {
        if let (Some(delay_ms), Some(deadline)) = (self.delay_ms, self.deadline())
            && deadline <= now_us
        {
            self.next_us = now_us + REPEAT_US;
            let arguments = json!({"x-checkpoint-delay": delay_ms});
            say(out, &json!({"execute": "migrate-set-parameters", "arguments": arguments, "id": "wish"}));
        }
    }
}

fn question(number: u64) -> String {
    format!("why-{number}")
}

fn say(out: &mut Vec<u8>, command: &Value) {
    out.extend_from_slice(format!("{command}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the monitor tells and is told when these lines come.
    fn hear(monitor: &mut Monitor, lines: &[&str]) -> (Vec<News>, String) {
        let (mut news, mut out) = (Vec::new(), Vec::new());
        for line in lines {
            monitor.push(line.as_bytes());
            monitor.push(b"\r\n");
            while let Some(told) = monitor.next_news(0, &mut out).unwrap() {
                news.push(told);
            }
        }
        (news, String::from_utf8(out).unwrap())
    }

    const STOP: &str = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
    const RESUME: &str = r#"{"event": "RESUME"}"#;

    fn ready() -> Monitor {
        let mut monitor = Monitor::new();
        let (_, out) = hear(&mut monitor, &[r#"{"QMP": {"version": {}}}"#]);
        assert!(out.contains("qmp_capabilities"));
        let (_, out) = hear(&mut monitor, &[r#"{"return": {}, "id": "hello"}"#]);
        assert!(out.contains("query-migrate-parameters"));
        hear(&mut monitor, &[r#"{"return": {"x-checkpoint-delay": 20000}, "id": "parameters"}"#]);
        monitor
    }

    #[test]
    fn a_checkpoint_is_committed_when_the_vm_runs_again() {
        let mut monitor = ready();
        let (news, out) = hear(&mut monitor, &[STOP]);
        assert!(news.is_empty() && out.contains("query-status"));
        let (news, _) = hear(&mut monitor, &[r#"{"return": {"status": "colo"}, "id": "why-1"}"#, RESUME]);
        assert_eq!(news, [News::Committed]);
    }

    #[test]
    fn no_other_pause_is_taken_for_a_checkpoint() {
        let mut monitor = ready();
        for (number, answer) in [
            r#"{"return": {"status": "paused"}, "id": "why-1"}"#,
            r#"{"return": {"status": "running"}, "id": "why-2"}"#,
            // of the pause before
            r#"{"return": {"status": "colo"}, "id": "why-2"}"#,
            r#"{"error": {}, "id": "why-4"}"#,
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(hear(&mut monitor, &[STOP, answer, RESUME]).0, [], "{number}");
        }
        // the answer comes too late to be sure
        assert_eq!(
            hear(&mut monitor, &[STOP, RESUME, r#"{"return": {"status": "colo"}, "id": "why-5"}"#]).0,
            []
        );
        assert_eq!(hear(&mut monitor, &[RESUME]).0, []);
    }

    #[test]
    fn colos_end_is_told_and_is_no_commit() {
        let mut monitor = ready();
        let stopped = [STOP, r#"{"return": {"status": "colo"}, "id": "why-1"}"#];
        hear(&mut monitor, &stopped);
        let failed = r#"{"event": "COLO_EXIT", "data": {"mode": "primary", "reason": "error"}}"#;
        assert_eq!(hear(&mut monitor, &[failed, RESUME]).0, [News::Failed]);
        let requested = r#"{"event": "COLO_EXIT", "data": {"mode": "primary", "reason": "request"}}"#;
        assert_eq!(hear(&mut monitor, &[requested]).0, [News::GoesOnAlone]);
    }

    #[test]
    fn a_wish_sets_the_delay_to_what_it_is_and_is_repeated() {
        let mut out = Vec::new();
        Monitor::new().ask(5, &mut out);
        assert!(out.is_empty(), "before it has greeted");
        let mut monitor = ready();
        monitor.ask(5, &mut out);
        assert!(String::from_utf8_lossy(&out).contains(r#""x-checkpoint-delay":20000"#));
        out.clear();
        monitor.ask(REPEAT_US, &mut out);
        assert!(out.is_empty());
        assert_eq!(monitor.deadline(), Some(REPEAT_US + 5));
        monitor.ask(REPEAT_US + 5, &mut out);
        assert!(!out.is_empty());
        // not while the VM stands still, and not as soon as it runs
        hear(&mut monitor, &[STOP]);
        assert_eq!(monitor.deadline(), None);
        hear(&mut monitor, &[RESUME]);
        assert_eq!(monitor.deadline(), Some(RUN_US));
    }

    #[test]
    fn what_is_no_monitor_is_refused() {
        let mut monitor = Monitor::new();
        monitor.push(b"220 mail.example.org\n");
        assert_eq!(monitor.next_news(0, &mut Vec::new()), Err(MonitorError::NoJson));
        let mut monitor = Monitor::new();
        monitor.push(&vec![b' '; LINE_BYTES_MAX + 1]);
        assert_eq!(monitor.next_news(0, &mut Vec::new()), Err(MonitorError::TooLong));
    }
}
