//! A guest's network card without protection: what the guest and a client send each other arrives, whatever either leaves
//! to the other, on one queue pair or four, and over the death of the back end.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use colo_bench::net::Card as Frontend;
use colo_lab::{
    BackEnd, Card, Dice, Disk, DiskGuest, DiskGuestImage, GUEST, Host, INCOMING, Lab, MAC, Migration, Side,
};
use vhost_net_backend::lan::Packet;

const LIMIT: Duration = Duration::from_secs(60);
const GUEST_V6: &str = "fd77::10";

fn main() -> ExitCode {
    colo_tests::run(&[
        ("what_is_left_to_the_other_side_arrives_whole", what_is_left_to_the_other_side_arrives_whole),
        ("four_queue_pairs_carry_the_guests_connections", four_queue_pairs),
        ("queue_pairs_that_the_guest_does_not_use_get_nothing", queue_pairs_that_the_guest_does_not_use),
        ("frames_may_be_as_long_as_the_lan_has_them", frames_may_be_as_long_as_the_lan_has_them),
        ("a_thousand_pages_come_whole_over_http", a_thousand_pages_come_whole_over_http),
        ("guests_are_in_a_vlan", guests_are_in_a_vlan),
        ("a_guest_shares_a_card_of_the_host_by_macvtap", a_guest_shares_a_card_by_macvtap),
        ("a_guest_has_an_interface_of_the_host", a_guest_has_an_interface_of_the_host),
        ("several_queue_pairs_share_an_interface", several_queue_pairs_share_an_interface),
        ("vlan_tags_pass_an_interface", vlan_tags_pass_an_interface),
        ("an_interface_goes_down_and_away", an_interface_goes_down_and_away),
        ("tcp_goes_on_when_the_back_end_was_killed", tcp_goes_on_when_the_back_end_was_killed),
        ("what_a_guest_has_received_migrates_with_it", what_a_guest_has_received_migrates_with_it),
        ("a_thousand_guests_leave_nothing_behind", a_thousand_guests_leave_nothing_behind),
    ])
}

/// A laboratory with a guest that has a card.
struct World {
    lab: Lab,
    disk: Disk,
    guest: DiskGuest,
    /// Where the guest is.
    side: Side,
}

/// A card with a tap that leads to the LAN.
fn card(host: &Host, served: usize, pairs: usize, properties: &str) -> Result<Card> {
    if served > 1 {
        host.add_multi_queue_tap("tap0")?;
    } else {
        host.add_tap("tap0")?;
    }
    Ok(Card {
        back_end: BackEnd::net(host, "card", &["--tap", "tap0", "--queue-pairs", &served.to_string()])?,
        pairs,
        mac: MAC,
        address: GUEST,
        properties: properties.to_owned(),
    })
}

fn boot(host: &Host, card: Card) -> Result<(Disk, DiskGuest)> {
    let disk = Disk::create(host.directory().join("disk.img"), 64)?;
    let back_end = BackEnd::block(host, "disk", &disk, &["--queues", "4"])?;
    let guest = DiskGuest::boot_with(host, &DiskGuestImage::make()?, back_end, Some(card))?;
    Ok((disk, guest))
}

/// Gives a guest an address in VLAN 7.
fn join_vlan(guest: &mut DiskGuest, address: &str) -> Result<()> {
    guest.run("while read -r module; do insmod /lib/modules/$module; done </lib/modules/vlan")?;
    let words = format!("ip address add {address}/24 dev eth0.7 && ip link set eth0.7 up");
    guest.run(&format!("vconfig add eth0 7 && {words}")).map(drop)
}

/// Waits until a guest has taken all that came to a port.
fn await_taken(guest: &mut DiskGuest) -> Result<()> {
    guest.run("while kill -0 $(cat /tmp/pid) 2>/dev/null; do usleep 10000; done").map(drop)
}

impl World {
    fn boot(pairs: usize, properties: &str) -> Result<Self> {
        Self::boot_with(pairs, pairs, properties)
    }

