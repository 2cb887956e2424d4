//! The client's datagrams: questions that the guest answers, each with the bytes of the question changed.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp::Socket;

use crate::app::{Bytes, echoed};
use crate::guest::DATAGRAM_PORT;
use crate::stack::{GUEST, datagram_socket};

const PORT: u16 = 5_000;

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) count: u32,
    pub(crate) bytes_max: u32,
    pub(crate) every_us: u64,
    pub(crate) v6: bool,
}

pub(crate) struct Datagrams {
    plan: Plan,
    handle: SocketHandle,
    asked: u32,
    next_us: u64,
}

/// The question with this number.
fn question(number: u32, bytes_max: u32) -> Vec<u8> {
    let mut bytes = Bytes::of(number);
    let length =
        if bytes_max == 0 { 0 } else { u32::from_be_bytes([0; 4].map(|_: u8| bytes.next())) % bytes_max };
    number.to_be_bytes().into_iter().chain((0..length).map(|_| bytes.next())).collect()
}

impl Datagrams {
    pub(crate) fn new(plan: Plan, sockets: &mut SocketSet<'static>) -> Self {
        Self { plan, handle: sockets.add(datagram_socket(PORT)), asked: 0, next_us: 0 }
    }

    /// Asks what is due and looks at the answers, of which some are lost and some come twice.
    pub(crate) fn work(&mut self, now_us: u64, sockets: &mut SocketSet<'static>) {
        let socket = sockets.get_mut::<Socket>(self.handle);
        while let Ok((answer, _)) = socket.recv() {
            let (number, _) = answer.split_first_chunk::<4>().expect("an answer has its number");
            let number = u32::from_be_bytes(number.map(|byte| (byte ^ 0x5a).rotate_right(3)));
            let expected: Vec<u8> = question(number, self.plan.bytes_max).into_iter().map(echoed).collect();
            assert!(number < self.asked && answer == expected, "the answer to datagram {number} is wrong");
        }
        if !self.is_done() && now_us >= self.next_us && socket.can_send() {
            let bytes = question(self.asked, self.plan.bytes_max);
            let guest = GUEST[usize::from(self.plan.v6)];
            socket.send_slice(&bytes, (guest, DATAGRAM_PORT)).unwrap();
            self.asked += 1;
            self.next_us = now_us + self.plan.every_us;
        }
    }

    pub(crate) fn next_us(&self) -> Option<u64> {
        (!self.is_done()).then_some(self.next_us)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.asked == self.plan.count
    }
}
