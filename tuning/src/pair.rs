//! A protected guest: `colo run` on both hosts, started, watched, broken and checked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::topology::{GUEST_SECOND, MAC_SECOND};
use crate::{Agent, Disk, GUEST, GuestImage, Lab, MAC, Process, Redis, Side, program};

/// The VM's name in the configuration.
pub const VM: &str = "demo";

/// What a test may want otherwise. The rest of the configuration is the product's defaults.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// A checkpoint at least this often, in milliseconds.
    pub checkpoint_interval_ms: u64,
    /// Start `colo run` with `--verify`.
    pub verify: bool,
    /// Lines that go to the end of the configuration's sections, by section.
    pub extra: Vec<(&'static str, String)>,
    /// More environment for `colo run`.
    pub environment: Vec<(&'static str, String)>,
    /// Whether the guest has a second network card.
    pub two_cards: bool,
    /// What the guest boots from; without it, the ordinary image.
    pub image: Option<GuestImage>,
}

impl Default for PairOptions {
    fn default() -> Self {
        Self {
            checkpoint_interval_ms: 1000,
            verify: false,
            extra: Vec::new(),
            environment: Vec::new(),
            two_cards: false,
            image: None,
        }
    }
}

impl PairOptions {
    /// The taps on either host.
    fn taps(&self) -> &'static [&'static str] {
        if self.two_cards { &["vm0", "vm1"] } else { &["vm0"] }
    }
}

/// The configuration file for both hosts of a laboratory.
pub fn configuration(lab: &Lab, image: &GuestImage, options: &PairOptions) -> Result<String> {
    let run = lab.run().directory();
    let node = |side: Side| {
        vec![
            format!("address = {:?}", side.link_address()),
            format!("disk = {:?}", lab.host(side).directory().join("disk.img")),
            format!("tap = {:?}", options.taps()),
        ]
    };
    let (macs, append) = if options.two_cards {
        (vec![MAC, MAC_SECOND], format!("{} colo.ip1={GUEST_SECOND}/24", image.append(GUEST)))
    } else {
        (vec![MAC], image.append(GUEST))
    };
    let mut sections = vec![
        (
            "vm",
            vec![
                format!("name = {VM:?}"),
                "memory_mib = 256".to_owned(),
                "accel = \"auto\"".to_owned(),
                format!("mac = {macs:?}"),
                format!("kernel = {:?}", image.kernel),
                format!("initrd = {:?}", image.initrd),
                format!("append = {append:?}"),
                format!("serial_log = {:?}", run.join("serial-{node}.log")),
            ],
        ),
        ("link", vec!["port = 7470".to_owned(), "primary = \"a\"".to_owned()]),
        ("arbiter", vec!["type = \"file\"".to_owned(), format!("directory = {:?}", run.join("arbiter"))]),
        ("heartbeat", Vec::new()),
        ("checkpoint", vec![format!("interval_ms = {}", options.checkpoint_interval_ms)]),
        ("net", vec![format!("program = {:?}", program("vhost-net-backend")?)]),
        ("disk", vec![format!("program = {:?}", program("vhost-blk-backend")?)]),
        ("node.a", node(Side::A)),
        ("node.b", node(Side::B)),
    ];
    for (name, line) in &options.extra {
        let section = sections.iter_mut().find(|(section, _)| section == name);
        section.with_context(|| format!("There is no section {name}"))?.1.push(line.clone());
    }
    Ok(sections.iter().map(|(name, lines)| format!("[{name}]\n{}\n\n", lines.join("\n"))).collect())
}

/// What `colo status --json` says.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

impl Status {
    /// A text field, empty where there is none.
    pub fn text(&self, pointer: &str) -> &str {
        self.0.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// Checkpoints since the start, of all causes.
    pub fn checkpoints(&self) -> u64 {
        let by_cause = self.0.pointer("/checkpoints/by_cause").and_then(Value::as_object);
        by_cause.map_or(0, |counts| counts.values().filter_map(Value::as_u64).sum())
    }

    /// A number, 0 where there is none.
    pub fn number(&self, pointer: &str) -> u64 {
        self.0.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
    }
}

/// A protected VM on both hosts of a laboratory.
#[derive(Debug)]
pub struct Pair {
    lab: Lab,
    config: PathBuf,
    runs: [Option<Process>; 2],
    disks: [Disk; 2],
}

impl Pair {
    /// Starts `colo run` on both hosts of a new laboratory, and returns when the guest serves and is protected.
    ///
    /// # Errors
    /// Something cannot be started, or protection is not there after a minute.
    pub fn start(options: &PairOptions) -> Result<Self> {
        let image = options.image.clone().map_or_else(GuestImage::make, Ok)?;
        let mut pair = Self::prepare(options, &image)?;
        pair.run(Side::B, options)?;
        pair.run(Side::A, options)?;
        pair.redis()?;
        pair.await_protection(Duration::from_secs(60))?;
        Ok(pair)
    }

