//! A guest without protection works through both back ends.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use colo_lab::{
    Devices, FileLoad, Flow, GuestImage, Lab, Ping, Redis, RedisLoad, Reply, Side, Solo, UdpEcho, iperf3,
    redis_benchmark,
};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("redis_benchmark_runs_and_the_disk_is_clean", redis_benchmark_runs_and_the_disk_is_clean),
        ("data_survives_a_reboot_of_the_guest", data_survives_a_reboot_of_the_guest),
    ])
}

fn redis_benchmark_runs_and_the_disk_is_clean() -> Result<()> {
    let lab = Lab::build()?;
    let guest = Solo::start(&lab, Side::A, &GuestImage::make()?, Devices::Ours)?;
    let ping = Ping::start(&lab)?;
    let udp = UdpEcho::start(lab.client(), Duration::from_millis(20))?;
    let files = FileLoad::start(guest.agent(&lab)?, Duration::from_millis(20));

    let lines = redis_benchmark(lab.client(), guest.address(), 10, 2000, "ping,set,get,incr,lpush")?;
    for line in &lines {
        println!("  {line:?}");
    }
    ensure!(lines.len() == 6 && lines.iter().all(|line| line.per_second > 0.0), "{lines:?}");

    for flow in [Flow::ToGuest, Flow::FromGuest] {
        let rate = iperf3(lab.client(), guest.address(), flow, Duration::from_secs(2))?;
        println!("  iperf3 {flow:?}: {:.0} MB/s", rate / 1e6);
    }

    let (_, writes) = files.stop_and_verify(Duration::from_secs(10))?;
    let (udp, ping) = (udp.stop()?, ping.stop()?);
    println!("beside it: {writes} files with fsync, UDP {} of {} asked again, {ping:?}", udp.lost, udp.sent);
    ensure!(ping.received + 1 >= ping.sent && ping.duplicates == 0, "{ping:?}");
    guest.end(&lab)?.check()
}

fn data_survives_a_reboot_of_the_guest() -> Result<()> {
    let lab = Lab::build()?;
    let guest = Solo::start(&lab, Side::A, &GuestImage::make()?, Devices::Ours)?;
    let load = RedisLoad::start(guest.redis(&lab)?, Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(2));
    let (connection, progress) = load.stop(Duration::from_secs(5))?;
    drop(connection);
    ensure!(progress.increments > 10, "Only {} writes in two seconds", progress.increments);

    guest.agent(&lab)?.reboot()?;
    let mut redis = loaded(&guest, &lab)?;
    progress.verify(&mut redis)?;
    println!("{} acknowledged writes are there after the reboot", 2 * progress.increments);
    guest.end(&lab)?.check()
}

/// A connection to redis of the rebooted guest, once it has read its file.
fn loaded(guest: &Solo, lab: &Lab) -> Result<Redis> {
    let mut redis = guest.redis(lab)?;
    while matches!(redis.command(&[b"DBSIZE"])?, Reply::Error(text) if text.starts_with("LOADING")) {}
    Ok(redis)
}
