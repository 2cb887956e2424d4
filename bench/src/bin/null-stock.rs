//! A null disk on the stock `vhost-user-backend` crate: what a server made of the usual parts does. It answers every
//! request and touches no data.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Serves a null disk with one queue.
#[derive(Parser)]
struct Arguments {
    /// Unix socket on which the VMM is awaited
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// Size of the disk
    #[arg(long, value_name = "BYTES")]
    null: u64,
    /// How long it looks for more requests before it sleeps
    #[arg(long, default_value_t = 50, value_name = "MICROSECONDS")]
    poll_us: u64,
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;
type Vring = VringMutex<Memory>;

struct Null {
    sectors: u64,
    poll: Duration,
    memory: OnceLock<Memory>,
    event_idx: AtomicBool,
}

impl Null {
    /// Answers what is available now. Returns whether there was something.
    fn answer(&self, vring: &Vring, memory: &GuestMemoryMmap<()>) -> Result<bool> {
        let mut state = vring.get_mut();
        let mut done = Vec::new();
        for mut chain in state.get_queue_mut().iter(memory)? {
            let head = chain.head_index();
            let status = chain.by_ref().last().context("An empty chain")?;
            let place = status.addr().0 + u64::from(status.len()) - 1;
            memory.write_obj(VIRTIO_BLK_S_OK as u8, vm_memory::GuestAddress(place))?;
            done.push(head);
        }
        for &head in &done {
            state.get_queue_mut().add_used(memory, head, 1)?;
        }
        if !done.is_empty() && (!self.event_idx.load(Ordering::Relaxed) || state.needs_notification()?) {
            state.signal_used_queue()?;
        }
        Ok(!done.is_empty())
    }

    fn serve(&self, vring: &Vring) -> Result<()> {
        let memory = self.memory.get().context("No guest memory")?.memory();
        loop {
            vring.disable_notification()?;
            let mut last = Instant::now();
            while last.elapsed() < self.poll {
                if self.answer(vring, &memory)? {
                    last = Instant::now();
                }
            }
            if !vring.enable_notification()? {
                return Ok(());
            }
            self.answer(vring, &memory)?;
        }
    }
}

impl VhostUserBackend for Null {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        let bits = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_FLUSH];
        bits.iter().fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.resize((offset + size) as usize, 0);
        config.split_off(offset as usize)
    }

    /// Without one its worker never ends, and whoever drops the server waits for ever.
    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        // always the same one; the server replaces what is in it
        drop(self.memory.set(memory));
        Ok(())
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        self.serve(&vrings[usize::from(event)]).map_err(|error| io::Error::other(format!("{error:#}")))
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null-stock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut listener = Listener::new(&arguments.socket_path, true).context("--socket-path")?;
    loop {
        // a new one for each frontend: a second SET_OWNER is an error to it
        let device = Arc::new(Null {
            sectors: arguments.null / 512,
            poll: Duration::from_micros(arguments.poll_us),
            memory: OnceLock::new(),
            event_idx: AtomicBool::new(false),
        });
        let server = |error| anyhow!("vhost-user-backend: {error:?}");
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
        let mut daemon = VhostUserDaemon::new("null-stock".into(), device, memory).map_err(server)?;
        daemon.start(&mut listener).map_err(server)?;
        // a frontend that leaves is an error to it
        drop(daemon.wait());
    }
}