    /// Builds the laboratory with taps, equal disks and a configuration, and starts nothing.
    ///
    /// # Errors
    /// The laboratory cannot be built.
    pub fn prepare(options: &PairOptions, image: &GuestImage) -> Result<Self> {
        let lab = Lab::build()?;
        let disk = |side| lab.host(side).directory().join("disk.img");
        let disk_a = Disk::create(disk(Side::A), 128)?;
        let disk_b = disk_a.copy_to(disk(Side::B))?;
        for side in [Side::A, Side::B] {
            for tap in options.taps() {
                lab.host(side).add_tap(tap)?;
            }
        }
        let run = lab.run().directory();
        fs::create_dir_all(run.join("arbiter")).context("Cannot make the arbiter's directory")?;
        let config = run.join("pair.toml");
        fs::write(&config, configuration(&lab, image, options)?).context("Cannot write the configuration")?;
        Ok(Self { lab, config, runs: [None, None], disks: [disk_a, disk_b] })
    }

    /// Starts `colo run` on one host.
    ///
    /// # Errors
    /// The program is not built.
    pub fn run(&mut self, side: Side, options: &PairOptions) -> Result<&mut Process> {
        let mut command = self.colo(side)?;
        command.args(["run", "--node", side.node()]).arg(&self.config);
        if options.verify {
            command.arg("--verify");
        }
        command.env("COLO_CRASH_FILE", self.crash_file(side));
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        let process = self.lab.host(side).start(command, "colo")?;
        Ok(self.runs[side as usize].insert(process))
    }

    fn crash_file(&self, side: Side) -> PathBuf {
        self.lab.host(side).directory().join("crash-at")
    }

    /// From now on that host's `colo run` dies as soon as it reaches this step of a checkpoint.
    ///
    /// # Errors
    /// The file that tells it cannot be written.
    pub fn crash_at(&self, side: Side, step: &str) -> Result<()> {
        let (path, new) = (self.crash_file(side), self.crash_file(side).with_extension("new"));
        fs::write(&new, step).and_then(|()| fs::rename(new, path)).context("Cannot write the crash file")
    }

    /// A `colo` command for one host, without arguments yet.
    ///
    /// # Errors
    /// The program is not built.
    pub fn colo(&self, side: Side) -> Result<Command> {
        let mut command = Command::new(program("colo")?);
        // both hosts share this machine's file system, so what a host keeps below /run needs a place for each
        command.env("COLO_RUNTIME_DIR", self.lab.host(side).directory().join("run"));
        Ok(command)
    }

    /// The laboratory.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// The disk on that host.
    pub fn disk(&self, side: Side) -> &Disk {
        &self.disks[side as usize]
    }

    /// The running `colo run` of that host.
    ///
    /// # Errors
    /// It was not started.
    pub fn process(&mut self, side: Side) -> Result<&mut Process> {
        self.runs[side as usize].as_mut().with_context(|| format!("colo run was not started on {side:?}"))
    }

    /// A new connection to the guest's redis.
    ///
    /// # Errors
    /// It does not serve within a minute.
    pub fn redis(&self) -> Result<Redis> {
        Redis::connect(self.lab.client(), GUEST, Duration::from_secs(60))
    }

    /// A new connection to the guest's agent.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn agent(&self) -> Result<Agent> {
        Agent::connect(self.lab.client(), GUEST)
    }

    /// An operator on that host asks for something: `colo WHAT VM`.
    ///
    /// # Errors
    /// It is refused.
    pub fn ask(&self, side: Side, what: &str) -> Result<()> {
        let mut command = self.colo(side)?;
        command.args([what, VM]);
        let output = self.lab.host(side).output(command)?;
        ensure!(output.status.success(), "colo {what}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// What `colo status --json` says on that host.
    ///
    /// # Errors
    /// There is no `colo run`, or what it says is not JSON.
    pub fn status(&self, side: Side) -> Result<Status> {
        let mut command = self.colo(side)?;
        command.args(["status", "--json", VM]);
        let output = self.lab.host(side).output(command)?;
        ensure!(output.status.success(), "colo status: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(Status(serde_json::from_slice(&output.stdout).context("colo status --json is not JSON")?))
    }

    /// Waits until the status of that host is as wanted.
    ///
    /// # Errors
    /// It is not within `limit`, or `colo run` ends.
    pub fn await_status(
        &mut self,
        side: Side,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status(side);
            if let Ok(status) = &status
                && wanted(status)
            {
                return Ok(status.clone());
            }
            let process = self.process(side)?;
            if let Some(code) = process.ended()? {
                bail!("colo run on {side:?} ended with {code} before {what}:\n{}", process.output());
            }
            if Instant::now() > deadline {
                bail!("{side:?}: no {what} after {limit:?}; last status: {status:?}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the first committed checkpoint.
    ///
    /// # Errors
    /// There is none within `limit`.
    pub fn await_protection(&mut self, limit: Duration) -> Result<Status> {
        self.await_status(Side::A, "protection", limit, |status| {
            status.text("/role") == "primary" && status.checkpoints() >= 1
        })
    }
}
