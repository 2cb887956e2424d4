//! One smoltcp stack with its network card: frames in, frames out, at times that the caller says.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

pub(crate) type Frame = Rc<[u8]>;

pub(crate) const CLIENT: [IpAddress; 2] =
    [IpAddress::v4(10, 0, 0, 1), IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, 1)];
pub(crate) const GUEST: [IpAddress; 2] =
    [IpAddress::v4(10, 0, 0, 9), IpAddress::v6(0xfd00, 0, 0, 0, 0, 0, 0, 9)];

thread_local! {
    /// What smoltcp's generator of TSval, which takes no argument, tells.
    static CLOCK_MS: Cell<u32> = const { Cell::new(0) };
}

/// Longest segment that a stack is allowed: smoltcp forgets that options take room too.
pub(crate) const MSS_MAX: u16 = 1380;

/// The card: frames that wait on their way in and out.
pub(crate) struct Card {
    pub(crate) rx: VecDeque<Frame>,
    pub(crate) tx: VecDeque<Frame>,
    /// The stack sends no longer segments: it is told so in the SYNs that it gets.
    pub(crate) mss: u16,
}

impl Card {
    /// The frame as the stack gets it. A wrong checksum stays wrong.
    fn narrowed(&self, frame: Frame) -> Frame {
        let Some(at) = mss_at(&frame) else { return frame };
        let mss = u16::from_be_bytes([frame[at + 22], frame[at + 23]]);
        if mss <= self.mss {
            return frame;
        }
        let mut narrowed = frame.to_vec();
        narrowed[at + 22..at + 24].copy_from_slice(&self.mss.to_be_bytes());
        let sum = u32::from(!u16::from_be_bytes([frame[at + 16], frame[at + 17]]));
        let sum = sum + u32::from(!mss) + u32::from(self.mss);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        narrowed[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
        narrowed.into()
    }
}

/// Where the TCP header begins, if it is one of smoltcp's SYNs, which name the largest segment first.
fn mss_at(frame: &[u8]) -> Option<usize> {
    let at = match (frame.get(12..14)?, frame.get(14)?) {
        ([8, 0], 0x45) if frame[23] == 6 => 34,
        ([0x86, 0xdd], _) if *frame.get(20)? == 6 => 54,
        _ => return None,
    };
    (frame.get(at + 13)? & 2 != 0 && frame.get(at + 20..at + 24)?[..2] == [2, 4]).then_some(at)
}

pub(crate) struct Rx(Frame);
pub(crate) struct Tx<'a>(&'a mut VecDeque<Frame>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame.into());
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Rx(self.narrowed(frame)), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub(crate) struct Stack {
    pub(crate) interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) card: Card,
}

impl Stack {
    pub(crate) fn new(mac: [u8; 6], addresses: [IpAddress; 2], seed: u64) -> Self {
        let mut card = Card { rx: VecDeque::new(), tx: VecDeque::new(), mss: MSS_MAX };
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut card, Instant::ZERO);
        interface.update_ip_addrs(|list| {
            for (address, prefix) in addresses.into_iter().zip([24, 64]) {
                list.push(IpCidr::new(address, prefix)).unwrap();
            }
        });
        Self { interface, sockets: SocketSet::new(Vec::new()), card }
    }

    /// Lets the stack take what has come and send what it has to. Its timestamps are `clock_ms`.
    pub(crate) fn poll(&mut self, now_us: u64, clock_ms: u32) {
        CLOCK_MS.set(clock_ms);
        self.interface.poll(Instant::from_micros(now_us.cast_signed()), &mut self.card, &mut self.sockets);
    }

    /// When a timer of the stack wants it polled.
    pub(crate) fn poll_at(&mut self, now_us: u64) -> Option<u64> {
        let at = self.interface.poll_at(Instant::from_micros(now_us.cast_signed()), &self.sockets)?;
        Some(at.total_micros().cast_unsigned())
    }
}

pub(crate) fn socket(rx_bytes: usize, tx_bytes: usize, timestamps: bool) -> tcp::Socket<'static> {
    let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(rx_bytes), buffer(tx_bytes));
    if timestamps {
        socket.set_tsval_generator(Some(|| CLOCK_MS.get()));
    }
    socket
}

pub(crate) fn datagram_socket(port: u16) -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 16_384]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    socket
}
