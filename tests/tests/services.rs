//! What people run in guests goes on when a host dies: iperf3, a thousand connections to a web server, TLS, ssh, rsync, DNS,
//! with IPv4 and with IPv6.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use colo_lab::{Dice, Family, Pair, PairOptions, ServiceClients, ServicesImage, Side};

fn main() -> ExitCode {
    colo_tests::run(&[("services_survive_host_a", services_survive_host_a)])
}

/// In turn with IPv4 and IPv6. `COLO_TEST_ROUNDS` says how often.
fn services_survive_host_a() -> Result<()> {
    let rounds = std::env::var("COLO_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let mut dice = Dice::announced();
    let image = ServicesImage::make()?;
    let options = PairOptions { image: Some(image.image().clone()), ..PairOptions::default() };
    for round in 0..rounds {
        let family = if round % 2 == 0 { Family::V4 } else { Family::V6 };
        let at = Duration::from_millis(dice.within(0..4000));
        round_of(&options, &image, family, at)
            .with_context(|| format!("Round {round}: {family:?}, {at:?} after the first exchanges"))?;
    }
    Ok(())
}

fn round_of(options: &PairOptions, image: &ServicesImage, family: Family, at: Duration) -> Result<()> {
    let mut pair = Pair::start(options)?;
    let clients = ServiceClients::start(pair.lab(), image, family)?;
    clients.await_exchanges().context("Before the failover")?;
    std::thread::sleep(at);
    let status = pair.status(Side::A)?;
    pair.lab().power_off(Side::A)?;
    pair.await_status(Side::B, "side that goes on alone", Duration::from_secs(15), |status| {
        status.text("/role") == "alone"
    })?;
    clients.await_exchanges().context("After the failover")?;
    let exchanges = clients.stop()?;
    println!("  {family:?}: {exchanges}; {} checkpoints before the failover", status.checkpoints());
    let mut agent = pair.agent()?;
    agent.unmount()?;
    pair.lab().kill_host(Side::B)?;
    pair.disk(Side::B).check()
}
