//! A protected guest leaves checksums and segmentation to others, and so does the LAN to it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use colo_lab::{Dice, Pair, PairOptions, Redis, Reply, Side};

/// The longest frame of the LAN.
const FRAME_BYTES_MAX: u64 = 1514;

fn main() -> ExitCode {
    colo_tests::run(&[(
        "large_frames_pass_both_ways_and_go_on_doing_so_after_a_failover",
        large_frames_pass_both_ways,
    )])
}

fn large_frames_pass_both_ways() -> Result<()> {
    let mut pair = Pair::start(&PairOptions::default())?;
    let mut redis = pair.redis()?;
    let value = Dice::new(400_000).bytes(400_000);
    exchange(&pair, Side::A, &mut redis, &value)?;
    pair.lab().power_off(Side::A)?;
    pair.await_status(Side::B, "side that goes on alone", Duration::from_secs(5), |s| {
        s.text("/role") == "alone"
    })?;
    exchange(&pair, Side::B, &mut redis, &value)
}

/// Writes the value to redis in the guest, and reads it again, in large frames.
fn exchange(pair: &Pair, side: Side, redis: &mut Redis, value: &[u8]) -> Result<()> {
    let there = mean(pair, side, "lan", || {
        for _ in 0..3 {
            let reply = redis.command(&[b"SET", b"large", value])?;
            ensure!(reply == Reply::Status("OK".into()), "redis says {reply:?}");
        }
        Ok(())
    })?;
    let back = mean(pair, side, "guest", || {
        for _ in 0..3 {
            let reply = redis.command(&[b"GET", b"large"])?;
            ensure!(reply == Reply::Bulk(Some(value.to_vec())), "Another value came back");
        }
        Ok(())
    })?;
    println!("{side:?}: frames of {there} bytes to the guest, of {back} from it");
    ensure!(
        there > FRAME_BYTES_MAX && back > FRAME_BYTES_MAX,
        "On {side:?} frames had {there} and {back} bytes: segmentation was not left to others"
    );
    Ok(())
}

/// The mean length of the frames of this kind ("lan" or "guest") that pass during `work`, in bytes.
fn mean(pair: &Pair, side: Side, kind: &str, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let figures = || -> Result<[u64; 2]> {
        let status = pair.status(side)?;
        Ok(["bytes", "frames"].map(|what| status.number(&format!("/net/0/frames/{kind}_{what}"))))
    };
    let before = figures()?;
    work()?;
    let after = figures()?;
    Ok((after[0] - before[0]) / (after[1] - before[1]).max(1))
}
