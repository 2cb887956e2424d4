//! QMP, the language of QEMU's monitor: commands out, replies and events in.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde_json::{Value, json};

/// A longer message is nothing that QEMU sends to us.
const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// A guest can cause events: more than this many that nobody asked for are forgotten, oldest first.
const EVENTS_MAX: usize = 256;

const JOB_EVENT: &str = "JOB_STATUS_CHANGE";

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU closed the monitor: it has ended.
    #[error("QEMU has closed its monitor")]
    Closed,
    /// QEMU said no.
    #[error("QEMU refuses {command}: {error}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        error: String,
    },
    /// QEMU did not answer in time: it hangs.
    #[error("QEMU did not answer to {command} within {seconds} s")]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        seconds: u64,
    },
    /// What came is no QMP.
    #[error("What came from QEMU's monitor is no QMP: {0}")]
    Protocol(String),
    /// The socket failed.
    #[error("QEMU's monitor: {0}")]
    Io(#[from] io::Error),
}

/// Something that QEMU says unasked.
#[derive(Clone, Debug)]
pub struct QmpEvent {
    /// Its name, as `SHUTDOWN`.
    pub name: String,
    /// What it carries.
    pub data: Value,
}

impl QmpEvent {
    fn is_of_job(&self, job: &str) -> bool {
        self.name == JOB_EVENT && self.data["id"] == job
    }
}

/// One line from QEMU. Exactly one of the optional parts says what it is.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

/// A connection to QEMU's monitor. One command at a time.
///
/// QEMU reads its monitor byte by byte, at 2 µs and seven system calls each: what a checkpoint sends is kept short.
pub struct Qmp {
    stream: UnixStream,
    timeout: Duration,
    received: Vec<u8>,
    searched: usize,
    events: VecDeque<QmpEvent>,
    ended_job: Option<String>,
    id_last: u64,
}

