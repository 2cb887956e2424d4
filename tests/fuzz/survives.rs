//! A fuzz target for a few seconds: its seeds, what was found before, and random changes of both.

use std::path::Path;
use std::time::{Duration, Instant};

/// How long each target runs here; `make fuzz` runs them as long as it is told.
const DURATION: Duration = Duration::from_secs(4);

/// Numbers from a seed (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn change(&mut self, data: &mut Vec<u8>) {
        for _ in 0..=self.roll(8) {
            let at = self.roll(data.len() + 1);
            match self.roll(4) {
                0 => data.insert(at, self.roll(256) as u8),
                1 if !data.is_empty() => drop(data.remove(at % data.len())),
                2 if !data.is_empty() => {
                    let length = self.roll(40).min(data.len() - at % data.len());
                    let copy = data[at % data.len()..][..length].to_vec();
                    let to = self.roll(data.len() + 1);
                    data.splice(to..to, copy);
                }
                _ if !data.is_empty() => {
                    let at = at % data.len();
                    data[at] = self.roll(256) as u8;
                }
                _ => {}
            }
        }
        data.truncate(4096);
    }
}

/// `found` has a folder for each target, with what was found by it.
pub(crate) fn survives(target: &str, run: fn(&[u8]), seeds: Vec<(&str, Vec<u8>)>, found: &Path) {
    let seed = std::env::var("COLO_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("COLO_TEST_SEED={seed}");
    let mut dice = Dice(seed);
    let mut inputs: Vec<Vec<u8>> =
        seeds.into_iter().filter(|(of, _)| *of == target).map(|(_, seed)| seed).collect();
    if let Ok(files) = std::fs::read_dir(found.join(target)) {
        inputs.extend(files.map(|file| std::fs::read(file.unwrap().path()).unwrap()));
    }
    assert!(!inputs.is_empty());
    inputs.iter().for_each(|input| run(input));
    let end = Instant::now() + DURATION;
    let mut runs = 0;
    while Instant::now() < end {
        let mut input = inputs[dice.roll(inputs.len())].clone();
        dice.change(&mut input);
        run(&input);
        runs += 1;
    }
    println!("{runs} inputs");
}