    /// A guest with `pairs` queue pairs of the `served` that the back end has.
    fn boot_with(served: usize, pairs: usize, properties: &str) -> Result<Self> {
        Self::boot_by(|host| card(host, served, pairs, properties))
    }

    fn boot_by(card: impl FnOnce(&Host) -> Result<Card>) -> Result<Self> {
        let lab = Lab::build()?;
        let (disk, guest) = boot(lab.host(Side::A), card(lab.host(Side::A))?)?;
        Ok(Self { lab, disk, guest, side: Side::A })
    }

    fn card(&mut self) -> Result<&mut Card> {
        self.guest.card.as_mut().context("The guest has a card")
    }

    /// A figure of the card's back end.
    fn figure(&mut self, pointer: &str) -> Result<u64> {
        let host = self.lab.host(self.side);
        let status = self.guest.card.as_ref().context("The guest has a card")?.back_end.status(host)?;
        status
            .pointer(pointer)
            .and_then(serde_json::Value::as_u64)
            .with_context(|| format!("{pointer} in {status}"))
    }

    /// A connection from the client to a port of the guest, where somebody will listen in a moment.
    fn connect(&self, address: &str, port: u16) -> Result<TcpStream> {
        let address = SocketAddr::new(address.parse::<IpAddr>()?, port);
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lab.client().run(|| TcpStream::connect_timeout(&address, LIMIT))? {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LIMIT))?;
                    stream.set_write_timeout(Some(LIMIT))?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(error).with_context(|| address.to_string()),
            }
        }
    }

    /// Gives guest and client addresses of IPv6.
    fn add_ipv6(&mut self) -> Result<()> {
        self.lab.client().enable_ipv6("lan0")?;
        self.lab.client().ip("address add fd77::1/64 dev lan0 nodad")?;
        self.guest.run(&format!("ip address add {GUEST_V6}/64 dev eth0"))?;
        self.guest
            .run("while ip -6 address show dev eth0 | grep -q tentative; do usleep 10000; done")
            .map(drop)
    }

    /// Has the guest take what comes to a port, until the connection ends.
    fn listen(&mut self, port: u16) -> Result<()> {
        self.guest.run(&format!("nc -l -p {port} >/tmp/in & echo $! >/tmp/pid")).map(drop)
    }

    /// The mean length of the frames of this kind ("lan" or "guest") that pass during `work`, in bytes.
    fn mean(&mut self, kind: &str, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<u64> {
        let figures = |world: &mut Self| -> Result<[u64; 2]> {
            Ok([
                world.figure(&format!("/frames/{kind}_bytes"))?,
                world.figure(&format!("/frames/{kind}_frames"))?,
            ])
        };
        let before = figures(self)?;
        work(self)?;
        let after = figures(self)?;
        Ok((after[0] - before[0]) / (after[1] - before[1]).max(1))
    }

    /// When the guest has taken all, that it is this.
    fn ensure_taken(&mut self, address: &str, port: u16, data: &[u8]) -> Result<()> {
        await_taken(&mut self.guest)?;
        // nc itself sends little at a time, which would leave nothing to be segmented
        self.guest.run(&format!("nc -l -p {port} -e cat /tmp/in >/dev/null 2>&1 &"))?;
        let mut back = Vec::new();
        self.connect(address, port)?.read_to_end(&mut back).context("From the guest")?;
        ensure!(back == data, "{} bytes came back of {}, or others", back.len(), data.len());
        Ok(())
    }

    /// Sends data to the guest, and gets it back. Returns the mean length of the frames that had it on either way.
    fn exchange(&mut self, address: &str, port: u16, data: &[u8]) -> Result<[u64; 2]> {
        let there = self.mean("lan", |world| {
            world.listen(port)?;
            let mut stream = world.connect(address, port)?;
            stream.write_all(data).context("To the guest")?;
            stream.shutdown(Shutdown::Write)?;
            await_taken(&mut world.guest)
        })?;
        let back = self.mean("guest", |world| world.ensure_taken(address, port, data))?;
        Ok([there, back])
    }

    fn end(mut self) -> Result<()> {
        self.card()?.back_end.ensure_running()?;
        ensure!(self.figure("/frames/guest_malformed")? == 0, "The guest's headers were refused");
        ensure!(self.figure("/rings_broken")? == 0, "A ring was broken");
        self.guest.end()?;
        self.disk.check()
    }
}

