//! `colo-filter` in the place of QEMU's `colo-compare`, between two guests with cards that QEMU itself emulates and QEMU's
//! own filters, set up as in docs/qemu-filters.md.
//!
//! The guests are no copies of each other: each has booted for itself, so their TCP starts from other numbers. What takes
//! checkpoints is played by the test, in Xen's words: it says when one is committed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use colo_lab::{
    GUEST, GuestImage, Lab, MAC, Ping, Process, Redis, Reply, Side, UdpEcho, program, round_trip,
};
use serde_json::{Value, json};

/// How long anything may take that ought to happen; a guest boots under TCG.
const PATIENCE: Duration = Duration::from_secs(90);
/// Longer than an answer takes that nothing holds.
const A_WHILE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    colo_tests::run(&[
        ("e1000_guests_are_compared", || guests_are_compared(E1000)),
        ("rtl8139_guests_are_compared", || guests_are_compared(RTL8139)),
        ("virtio_guests_are_compared_with_their_headers", || guests_are_compared(VIRTIO)),
        ("without_the_program_nothing_leaves_until_it_is_back", without_the_program_nothing_leaves),
    ])
}

/// A card of QEMU's.
#[derive(Clone, Copy)]
struct Card {
    device: &'static str,
    vnet_hdr: bool,
    /// What a guest that has no time is sure to receive at once: one that loses more than one segment of what the other has
    /// received needs a checkpoint.
    burst_bytes: usize,
}

const E1000: Card = Card { device: "e1000", vnet_hdr: false, burst_bytes: 400_000 };
// it drops what its 64 buffers have no room for
const RTL8139: Card = Card { device: "rtl8139", vnet_hdr: false, burst_bytes: 20_000 };
const VIRTIO: Card = Card { device: "virtio-net-pci", vnet_hdr: true, burst_bytes: 400_000 };

/// Two guests behind QEMU's filters, and the program between them. The laboratory goes last.
struct Filtered {
    card: Card,
    notify: Notifier,
    filter: Process,
    primary: Process,
    secondary: Process,
    lab: Lab,
}

impl Filtered {
    /// Returns when both guests serve.
    fn start(card: Card) -> Result<Self> {
        let image = GuestImage::make_for_emulated_cards()?;
        let lab = Lab::build()?;
        lab.host(Side::A).add_tap("guest0")?;
        // the secondary's leads nowhere
        let alone = lab.host(Side::B).namespace();
        alone.ip("tuntap add dev guest0 mode tap vnet_hdr")?;
        alone.ip("link set guest0 up")?;
        let primary = start_qemu(&lab, Side::A, card, &image)?;
        let filter = start_filter(&lab, card)?;
        let secondary = start_qemu(&lab, Side::B, card, &image)?;
        let notify = Notifier::connect(&socket(&lab, "notify"))?;
        let mut filtered = Self { card, notify, filter, primary, secondary, lab };
        filtered.await_guests()?;
        Ok(filtered)
    }

    fn await_guests(&mut self) -> Result<()> {
        for (side, qemu) in [(Side::A, &mut self.primary), (Side::B, &mut self.secondary)] {
            let serial = self.lab.host(side).directory().join("serial.log");
            let serves = || std::fs::read_to_string(&serial).is_ok_and(|text| text.contains("GUEST serving"));
            qemu.until("guest that serves", PATIENCE, || serves().then_some(()))?;
        }
        Ok(())
    }

    fn redis(&self) -> Result<Redis> {
        Redis::connect(self.lab.client(), GUEST, PATIENCE)
    }

    /// Does work that waits for the guest, on a thread of its own: it may wait for ever.
    fn within<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (done, result) = channel();
        // nobody waits for it any more after the time
        thread::spawn(move || drop(done.send(work())));
        match result.recv_timeout(PATIENCE) {
            Ok(result) => result,
            Err(_) => bail!("No {what}: {:#}", self.status()?),
        }
    }

    fn status(&self) -> Result<Value> {
        let mut command = Command::new(program("colo-filter")?);
        command.args(["status", "--control-path"]).arg(socket(&self.lab, "control"));
        let output = self.lab.host(Side::A).output(command)?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
    }

    /// A figure of the comparison.
    fn compared(&self, name: &str) -> Result<u64> {
        let status = self.status()?;
        status["proxy"]["compare"][name].as_u64().with_context(|| format!("{name} in {status:#}"))
    }
}

fn socket(lab: &Lab, name: &str) -> std::path::PathBuf {
    lab.host(Side::A).directory().join(name)
}