impl Qmp {
    /// Shakes hands. `limit` is for the greeting, `timeout` for each command from then on.
    ///
    /// # Errors
    /// QEMU has ended, or what is at the other end is no QMP.
    pub fn connect(stream: UnixStream, limit: Duration, timeout: Duration) -> Result<Self, QmpError> {
        stream.set_nonblocking(true)?;
        let (received, events) = (Vec::with_capacity(64 << 10), VecDeque::new());
        let mut qmp = Self { stream, timeout, received, searched: 0, events, ended_job: None, id_last: 0 };
        let greeting = qmp.message(Instant::now() + limit, limit, "its start")?;
        if greeting.greeting.is_none() {
            return Err(QmpError::Protocol("it does not begin with a greeting".into()));
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Has one command carried out and returns its result. `arguments` is an object, or null.
    ///
    /// # Errors
    /// QEMU refuses, hangs or has ended.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let [result] = self.execute_all([(command, arguments)])?;
        Ok(result)
    }

    /// Has commands carried out one after the other, with one wait for all of them. Those after a refused one are carried out
    /// all the same.
    ///
    /// # Errors
    /// QEMU refuses one of them, hangs or has ended.
    pub fn execute_all<const N: usize>(
        &mut self,
        commands: [(&str, Value); N],
    ) -> Result<[Value; N], QmpError> {
        let id_first = self.id_last + 1;
        let names = commands.each_ref().map(|(command, _)| *command);
        let mut lines = Vec::new();
        for (command, arguments) in commands {
            self.id_last += 1;
            let mut line = json!({"execute": command, "id": self.id_last});
            if !arguments.is_null() {
                line["arguments"] = arguments;
            }
            serde_json::to_writer(&mut lines, &line).map_err(io::Error::from)?;
            lines.push(b'\n');
        }
        let deadline = Instant::now() + self.timeout;
        self.send(&lines, deadline, names.first().unwrap_or(&""))?;

        let mut refused = None;
        let mut results = [const { Value::Null }; N];
        for (index, command) in names.into_iter().enumerate() {
            let reply = loop {
                let message = self.message(deadline, self.timeout, command)?;
                match message {
                    Message { event: Some(name), data, .. } => self.keep(QmpEvent { name, data }),
                    // A reply to a command whose time was up.
                    Message { id: Some(id), .. } if id < id_first + index as u64 => {}
                    reply => break reply,
                }
            };
            if let Some(Refusal { desc }) = reply.error {
                refused.get_or_insert(QmpError::Refused { command: command.into(), error: desc });
            } else if reply.id == Some(id_first + index as u64)
                && let Some(value) = reply.returned
            {
                results[index] = value;
            } else {
                return Err(QmpError::Protocol(format!("no reply to {command}, but something else")));
            }
        }
        refused.map_or(Ok(results), Err)
    }

    /// Runs a job to its end. QEMU keeps a job that has ended until [`Qmp::dismiss_jobs`].
    ///
    /// # Errors
    /// QEMU refuses the job or the job fails, hangs or has ended.
    pub fn run_job(&mut self, command: &str, mut arguments: Value) -> Result<(), QmpError> {
        self.dismiss_jobs()?;
        let job = format!("j{}", self.id_last);
        arguments["job-id"] = json!(job);
        self.execute(command, arguments)?;
        let deadline = Instant::now() + self.timeout;
        let mut failed = false;
        // A job that fails says that it is aborting before it concludes, so one that did not need not be asked.
        loop {
            let event = self.wait_event(command, deadline, |event| event.is_of_job(&job))?;
            match event.data["status"].as_str() {
                Some("concluded") => break,
                Some("aborting") => failed = true,
                _ => {}
            }
        }
        self.ended_job = Some(job);
        if failed { Err(self.failure_of_job(command)?) } else { Ok(()) }
    }

    /// Has QEMU forget the job that has ended. A round trip that a checkpoint need not wait for.
    ///
    /// # Errors
    /// QEMU hangs or has ended.
    pub fn dismiss_jobs(&mut self) -> Result<(), QmpError> {
        let Some(job) = self.ended_job.take() else { return Ok(()) };
        self.execute("job-dismiss", json!({"id": job})).map(drop)
    }

    fn failure_of_job(&mut self, command: &str) -> Result<QmpError, QmpError> {
        let jobs = self.execute("query-jobs", Value::Null)?;
        let ours = |job: &&Value| job["id"].as_str() == self.ended_job.as_deref();
        let error =
            jobs.as_array().and_then(|jobs| jobs.iter().find(ours)).and_then(|job| job["error"].as_str());
        Ok(QmpError::Refused { command: command.into(), error: error.unwrap_or("unknown error").into() })
    }

    /// The events that came since the last call. Does not wait.
    ///
    /// # Errors
    /// QEMU has ended.
    pub fn take_events(&mut self) -> Result<Vec<QmpEvent>, QmpError> {
        loop {
            match self.message(Instant::now(), Duration::ZERO, "") {
                Ok(Message { event: Some(name), data, .. }) => self.keep(QmpEvent { name, data }),
                Ok(_) => {}
                Err(QmpError::Timeout { .. }) => break,
                Err(QmpError::Closed) if !self.events.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.events.drain(..).collect())
    }

    /// Waits for the first event that `wanted` accepts, and takes it out.
    fn wait_event(
        &mut self,
        command: &str,
        deadline: Instant,
        wanted: impl Fn(&QmpEvent) -> bool,
    ) -> Result<QmpEvent, QmpError> {
        if let Some(event) = self.events.iter().position(&wanted).and_then(|index| self.events.remove(index))
        {
            return Ok(event);
        }
        loop {
            let message = self.message(deadline, self.timeout, command)?;
            if let Message { event: Some(name), data, .. } = message {
                let event = QmpEvent { name, data };
                if wanted(&event) {
                    return Ok(event);
                }
                self.keep(event);
            }
        }
    }

    fn keep(&mut self, event: QmpEvent) {
        // Jobs report every change of their state; only how they end is waited for.
        if event.name == JOB_EVENT
            && !["aborting", "concluded"].contains(&event.data["status"].as_str().unwrap_or(""))
        {
            return;
        }
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn send(&mut self, mut bytes: &[u8], deadline: Instant, command: &str) -> Result<(), QmpError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, deadline, self.timeout, command)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(QmpError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next line from QEMU.
    fn message(&mut self, deadline: Instant, limit: Duration, command: &str) -> Result<Message, QmpError> {
        loop {
            if let Some(end) = self.received[self.searched..].iter().position(|byte| *byte == b'\n') {
                let end = self.searched + end + 1;
                let message = serde_json::from_slice(&self.received[..end]);
                self.received.drain(..end);
                self.searched = 0;
                return message.map_err(|error| QmpError::Protocol(error.to_string()));
            }
            self.searched = self.received.len();
            if self.searched > MESSAGE_BYTES_MAX {
                return Err(QmpError::Protocol("a message without end".into()));
            }
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(bytes) => self.received.extend_from_slice(&chunk[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, deadline, limit, command)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(QmpError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(
        &self,
        flags: PollFlags,
        deadline: Instant,
        limit: Duration,
        command: &str,
    ) -> Result<(), QmpError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::new(&self.stream, flags)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => {
                    return Err(QmpError::Timeout { command: command.into(), seconds: limit.as_secs() });
                }
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread::{self, JoinHandle};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A QEMU that greets, then sends for each command that comes what `script` holds for it. `$ID` in there becomes the
    /// command's id, `$JOB` its job-id.
    fn qemu(script: &'static [(&'static str, &'static [&'static str])]) -> (UnixStream, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            let capabilities: (&str, &[&str]) = ("qmp_capabilities", &[r#"{"return":{},"id":$ID}"#]);
            writer.write_all(b"{\"QMP\":{\"version\":{}}}\r\n").unwrap();
            let mut job = String::new();
            for (command, replies) in [capabilities].iter().chain(script) {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let request: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(request["execute"], *command);
                if let Some(id) = request["arguments"]["job-id"].as_str() {
                    job = id.into();
                }
                for reply in *replies {
                    let reply = reply.replace("$ID", &request["id"].to_string()).replace("$JOB", &job);
                    writer.write_all(format!("{reply}\r\n").as_bytes()).unwrap();
                }
            }
        });
        (ours, served)
    }

    #[test]
    fn events_between_command_and_reply_are_kept() {
        let (stream, served) =
            qemu(&[("stop", &[r#"{"event":"STOP","timestamp":{}}"#, r#"{"return":{},"id":$ID}"#])]);
        let mut qmp = Qmp::connect(stream, SECOND, SECOND).unwrap();
        qmp.execute("stop", Value::Null).unwrap();
        assert_eq!(qmp.take_events().unwrap()[0].name, "STOP");
        served.join().unwrap();
    }

    #[test]
    fn a_refusal_carries_the_words_of_qemu() {
        let (stream, _served) = qemu(&[(
            "nonsense",
            &[r#"{"error":{"class":"CommandNotFound","desc":"no such thing"},"id":$ID}"#],
        )]);
        let mut qmp = Qmp::connect(stream, SECOND, SECOND).unwrap();
        let error = qmp.execute("nonsense", Value::Null).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses nonsense: no such thing");
        assert!(matches!(qmp.execute("next", Value::Null), Err(QmpError::Closed)));
    }

    const SUCCEEDS: [&str; 2] = [
        r#"{"return":{},"id":$ID}"#,
        r#"{"event":"JOB_STATUS_CHANGE","data":{"status":"concluded","id":"$JOB"}}"#,
    ];

    #[test]
    fn a_job_is_waited_for_and_its_failure_told() {
        let (stream, served) = qemu(&[
            (
                "snapshot-load",
                &[
                    r#"{"event":"JOB_STATUS_CHANGE","data":{"status":"running","id":"$JOB"}}"#,
                    r#"{"return":{},"id":$ID}"#,
                    r#"{"event":"JOB_STATUS_CHANGE","data":{"status":"concluded","id":"other"}}"#,
                    r#"{"event":"JOB_STATUS_CHANGE","data":{"status":"aborting","id":"$JOB"}}"#,
                    r#"{"event":"JOB_STATUS_CHANGE","data":{"status":"concluded","id":"$JOB"}}"#,
                ],
            ),
            ("query-jobs", &[r#"{"return":[{"id":"$JOB","error":"it broke"}],"id":$ID}"#]),
            ("job-dismiss", &[r#"{"return":{},"id":$ID}"#]),
            ("snapshot-load", &SUCCEEDS),
        ]);
        let mut qmp = Qmp::connect(stream, SECOND, SECOND).unwrap();
        let error = qmp.run_job("snapshot-load", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses snapshot-load: it broke");
        qmp.run_job("snapshot-load", json!({})).unwrap();
        served.join().unwrap();
    }

    #[test]
    fn a_silent_qemu_is_not_waited_for_for_ever() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let error = Qmp::connect(stream, Duration::from_millis(10), SECOND).err().unwrap();
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    }

    #[test]
    fn what_is_no_qmp_is_an_error() {
        let (stream, mut other) = UnixStream::pair().unwrap();
        other.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
        assert!(matches!(Qmp::connect(stream, SECOND, SECOND), Err(QmpError::Protocol(_))));
    }
}