fn data(bytes: usize) -> Vec<u8> {
    Dice::new(bytes as u64).bytes(bytes)
}

/// Which of virtio-net's features the guest has negotiated.
fn negotiated(guest: &mut DiskGuest, bit: usize) -> Result<bool> {
    let bits = guest.run("cat /sys/class/net/eth0/device/features")?;
    Ok(bits.as_bytes().get(bit) == Some(&b'1'))
}

const CSUM: usize = 0;
const GUEST_CSUM: usize = 1;
const GUEST_TSO4: usize = 7;
const HOST_TSO4: usize = 11;
const MRG_RXBUF: usize = 15;
const MQ: usize = 22;

/// What the guest may leave to the LAN, the LAN to the guest, and whether buffers may be merged.
type Choice = (bool, bool, bool);

fn what_is_left_to_the_other_side_arrives_whole() -> Result<()> {
    let choices = [
        (true, true, true),
        (true, true, false),
        (true, false, true),
        (true, false, false),
        (false, true, true),
        (false, true, false),
        (false, false, true),
        (false, false, false),
    ];
    choices.into_iter().try_for_each(|choice| arrives_whole(choice, |properties| World::boot(1, properties)))
}

fn arrives_whole(
    (sending, receiving, merging): Choice,
    boot: impl FnOnce(&str) -> Result<World>,
) -> Result<()> {
    let no_sending = ",csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off";
    let no_merging = ",mrg_rxbuf=off";
    let choice = |on: bool, off: &'static str| if on { "" } else { off };
    let properties =
        [choice(sending, no_sending), choice(receiving, NO_RECEIVING), choice(merging, no_merging)].concat();
    let case = format!("sending {sending}, receiving {receiving}, merging {merging}");
    let mut world = boot(&properties)?;
    for (bit, wanted) in [
        (CSUM, sending),
        (HOST_TSO4, sending),
        (GUEST_CSUM, receiving),
        (GUEST_TSO4, receiving),
        (MRG_RXBUF, merging),
    ] {
        ensure!(negotiated(&mut world.guest, bit)? == wanted, "{case}: feature {bit} is not {wanted}");
    }
    world.add_ipv6()?;
    let data = data(4 << 20);
    for (address, port) in [(GUEST, 5000), (GUEST_V6, 5001)] {
        let means = world.exchange(address, port, &data).with_context(|| format!("{case}, {address}"))?;
        println!("{case}, {address}: frames of {means:?} bytes to the guest and from it, on average");
        // they are larger than the LAN's exactly where that was negotiated
        ensure!(means.map(|mean| mean > 1514) == [receiving, sending], "{case}, {address}: {means:?}");
    }
    world.end().with_context(|| case.clone())
}

fn four_queue_pairs() -> Result<()> {
    let mut world = World::boot(4, "")?;
    ensure!(negotiated(&mut world.guest, MQ)?, "The guest has one queue pair only");
    let queues = world.guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?;
    ensure!(queues == "4", "The guest uses {queues} queue pairs");
    let data = data(1 << 20);
    for port in 5000..5016 {
        world.exchange(GUEST, port, &data).with_context(|| format!("Port {port}"))?;
    }
    let mut used = [0; 2];
    for pair in 0..4 {
        for (side, direction) in ["guest_frames", "lan_frames"].into_iter().enumerate() {
            let frames = world.figure(&format!("/queue_pairs/{pair}/{direction}"))?;
            println!("queue pair {pair}: {direction} {frames}");
            used[side] += usize::from(frames > 0);
        }
    }
    // the kernel spreads connections by hash: with 16 of them, two queues at least
    ensure!(used.iter().all(|queues| *queues > 1), "{used:?} of four queues were used");
    world.end()
}