fn start_qemu(lab: &Lab, side: Side, card: Card, image: &GuestImage) -> Result<Process> {
    let host = lab.host(side);
    let headers = if card.vnet_hdr { ",vnet_hdr_support=on" } else { "" };
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-display", "none", "-smp", "1", "-m", "256", "-accel", "tcg,thread=multi"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        // a busy host may be too slow for the kernel's look at its timer
        .args(["-append", &format!("{} no_timer_check", image.append(GUEST)), "-serial"])
        .arg(format!("file:{}", host.directory().join("serial.log").display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", host.directory().join("qmp").display()))
        .args(["-netdev", "tap,id=hn0,ifname=guest0,script=no,downscript=no,vhost=off", "-device"])
        .arg(format!("{},netdev=hn0,mac={MAC},romfile=", card.device));
    let (chardevs, filters): (&[&str], &[&str]) = match side {
        Side::A => (
            &[
                "id=mirror0,host=10.78.0.1,port=9003,server=on,wait=off",
                "id=compare0,host=127.0.0.1,port=9001,server=on,wait=off",
                "id=compare_out,host=127.0.0.1,port=9005,server=on,wait=off",
            ],
            &[
                "filter-mirror,id=m0,netdev=hn0,queue=tx,outdev=mirror0",
                "filter-redirector,id=redire0,netdev=hn0,queue=rx,indev=compare_out",
                "filter-redirector,id=redire1,netdev=hn0,queue=rx,outdev=compare0",
            ],
        ),
        Side::B => (
            &["id=red0,host=10.78.0.1,port=9003,reconnect=1", "id=red1,host=10.78.0.1,port=9004,reconnect=1"],
            &[
                "filter-redirector,id=f1,netdev=hn0,queue=tx,indev=red0",
                "filter-redirector,id=f2,netdev=hn0,queue=rx,outdev=red1",
                "filter-rewriter,id=rew0,netdev=hn0,queue=all",
            ],
        ),
    };
    for chardev in chardevs {
        qemu.arg("-chardev").arg(format!("socket,{chardev}"));
    }
    for filter in filters {
        qemu.arg("-object").arg(format!("{filter}{headers}"));
    }
    host.start(qemu, "qemu")
}

fn start_filter(lab: &Lab, card: Card) -> Result<Process> {
    let mut command = Command::new(program("colo-filter")?);
    command
        .args(["--primary-in", "tcp:127.0.0.1:9001", "--secondary-in", "tcp:10.78.0.1:9004,server"])
        .args(["--out", "tcp:127.0.0.1:9005", "--notify"])
        .arg(format!("unix:{},server", socket(lab, "notify").display()))
        .arg("--control-path")
        .arg(socket(lab, "control"))
        // this machine has other work: only what differs asks for a checkpoint, not what is slow
        .args(["--held-ms-max", "5000"])
        .args(card.vnet_hdr.then_some("--vnet-hdr"));
    lab.host(Side::A).start(command, "filter")
}

/// Whoever takes checkpoints: commits one when it is asked to, or when the test says so.
struct Notifier {
    stream: UnixStream,
    /// Checkpoints that were asked for.
    asked: Arc<AtomicU64>,
    withholds: Arc<AtomicBool>,
}

impl Notifier {
    fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => ensure!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(5));
        };
        send(&stream, "COLO_USERSPACE_PROXY_INIT")?;
        ensure!(receive(&stream)? == "COLO_COMPARE_GET_XEN_INIT", "Another answer");
        let (asked, withholds) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let notifier =
            Self { stream: stream.try_clone()?, asked: asked.clone(), withholds: withholds.clone() };
        // it ends with the connection
        thread::spawn(move || -> Result<()> {
            loop {
                ensure!(receive(&stream)? == "DO_CHECKPOINT", "Another wish");
                asked.fetch_add(1, Ordering::SeqCst);
                if !withholds.load(Ordering::SeqCst) {
                    send(&stream, "COLO_CHECKPOINT")?;
                }
            }
        });
        Ok(notifier)
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    fn withhold(&self, withholds: bool) {
        self.withholds.store(withholds, Ordering::SeqCst);
    }

    fn commit(&self) -> Result<()> {
        send(&self.stream, "COLO_CHECKPOINT")
    }
}

fn send(mut stream: &UnixStream, message: &str) -> Result<()> {
    let length = (message.len() as u32).to_be_bytes();
    stream.write_all(&[&length, message.as_bytes()].concat()).context("The notifier's connection")
}

fn receive(mut stream: &UnixStream) -> Result<String> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).context("The notifier's connection")?;
    let mut message = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut message).context("The notifier's connection")?;
    String::from_utf8(message).context("The notifier's connection")
}

