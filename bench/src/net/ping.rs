//! There and back through a tap: ICMP echo requests of the guest that the kernel answers, one at a time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use colo_lab::Namespace;
use etherparse::PacketBuilder;

use super::Card;
use super::card::{GUEST_MAC, TAP_MAC};
use super::load::{PATIENCE, WARM_UP, on_core};
use crate::Histogram;
use crate::clock::{ticks, ticks_in, ticks_per_nanosecond};
use crate::driver::BATCH;

/// Addresses of the network between them.
pub(crate) const GUEST: [u8; 4] = [10, 98, 0, 2];
const HOST: [u8; 4] = [10, 98, 0, 1];

/// What `ping` sends by default.
const DATA_BYTES: usize = 56;
/// Where an IPv4 packet in an Ethernet frame says its protocol, and ICMP its type.
const PROTOCOL_AT: usize = 14 + 9;
const TYPE_AT: usize = 14 + 20;
const ICMP: u8 = 1;
const ECHO_REPLY: u8 = 0;

/// Gives the host an address on this tap and on no other, by which the guest is its neighbour.
///
/// # Errors
/// What `ip` says.
pub(crate) fn set_address(namespace: &Namespace, tap: &str) -> Result<()> {
    let text = |bytes: [u8; 4]| bytes.map(|byte| byte.to_string()).join(".");
    namespace.ip(&format!("address flush to {}", text(HOST)))?;
    namespace.ip(&format!("link set {tap} address {} up", mac_text(TAP_MAC)))?;
    namespace.ip(&format!("address add {}/24 dev {tap}", text(HOST)))?;
    namespace.ip(&format!(
        "neighbour replace {} lladdr {} dev {tap} nud permanent",
        text(GUEST),
        mac_text(GUEST_MAC)
    ))
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Sends requests for so long, each when the reply to the one before has come, on `core`. Returns the median time in
/// microseconds.
///
/// # Errors
/// A reply does not come, or what comes is none.
pub fn run(card: &mut Card, core: usize, duration: Duration) -> Result<f64> {
    let data = [0x5a; DATA_BYTES];
    let packet = PacketBuilder::ethernet2(GUEST_MAC, TAP_MAC).ipv4(GUEST, HOST, 64).icmpv4_echo_request(1, 1);
    let mut request = Vec::with_capacity(packet.size(data.len()));
    packet.write(&mut request, &data).context("An echo request")?;
    on_core(core, || {
        ticks_per_nanosecond();
        card.begin(true, 0, request.len())?;
        echo(card, &request, WARM_UP)?;
        let latencies = echo(card, &request, duration)?;
        #[expect(clippy::cast_precision_loss, reason = "ticks of one run")]
        Ok(latencies.percentile(50.0) as f64 / ticks_per_nanosecond() / 1000.0)
    })
}

fn echo(card: &mut Card, request: &[u8], duration: Duration) -> Result<Histogram> {
    let Card { rx, tx, .. } = card;
    let mut latencies = Histogram::default();
    let (end, patience) = (ticks() + ticks_in(duration), ticks_in(PATIENCE));
    let mut ended = [(0, 0); BATCH];
    loop {
        let began = ticks();
        if began >= end {
            return Ok(latencies);
        }
        tx.write_bytes(0, request);
        tx.ring.offer(0);
        tx.publish()?;
        let (mut replied, mut sent) = (false, false);
        while !(replied && sent) {
            sent |= tx.ring.take(&mut ended, |_| ())? > 0;
            let count = rx.ring.take(&mut ended, |_| ())?;
            for (slot, _) in &ended[..count] {
                ensure!(
                    (rx.byte(*slot, PROTOCOL_AT), rx.byte(*slot, TYPE_AT)) == (ICMP, ECHO_REPLY),
                    "Something else than a reply has come"
                );
                latencies.record(ticks() - began);
                rx.ring.offer(*slot);
                replied = true;
            }
            if count > 0 {
                rx.publish()?;
            }
            ensure!(ticks() - began < patience, "No reply has come for {PATIENCE:?}");
        }
    }
}