/// The kernel would spread what comes for the guest over all of the tap's queues.
fn queue_pairs_that_the_guest_does_not_use() -> Result<()> {
    let mut world = World::boot_with(4, 1, "")?;
    let data = data(1 << 16);
    for port in 5000..5016 {
        world.exchange(GUEST, port, &data).with_context(|| format!("Port {port}"))?;
    }
    world.end()
}

const NO_RECEIVING: &str = ",guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off";

/// Over IPv4 and IPv6, 16 connections at a time, each with a connection of its own.
fn a_thousand_pages_come_whole_over_http() -> Result<()> {
    const CONNECTIONS: usize = 1000;
    let mut world = World::boot(1, "")?;
    world.add_ipv6()?;
    let page = data(100_000);
    world.exchange(GUEST, 5000, &page)?;
    world.guest.run("mkdir /tmp/www && mv /tmp/in /tmp/www/page && httpd -p 80 -h /tmp/www")?;
    world.guest.run("httpd -p [::]:81 -h /tmp/www")?;
    let (next, fetched) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let fetch = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= CONNECTIONS {
                return Ok(());
            }
            let url = if number % 2 == 0 {
                format!("http://{GUEST}/page")
            } else {
                format!("http://[{GUEST_V6}]:81/page")
            };
            let agent =
                ureq::Agent::config_builder().max_idle_connections(0).timeout_global(Some(LIMIT)).build();
            let mut answer = ureq::Agent::from(agent).get(&url).call().with_context(|| url.clone())?;
            let body = answer.body_mut().read_to_vec().with_context(|| url.clone())?;
            ensure!(body == page, "{url}: {} bytes of {}, or others", body.len(), page.len());
            fetched.fetch_add(1, Ordering::Relaxed);
        }
    };
    world.lab.client().run(|| -> Result<()> {
        thread::scope(|scope| {
            let clients: Vec<_> = (0..16).map(|_| scope.spawn(fetch)).collect();
            clients
                .into_iter()
                .try_for_each(|client| client.join().map_err(|_| anyhow!("A client panicked"))?)
        })
    })??;
    ensure!(fetched.into_inner() == CONNECTIONS, "Some are missing");
    world.end()
}

/// Two guests send each other tagged frames, also such as are left to the other side to be segmented.
fn guests_are_in_a_vlan() -> Result<()> {
    const OTHER: &str = "10.77.0.11";
    let mut world = World::boot(1, "")?;
    let host = world.lab.host(Side::B);
    let more = Card { mac: "52:54:00:c0:10:02", address: OTHER, ..card(host, 1, 1, "")? };
    let (disk, mut other) = boot(host, more)?;
    join_vlan(&mut world.guest, "10.79.0.1")?;
    join_vlan(&mut other, "10.79.0.2")?;
    let data = data(4 << 20);
    world.exchange(GUEST, 5000, &data)?;
    // nc ends when either side has nothing more to say, so the one that listens must not say so
    let listen = |port: u16| format!("nc -l -p {port} <>/tmp/silent >/tmp/in & echo $! >/tmp/pid");
    other.run(&format!("mkfifo /tmp/silent && {{ {}; }}", listen(6000)))?;
    let mean = world.mean("guest", |world| {
        world.guest.run("until nc 10.79.0.2 6000 -e cat /tmp/in; do usleep 10000; done")?;
        await_taken(&mut other)
    })?;
    println!("frames of {mean} bytes, on average");
    ensure!(mean > 1514, "Frames of {mean} bytes");
    let came = other.run("cat /sys/class/net/eth0.7/statistics/rx_bytes")?;
    ensure!(came.parse::<usize>()? > data.len(), "Only {came} bytes have come tagged");

    // and back, and to the client
    world.guest.run(&format!("rm /tmp/in && mkfifo /tmp/silent && {{ {}; }}", listen(6001)))?;
    other.run("until nc 10.79.0.1 6001 -e cat /tmp/in; do usleep 10000; done")?;
    world.ensure_taken(GUEST, 5001, &data)?;
    other.end()?;
    disk.check()?;
    world.end()
}