fn guests_are_compared(card: Card) -> Result<()> {
    let filtered = Filtered::start(card)?;
    let Filtered { lab, notify, .. } = &filtered;
    // the first ARP, and what else differs between two guests that have just booted
    drop(filtered.redis()?);
    println!("  {} checkpoints while the guests booted", notify.asked());

    // identical answers leave without a checkpoint: nobody takes one
    notify.withhold(true);
    let (asked, by_match) = (notify.asked(), filtered.compared("released_by_match")?);
    let udp = UdpEcho::start(lab.client(), Duration::from_millis(10))?;
    let ping = Ping::start(lab)?;
    let mut redis = filtered.redis()?;
    let began = Instant::now();
    let mut redis = filtered.within("300 requests and a burst both ways", move || {
        for number in 1..=300 {
            let reply = redis.command(&[b"INCR", b"counter"])?;
            ensure!(reply == Reply::Integer(number), "INCR {number}: {reply:?}");
        }
        let value = vec![b'x'; card.burst_bytes];
        redis.command(&[b"SET", b"large", &value])?;
        ensure!(redis.command(&[b"GET", b"large"])? == Reply::Bulk(Some(value)), "GET of what was SET");
        Ok(redis)
    })?;
    let took = began.elapsed();
    let (udp, ping) = (udp.stop()?, ping.stop()?);
    println!("  300 requests in {took:?}, UDP {} of {} asked again, {ping:?}", udp.lost, udp.sent);
    ensure!(ping.received + 1 >= ping.sent && ping.duplicates == 0 && udp.lost == 0, "{ping:?}, {udp:?}");
    ensure!(
        notify.asked() == asked,
        "{} checkpoints were asked for: {:#}",
        notify.asked() - asked,
        filtered.status()?
    );
    let matched = filtered.compared("released_by_match")? + filtered.compared("released_at_once")? - by_match;
    ensure!(matched > 300, "{matched} packets released by a match");

    // an answer that differs is held until a checkpoint is committed
    let differing = thread::spawn(move || redis.command(&[b"EVAL", b"return redis.call('TIME')[2]", b"0"]));
    let deadline = Instant::now() + PATIENCE;
    while notify.asked() == asked {
        ensure!(Instant::now() < deadline, "No checkpoint is asked for: {:#}", filtered.status()?);
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(A_WHILE);
    ensure!(!differing.is_finished(), "An answer that differs has left");
    // others need not wait for it
    let mut other = filtered.redis()?;
    let reply = filtered
        .within("answer on another connection", move || Ok(other.command(&[b"INCR", b"counter"])?))?;
    ensure!(reply == Reply::Integer(301), "INCR on another connection: {reply:?}");
    notify.commit()?;
    let reply = filtered.within("answer after the checkpoint", || {
        Ok(differing.join().map_err(|_| anyhow!("The client panicked"))??)
    })?;
    ensure!(matches!(&reply, Reply::Bulk(Some(_))), "TIME: {reply:?}");
    ensure!(
        filtered.compared("mismatches")? > 0 && filtered.compared("released_by_commit")? > 0,
        "{:#}",
        filtered.status()?
    );
    println!("  held: {}", filtered.status()?["proxy"]["compare"]["last_mismatch"]);

    // and it goes on
    notify.withhold(false);
    let mut redis = filtered.redis()?;
    let reply =
        filtered.within("answer after the checkpoint", move || Ok(redis.command(&[b"INCR", b"counter"])?))?;
    ensure!(reply == Reply::Integer(302), "INCR after the checkpoint: {reply:?}");
    Ok(())
}

fn without_the_program_nothing_leaves() -> Result<()> {
    let mut filtered = Filtered::start(E1000)?;
    drop(filtered.redis()?);
    filtered.filter.kill()?;
    ensure!(round_trip(filtered.lab.client(), GUEST, 20).is_err(), "A guest that nobody compares answers");
    // QEMU's redirector never reads again once its connection has ended: it is made anew
    filtered.filter = start_filter(&filtered.lab, filtered.card)?;
    filtered.notify = Notifier::connect(&socket(&filtered.lab, "notify"))?;
    let mut qmp = Qmp::connect(&socket(&filtered.lab, "qmp"))?;
    qmp.command(&json!({"execute": "object-del", "arguments": {"id": "redire0"}}))?;
    qmp.command(&json!({"execute": "object-del", "arguments": {"id": "redire1"}}))?;
    qmp.command(
        &json!({"execute": "object-add", "arguments": {"qom-type": "filter-redirector", "id": "redire0",
        "netdev": "hn0", "queue": "rx", "indev": "compare_out"}}),
    )?;
    qmp.command(
        &json!({"execute": "object-add", "arguments": {"qom-type": "filter-redirector", "id": "redire1",
        "netdev": "hn0", "queue": "rx", "outdev": "compare0"}}),
    )?;
    drop(filtered.redis()?);
    Ok(())
}

/// QEMU's monitor.
struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context("QEMU's monitor")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        qmp.command(&json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }

    fn command(&mut self, command: &Value) -> Result<()> {
        self.lines.get_mut().write_all(format!("{command}\n").as_bytes()).context("QEMU's monitor")?;
        loop {
            let mut line = String::new();
            ensure!(
                self.lines.read_line(&mut line).context("QEMU's monitor")? > 0,
                "QEMU's monitor has ended"
            );
            let answer: Value = serde_json::from_str(&line)?;
            // events and the greeting come in between
            if answer.get("return").is_some() {
                return Ok(());
            }
            ensure!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }
}
