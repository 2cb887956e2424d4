//! What a device's worker thread is made of: a core to run on, a way to be told things, and how long to poll.

mod mailbox;
mod polling;
mod priority;

pub use mailbox::{Mailbox, Sender, mailbox};
pub use polling::Polling;
pub use priority::prefer_this_thread;

/// Binds the calling thread to one core.
///
/// # Errors
/// There is no such core, or this process may not use it.
pub fn pin(core: usize) -> std::io::Result<()> {
    let known = core_affinity::get_core_ids().unwrap_or_default();
    if known.iter().any(|id| id.id == core)
        && core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        return Ok(());
    }
    let usable: Vec<String> = known.iter().map(|id| id.id.to_string()).collect();
    Err(std::io::Error::new(
        std::io::ErrorKind::InvalidInput,
        format!("Core {core} cannot be used by this process, these can: {}", usable.join(", ")),
    ))
}