fn frames_may_be_as_long_as_the_lan_has_them() -> Result<()> {
    // so that what is long comes from the LAN as it is
    let mut world = World::boot(1, NO_RECEIVING)?;
    // also while the guest's queues run
    world.lab.set_lan_mtu(9000)?;
    world.lab.host(Side::A).namespace().ip("link set tap0 mtu 9000")?;
    world.guest.run("ip link set eth0 mtu 9000")?;
    world.exchange(GUEST, 5000, &data(4 << 20))?;
    let mean = world.figure("/frames/lan_bytes")? / world.figure("/frames/lan_frames")?.max(1);
    println!("  frames of {mean} bytes to the guest, on average");
    ensure!(mean > 1514, "Frames of {mean} bytes");
    world.end()
}

fn a_guest_shares_a_card_by_macvtap() -> Result<()> {
    let mut world = World::boot_by(|host| {
        // the host's way to the LAN, taken out of its bridge
        host.namespace().ip("link set lan0 nomaster")?;
        host.namespace()
            .ip(&format!("link add link lan0 name mv0 address {MAC} type macvtap mode bridge"))?;
        let back_end = BackEnd::net(host, "card", &["--macvtap", "mv0"])?;
        Ok(Card { back_end, pairs: 1, mac: MAC, address: GUEST, properties: String::new() })
    })?;
    world.exchange(GUEST, 5000, &data(4 << 20))?;
    world.end()
}

/// A card that is the host's way to the LAN itself.
fn card_on_interface(host: &Host, pairs: usize, properties: &str) -> Result<Card> {
    host.namespace().ip("link set lan0 nomaster")?;
    let back_end = BackEnd::net(host, "card", &["--interface", "lan0", "--queue-pairs", &pairs.to_string()])?;
    Ok(Card { back_end, pairs, mac: MAC, address: GUEST, properties: properties.to_owned() })
}

fn a_guest_has_an_interface_of_the_host() -> Result<()> {
    for choice in [
        (true, true, true),
        (true, true, false),
        (true, false, true),
        (true, false, false),
        (false, false, true),
    ] {
        arrives_whole(choice, |properties| World::boot_by(|host| card_on_interface(host, 1, properties)))?;
    }
    Ok(())
}

/// With fewer pairs in use no frame goes to the others.
fn several_queue_pairs_share_an_interface() -> Result<()> {
    for pairs in [4, 2] {
        let mut world = World::boot_by(|host| Ok(Card { pairs, ..card_on_interface(host, 4, "")? }))?;
        let data = data(1 << 18);
        for port in 5000..5016 {
            world.exchange(GUEST, port, &data).with_context(|| format!("{pairs} pairs, port {port}"))?;
        }
        let mut used = 0;
        for pair in 0..4 {
            used += usize::from(world.figure(&format!("/queue_pairs/{pair}/lan_frames"))? > 0);
        }
        println!("  {used} queues were used by a guest with {pairs} pairs");
        ensure!((2..=pairs).contains(&used), "{used} queues were used by a guest with {pairs} pairs");
        world.end()?;
    }
    Ok(())
}

