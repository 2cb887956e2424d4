//! The arbiter: a register that is written once per generation, first come wins.
//!
//! Whoever has lost its peer claims the next generation. The winner goes on alone, the loser stops its VM. No clocks
//! are involved, and asking again gives the same answer.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::config::ArbiterConfig;

/// One claimed generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its number; 0 is a VM that was never claimed.
    pub number: u64,
    /// The node that owns it; `None` for generation 0.
    pub owner: Option<String>,
}

/// Why the arbiter did not answer. The caller stays silent and asks again.
#[derive(Debug, thiserror::Error)]
#[error("The arbiter cannot be asked: {what}: {error}")]
pub struct ArbiterError {
    what: String,
    error: io::Error,
}

/// A compare-and-swap register per VM and generation.
pub trait Arbiter: Send {
    /// Claims a generation of a VM for a node and returns the node that has it, which is the first that asked.
    ///
    /// # Errors
    /// The register cannot be reached; it may or may not hold the claim now, and asking again is safe.
    fn claim(&self, vm: &str, generation: u64, node: &str) -> Result<String, ArbiterError>;

    /// The highest generation claimed so far.
    ///
    /// # Errors
    /// The register cannot be reached.
    fn current(&self, vm: &str) -> Result<Generation, ArbiterError>;
}

/// The arbiter that the configuration asks for.
///
/// # Errors
/// It cannot be used at all, as a directory that is not there.
pub fn open_arbiter(config: &ArbiterConfig) -> Result<Box<dyn Arbiter>, ArbiterError> {
    match config {
        ArbiterConfig::File { directory } => Ok(Box::new(FileArbiter::open(directory)?)),
    }
}

/// One file per generation in a directory that both hosts see; the link system call decides.
#[derive(Debug)]
pub struct FileArbiter {
    directory: PathBuf,
}

impl FileArbiter {
    /// Uses an existing directory.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn open(directory: &Path) -> Result<Self, ArbiterError> {
        let metadata = fs::metadata(directory).map_err(|error| fault(directory, error))?;
        if !metadata.is_dir() {
            return Err(fault(directory, io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self { directory: directory.to_owned() })
    }

    fn path(&self, vm: &str, generation: u64) -> PathBuf {
        self.directory.join(format!("{vm}.generation-{generation}"))
    }
}

fn fault(path: &Path, error: io::Error) -> ArbiterError {
    ArbiterError { what: path.display().to_string(), error }
}

impl Arbiter for FileArbiter {
    fn claim(&self, vm: &str, generation: u64, node: &str) -> Result<String, ArbiterError> {
        let path = self.path(vm, generation);
        // The file appears whole or not at all: written and synced under a name of our own, then linked. Unlike an
        // O_EXCL open, a crash between the two leaves no claim without an owner.
        let draft = self.directory.join(format!(".{vm}.claim-by-{node}.{}", std::process::id()));
        let claimed = (|| {
            let mut file = File::create(&draft)?;
            file.write_all(node.as_bytes())?;
            file.sync_all()?;
            match fs::hard_link(&draft, &path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }?;
            File::open(&self.directory)?.sync_all()
        })();
        drop(fs::remove_file(&draft));
        claimed.map_err(|error| fault(&path, error))?;
        fs::read_to_string(&path).map_err(|error| fault(&path, error))
    }

    fn current(&self, vm: &str) -> Result<Generation, ArbiterError> {
        let prefix = format!("{vm}.generation-");
        let mut highest = 0;
        for entry in fs::read_dir(&self.directory).map_err(|error| fault(&self.directory, error))? {
            let name = entry.map_err(|error| fault(&self.directory, error))?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.parse().ok());
            highest = highest.max(number.unwrap_or(0));
        }
        let owner = match highest {
            0 => None,
            number => {
                let path = self.path(vm, number);
                Some(fs::read_to_string(&path).map_err(|error| fault(&path, error))?)
            }
        };
        Ok(Generation { number: highest, owner })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_claim_wins_whoever_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let arbiter = FileArbiter::open(dir.path()).unwrap();
        assert_eq!(arbiter.current("vm").unwrap(), Generation { number: 0, owner: None });
        assert_eq!(arbiter.claim("vm", 1, "a").unwrap(), "a");
        assert_eq!(arbiter.claim("vm", 1, "b").unwrap(), "a");
        assert_eq!(arbiter.claim("vm", 1, "a").unwrap(), "a");
        assert_eq!(arbiter.claim("vm", 2, "b").unwrap(), "b");
        assert_eq!(arbiter.claim("vm-2", 7, "a").unwrap(), "a");
        assert_eq!(arbiter.current("vm").unwrap(), Generation { number: 2, owner: Some("b".into()) });
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "drafts are left behind: {names:?}");
    }

    #[test]
    fn of_many_at_once_exactly_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        for generation in 1..50 {
            let winners: Vec<String> = std::thread::scope(|scope| {
                let claims: Vec<_> = ["a", "b", "c"]
                    .map(|node| {
                        let arbiter = FileArbiter::open(dir.path()).unwrap();
                        scope.spawn(move || arbiter.claim("vm", generation, node).unwrap())
                    })
                    .into_iter()
                    .collect();
                claims.into_iter().map(|claim| claim.join().unwrap()).collect()
            });
            assert!(winners.iter().all(|winner| *winner == winners[0]), "{winners:?}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = FileArbiter::open(Path::new("/nowhere/arbiter")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/arbiter"), "{error}");
    }
}
