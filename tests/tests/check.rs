//! `colo check` tells every point that fails, each with a sentence of its own, and changes nothing.

use std::fs;
use std::process::{ExitCode, Output};

use anyhow::{Context, Result, ensure};
use colo_lab::{GuestImage, Pair, PairOptions, Side};

fn main() -> ExitCode {
    colo_tests::run(&[
        ("a_host_that_can_protect_the_vm", a_host_that_can_protect_the_vm),
        ("each_failing_point_has_its_sentence", each_failing_point_has_its_sentence),
    ])
}

fn check(pair: &Pair) -> Result<Output> {
    let mut command = pair.colo(Side::A)?;
    command.args(["check", "--node", "a"]).arg(pair.config());
    pair.lab().host(Side::A).output(command)
}

fn a_host_that_can_protect_the_vm() -> Result<()> {
    let pair = Pair::prepare(&PairOptions::default(), &GuestImage::make()?)?;
    let output = check(&pair)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

fn each_failing_point_has_its_sentence() -> Result<()> {
    let pair = Pair::prepare(&PairOptions::default(), &GuestImage::make()?)?;
    let text = fs::read_to_string(pair.config())?;
    let disk = format!("disk = {:?}", pair.disk(Side::A).path());
    let arbiter = format!("{:?}", pair.lab().run().directory().join("arbiter"));
    let changes = [
        (disk.as_str(), "disk = \"/nowhere/disk.img\"", "/nowhere/disk.img"),
        ("[vm]", "[vm]\nqemu = \"qemu-nowhere\"", "qemu-nowhere"),
        (arbiter.as_str(), "\"/nowhere/arbiter\"", "/nowhere/arbiter"),
        ("\"10.78.0.1\"", "\"10.99.0.1\"", "10.99.0.1"),
        ("vhost-net-backend\"", "no-net-backend\"", "no-net-backend"),
    ];
    let mut broken = text;
    for (from, to, _) in changes {
        ensure!(broken.contains(from), "{from} is not in the configuration");
        broken = broken.replacen(from, to, 1);
    }
    fs::write(pair.config(), broken).context("Cannot write the configuration")?;
    let output = check(&pair)?;
    let told = String::from_utf8_lossy(&output.stdout);
    print!("{told}");
    ensure!(output.status.code() == Some(1), "It ended with {}", output.status);
    for (_, _, word) in changes {
        let lines: Vec<&str> = told.lines().filter(|line| line.contains(word)).collect();
        ensure!(lines.len() == 1, "Expected one line that names {word}: {lines:?}");
    }
    ensure!(told.lines().count() == changes.len(), "Expected {} lines", changes.len());
    Ok(())
}
