//! The proxy under test: the only place that knows its interface. Packets, times and orders in, actions out.

use vhost_net_backend::digest::Key;
use vhost_net_backend::proxy::{Action, Actions, Buffer, Config, Primary, Secondary};

use crate::stack::Frame;

/// What the proxy wants done.
#[derive(Clone, Debug)]
pub(crate) enum Wish {
    ToLan(Frame),
    ToGuest(Frame),
    ToPeer(Message),
    Checkpoint(String),
    MarkerArrived,
}

/// What one half says to the other.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) kind: u16,
    pub(crate) epoch: u64,
    pub(crate) payload: Frame,
}

enum Proxy {
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
}

/// One half of the proxy.
pub(crate) struct Half {
    proxy: Proxy,
    actions: Actions,
}

macro_rules! both {
    ($half:expr, $proxy:ident => $call:expr) => {
        match &mut $half.proxy {
            Proxy::Primary($proxy) => $call,
            Proxy::Secondary($proxy) => $call,
        }
    };
}

impl Half {
    pub(crate) fn primary(config: &Config) -> Self {
        Self { proxy: Proxy::Primary(Box::new(Primary::new(config, 0, 0))), actions: Actions::new() }
    }

    pub(crate) fn secondary(config: &Config) -> Self {
        Self { proxy: Proxy::Secondary(Box::new(Secondary::new(config, 0, 0))), actions: Actions::new() }
    }

    fn wishes(&mut self) -> Vec<Wish> {
        let wishes = self
            .actions
            .iter()
            .map(|action| match action {
                Action::ToLan(frame) => Wish::ToLan(frame[..].into()),
                Action::ToGuest(frame) => Wish::ToGuest(frame[..].into()),
                Action::ToPeer { kind, epoch, payload } => {
                    Wish::ToPeer(Message { kind, epoch, payload: payload.into() })
                }
                Action::CheckpointWanted { cause, detail } => {
                    Wish::Checkpoint(format!("{cause:?}: {detail}"))
                }
                Action::MarkerArrived { .. } => Wish::MarkerArrived,
            })
            .collect();
        self.actions.clear();
        wishes
    }

    pub(crate) fn guest_output(&mut self, frame: &[u8], now_us: u64) -> Vec<Wish> {
        let buffer = Buffer::from(frame);
        both!(self, proxy => proxy.guest_output(buffer, now_us, &mut self.actions));
        self.wishes()
    }

    pub(crate) fn want_digests(&mut self, key: u64) -> Vec<Wish> {
        let Proxy::Primary(primary) = &mut self.proxy else { panic!("the primary names the key") };
        primary.want_digests(Key::new(key).expect("a key"), &mut self.actions);
        self.wishes()
    }

    /// The guest has nothing more to send for now.
    pub(crate) fn guest_pauses(&mut self) -> Vec<Wish> {
        if let Proxy::Secondary(secondary) = &mut self.proxy {
            secondary.flush(&mut self.actions);
        }
        self.wishes()
    }

    pub(crate) fn accepts_output(&mut self) -> bool {
        both!(self, proxy => proxy.accepts_output())
    }

    pub(crate) fn lan_input(&mut self, frame: &[u8], now_us: u64) -> Vec<Wish> {
        both!(self, proxy => proxy.lan_input(frame, now_us, &mut self.actions));
        self.wishes()
    }

    pub(crate) fn peer_message(&mut self, message: &Message, now_us: u64) -> Vec<Wish> {
        let Message { kind, epoch, payload } = message;
        both!(self, proxy => proxy.peer_frame(*kind, *epoch, payload, now_us, &mut self.actions))
            .expect("the halves understand each other");
        self.wishes()
    }

    pub(crate) fn marker(&mut self, epoch: u64) -> Vec<Wish> {
        let Proxy::Primary(primary) = &mut self.proxy else { panic!("only the primary sends a marker") };
        primary.marker(epoch, &mut self.actions).expect("the primary takes the order for a marker");
        self.wishes()
    }

    pub(crate) fn commit(&mut self, epoch: u64, now_us: u64) -> Vec<Wish> {
        match &mut self.proxy {
            Proxy::Primary(primary) => primary.commit(epoch, now_us, &mut self.actions),
            Proxy::Secondary(secondary) => secondary.commit(epoch, &mut self.actions),
        }
        .expect("both halves take the order to commit");
        self.wishes()
    }

    pub(crate) fn next_deadline(&mut self) -> Option<u64> {
        both!(self, proxy => proxy.next_deadline())
    }

    pub(crate) fn tick(&mut self, now_us: u64) -> Vec<Wish> {
        both!(self, proxy => proxy.tick(now_us, &mut self.actions));
        self.wishes()
    }

    pub(crate) fn detach(&mut self) {
        both!(self, proxy => proxy.detach());
    }

    pub(crate) fn take_over(&mut self, now_us: u64) -> Vec<Wish> {
        both!(self, proxy => proxy.take_over(now_us, &mut self.actions));
        self.wishes()
    }

    pub(crate) fn silence(&mut self) {
        both!(self, proxy => proxy.silence());
    }

    /// Segments of which the secondary sent digests.
    pub(crate) fn digests(&mut self) -> u64 {
        match &mut self.proxy {
            Proxy::Primary(_) => 0,
            Proxy::Secondary(secondary) => secondary.stats().digest.map_or(0, |digest| digest.digests),
        }
    }

    /// Packets of the SVM whose numbers were changed.
    pub(crate) fn rewrites(&mut self) -> u64 {
        match &mut self.proxy {
            Proxy::Primary(_) => 0,
            Proxy::Secondary(secondary) => secondary.stats().rewrite.rewritten_out,
        }
    }
}
