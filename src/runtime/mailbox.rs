//! A channel whose receiver sleeps in `poll` on several things at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::{Receiver, unbounded};
use rustix::event::{EventfdFlags, eventfd};

/// Makes a mailbox and the first of its senders.
///
/// # Errors
/// The system has no more descriptors.
pub fn mailbox<T>() -> io::Result<(Sender<T>, Mailbox<T>)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = unbounded();
    Ok((Sender { sender, wake: wake.clone() }, Mailbox { receiver, wake }))
}

/// Puts messages into a mailbox and wakes its owner.
#[derive(Debug)]
pub struct Sender<T> {
    sender: crossbeam_channel::Sender<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<T> Sender<T> {
    /// Sends one message. Gives it back when the mailbox is gone.
    ///
    /// # Errors
    /// The receiving thread has ended.
    pub fn send(&self, message: T) -> Result<(), T> {
        self.sender.send(message).map_err(|error| error.0)?;
        // A counter that is full wakes just as well, and nothing else can fail.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

/// The worker's end.
#[derive(Debug)]
pub struct Mailbox<T> {
    receiver: Receiver<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Mailbox<T> {
    /// The next message, without waiting. While polling this is one load, no system call.
    pub fn try_recv(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }

    /// To be called when `poll` says that the mailbox is readable: arms it for the next time. Messages are then taken
    /// with [`Mailbox::try_recv`] until there is none.
    pub fn rearm(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn a_message_wakes_the_sleeper_once() {
        let (sender, mailbox) = mailbox().unwrap();
        let readable = |mailbox: &Mailbox<u32>| {
            poll(&mut [PollFd::new(mailbox, PollFlags::IN)], Some(&rustix::event::Timespec::default()))
                .unwrap()
                == 1
        };
        assert!(!readable(&mailbox));
        let other = sender.clone();
        std::thread::spawn(move || other.send(7)).join().unwrap().unwrap();
        sender.send(8).unwrap();
        assert!(readable(&mailbox));
        mailbox.rearm();
        assert!(!readable(&mailbox));
        assert_eq!((mailbox.try_recv(), mailbox.try_recv(), mailbox.try_recv()), (Some(7), Some(8), None));
        drop(mailbox);
        assert_eq!(sender.send(9), Err(9));
    }
}
