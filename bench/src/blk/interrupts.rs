//! On which core the disk's interrupts arrive.
//!
//! The kernel ends direct writes on that core, in threads of its own. A client that polls there keeps them waiting for
//! a tick of 4 ms and more, whoever serves; the server does not, since it sleeps while the disk works.

use std::fs;

use anyhow::{Context, Result};

/// How many interrupts of devices each core has had so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupts(Vec<u64>);

impl Interrupts {
    /// Counts them.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/interrupts").context("/proc/interrupts")?;
        Ok(Self::parse(&text))
    }

    /// The heading has a word for each core; the lines of devices have a number for a name, other lines (timer, calls
    /// between cores) a word.
    fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let cores = lines.next().unwrap_or_default().split_whitespace().count();
        let mut counts = vec![0; cores];
        for line in lines {
            let Some((name, rest)) = line.split_once(':') else {
                continue;
            };
            if name.trim().parse::<u32>().is_err() {
                continue;
            }
            let numbers = rest.split_whitespace().map_while(|word| word.parse::<u64>().ok());
            for (count, number) in counts.iter_mut().zip(numbers) {
                *count += number;
            }
        }
        Self(counts)
    }

    /// The core that has had most of those since `earlier`, and most of all; none where they are spread.
    pub fn busiest_core_since(&self, earlier: &Self) -> Option<usize> {
        let grown: Vec<u64> =
            self.0.iter().zip(&earlier.0).map(|(now, before)| now.saturating_sub(*before)).collect();
        let (core, &most) = grown.iter().enumerate().max_by_key(|(_, grown)| **grown)?;
        (most * 10 > grown.iter().sum::<u64>() * 8 && most > 0).then_some(core)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "           CPU0       CPU1\n 36:   10   100  PCI-MSIX-0000:00:02.0  1-edge  virtio1-req.0\n\
                          LOC:   5000   60  Local timer interrupts\n";

    #[test]
    fn only_devices_count() {
        assert_eq!(Interrupts::parse(BEFORE), Interrupts(vec![10, 100]));
    }

    #[test]
    fn the_core_with_nearly_all_of_them_is_the_disks() {
        let before = Interrupts(vec![10, 100]);
        assert_eq!(Interrupts(vec![20, 200]).busiest_core_since(&before), Some(1));
        assert_eq!(Interrupts(vec![60, 200]).busiest_core_since(&before), None);
        assert_eq!(before.busiest_core_since(&before), None);
    }
}