/// The client's part is played with frames: not every kernel of a host has VLANs.
fn vlan_tags_pass_an_interface() -> Result<()> {
    const TAG: [u8; 4] = [0x81, 0, 0, 7];
    const CLIENT_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x20, 1];
    let mut world = World::boot_by(|host| card_on_interface(host, 1, ""))?;
    join_vlan(&mut world.guest, "10.79.0.10")?;
    let mut lan = world.lab.client().run(|| Packet::open("lan0", 1, false))??.remove(0);
    lan.set_receiving(true)?;
    // ARP (RFC 826): who has 10.79.0.10?
    let mut question =
        [&[0xff; 6], &CLIENT_MAC[..], &TAG, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &CLIENT_MAC].concat();
    question.extend([10, 79, 0, 1, 0, 0, 0, 0, 0, 0, 10, 79, 0, 10]);
    question.resize(64, 0);
    let begin = [&CLIENT_MAC[..], &[0x52, 0x54, 0, 0xc0, 0x10, 1], &TAG, &[8, 6]].concat();
    let deadline = Instant::now() + LIMIT;
    let mut frame = vec![0; 2000];
    loop {
        ensure!(Instant::now() < deadline, "The guest does not answer in its VLAN");
        ensure!(lan.write(&question), "The question cannot be sent");
        thread::sleep(Duration::from_millis(20));
        let mut answered = false;
        while let Some(bytes) = lan.read(&mut frame)? {
            answered |= frame[..bytes].starts_with(&begin);
        }
        if answered {
            break;
        }
    }
    // and beside it what has no tag
    world.exchange(GUEST, 5000, &data(1 << 20))?;
    world.end()
}

fn an_interface_goes_down_and_away() -> Result<()> {
    let mut world = World::boot_by(|host| card_on_interface(host, 1, ""))?;
    world.listen(5000)?;
    let mut stream = world.connect(GUEST, 5000)?;
    let data = data(3 << 20);
    let host = world.lab.host(Side::A).namespace();
    for piece in data.chunks(1 << 20) {
        stream.write_all(piece)?;
        host.ip("link set lan0 down")?;
        thread::sleep(Duration::from_millis(50));
        host.ip("link set lan0 up")?;
    }
    stream.shutdown(Shutdown::Write)?;
    world.ensure_taken(GUEST, 5000, &data)?;
    world.card()?.back_end.ensure_running()?;
    world.lab.host(Side::A).namespace().ip("link delete lan0")?;
    let deadline = Instant::now() + LIMIT;
    let error = loop {
        match world.card()?.back_end.ensure_running() {
            Ok(()) => ensure!(Instant::now() < deadline, "The back end does not notice"),
            Err(error) => break error.to_string(),
        }
        thread::sleep(Duration::from_millis(50));
    };
    ensure!(error.contains("Interface lan0 was removed"), "{error}");
    Ok(())
}

fn tcp_goes_on_when_the_back_end_was_killed() -> Result<()> {
    const KILLS: usize = 3;
    let mut world = World::boot(1, "")?;
    world.listen(5000)?;
    let mut stream = world.connect(GUEST, 5000)?;
    let data = data(24 << 20);
    let (pieces, dice) = (data.chunks(data.len() / (KILLS + 1)), &mut Dice::announced());
    for (number, piece) in pieces.enumerate() {
        if number > 0 && number <= KILLS {
            // somewhere in what is under way
            thread::sleep(Duration::from_millis(dice.within(0..50)));
            let host = world.lab.host(Side::A);
            world.guest.card.as_mut().context("The guest has a card")?.back_end.kill_and_restart(host)?;
        }
        stream.write_all(piece).with_context(|| format!("Piece {number}"))?;
    }
    stream.shutdown(Shutdown::Write)?;
    world.ensure_taken(GUEST, 5000, &data)?;
    world.end()
}

/// What a guest has received and nobody has read lies in the buffers that the back end has filled; no CPU has written
/// there. So it is at the destination only if the back end's dirty log is right.
fn what_a_guest_has_received_migrates_with_it() -> Result<()> {
    let mut world = World::boot(1, "")?;
    world.guest.run("echo 4096 6291456 6291456 >/proc/sys/net/ipv4/tcp_rmem")?;
    world.listen(5000)?;
    let mut stream = world.connect(GUEST, 5000)?;
    // it has the connection, and does not read from here on
    stream.write_all(b"begin")?;
    world.guest.run("until [ -s /tmp/in ]; do usleep 10000; done; kill -STOP $(cat /tmp/pid)")?;

    let host = world.lab.host(Side::B);
    let back_end = BackEnd::block(host, "disk", &world.disk, &[&["--queues", "4"], INCOMING].concat())?;
    let card = card(host, 1, 1, "")?;
    let uri = format!("tcp:{}:4444", Side::B.link_address());
    let mut destination = DiskGuest::await_from(host, &DiskGuestImage::make()?, back_end, Some(card), &uri)?;
    let mut migration = Migration::begin(&mut world.guest, &uri)?;
    let data = data(1 << 20);
    stream.write_all(&data).context("While the guest migrates")?;
    // local port 5000 is 1388; the fifth field has what waits to be sent and to be read
    let queued = "awk '$2 ~ /:1388$/ { split($5, queue, \":\"); print queue[2] }' /proc/net/tcp*";
    let all = format!("{:08X}", data.len());
    migration.guest().run(&format!("until {queued} | grep -q {all}; do usleep 10000; done"))?;
    let info = migration.arrive(&mut destination)?;
    println!("  {} passes, {} ms without the guest", info["ram"]["dirty-sync-count"], info["downtime"]);
    let received: HashSet<&[u8]> = data.windows(16).collect();
    let by_device = |page: &[u8]| page.windows(16).any(|bytes| received.contains(bytes));
    let mended = destination.go_on(&mut world.guest, by_device)?;
    println!("  {mended} pages that QEMU had lost");
    world.guest = destination;
    world.side = Side::B;

    world.guest.run("kill -CONT $(cat /tmp/pid)")?;
    stream.write_all(b"end")?;
    stream.shutdown(Shutdown::Write)?;
    world.ensure_taken(GUEST, 5000, &[&b"begin"[..], &data, b"end"].concat())?;
    world.end()
}

/// They come and go, in good order or not, with frames under way, and the program is as large as before.
fn a_thousand_guests_leave_nothing_behind() -> Result<()> {
    const ROUNDS: usize = 1000;
    const WARM_UP: usize = 100;
    // an arena of the allocator more or less; what leaks with each guest is a hundred times as much
    const MAPPINGS_SLACK: usize = 8;
    const RSS_KIB_SLACK: u64 = 1024;
    let lab = Lab::build()?;
    let host = lab.host(Side::A);
    let mut back_end = BackEnd::net(host, "card", &["--null", "reflect", "--poll-us", "0"])?;
    let mut before = None;
    for round in 0..ROUNDS {
        let mut card = Frontend::open(back_end.socket(), 64).with_context(|| format!("Guest {round}"))?;
        // it has answered, so nothing of the one before is left
        if round == WARM_UP {
            before = Some(size(back_end.pid())?);
        }
        match round % 3 {
            0 => {}
            1 => card.begin(true, 32, 64)?,
            _ => {
                card.begin(true, 32, 64)?;
                card.close()?;
            }
        }
    }
    let _last = Frontend::open(back_end.socket(), 64)?;
    let (before, after) = (before.context("A thousand rounds")?, size(back_end.pid())?);
    println!("  descriptors, mappings, KiB: {before:?} after {WARM_UP} guests, {after:?} after {ROUNDS}");
    ensure!(after.0 == before.0, "Descriptors leak");
    ensure!(after.1 <= before.1 + MAPPINGS_SLACK, "Mappings leak");
    ensure!(after.2 <= before.2 + RSS_KIB_SLACK, "Memory leaks");
    back_end.ensure_running()
}

/// Open descriptors, mappings and resident KiB of a process.
fn size(pid: u32) -> Result<(usize, usize, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok((descriptors, maps.lines().count(), rss.trim().trim_end_matches(" kB").parse()?))
}
