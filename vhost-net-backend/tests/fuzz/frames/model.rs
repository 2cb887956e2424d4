//! What the data path does, in the plainest words (virtio 1.2 §5.1.6).

use std::collections::VecDeque;

pub(super) const CSUM: u32 = 0;
pub(super) const GUEST_TSO4: u32 = 7;
pub(super) const GUEST_TSO6: u32 = 8;
pub(super) const GUEST_ECN: u32 = 9;
pub(super) const HOST_TSO4: u32 = 11;
pub(super) const HOST_TSO6: u32 = 12;
pub(super) const HOST_ECN: u32 = 13;
pub(super) const MRG_RXBUF: u32 = 15;
pub(super) const VERSION_1: u32 = 32;
pub(super) const GUEST_USO4: u32 = 54;
pub(super) const GUEST_USO6: u32 = 55;
pub(super) const HOST_USO: u32 = 56;

const FRAME_MIN: usize = 14;
const FRAME_MAX: usize = 65_557;
/// The longest frame of a LAN with an MTU of 1500.
const FRAME_OF_LAN: usize = 1522;
/// Pieces of one chain, and of one call of the kernel.
const PIECES_MAX: usize = 1024;
/// After so many packets that are no longer the next is expected to be none either.
const SMALL: usize = 2048;
const SMALL_FRAMES: u32 = 16;

/// A buffer: where it is, and how long. An empty one is none, wherever it claims to be.
pub(super) type Piece = (u64, u32);

/// A descriptor chain.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) readable: Vec<Piece>,
    pub(super) writable: Vec<Piece>,
    pub(super) malformed: bool,
}

/// The pieces where memory is cut into regions.
fn cut(pieces: &[Piece], cuts: &[u64]) -> Vec<Piece> {
    let mut all = Vec::new();
    for &(mut at, bytes) in pieces {
        let end = at.wrapping_add(bytes.into());
        for &cut in cuts {
            if bytes > 0 && at < cut && cut < end {
                all.push((at, (cut - at) as u32));
                at = cut;
            }
        }
        if bytes > 0 {
            all.push((at, (end - at) as u32));
        }
    }
    all
}

fn total(pieces: &[Piece]) -> usize {
    pieces.iter().map(|(_, bytes)| *bytes as usize).sum()
}

fn gather(memory: &[u8], pieces: &[Piece]) -> Vec<u8> {
    let mut all = Vec::with_capacity(total(pieces));
    for &(at, bytes) in pieces.iter().filter(|(_, bytes)| *bytes > 0) {
        all.extend_from_slice(&memory[at as usize..][..bytes as usize]);
    }
    all
}

/// A queue as the device sees it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) runs: bool,
    pub(super) broken: bool,
    /// The available index claims more requests than the ring has entries.
    pub(super) claims: bool,
    /// Where memory was cut when it was started.
    pub(super) cuts: Vec<u64>,
    /// What is available, and was not taken.
    pub(super) offered: VecDeque<Request>,
    /// Taken, without a frame so far.
    pub(super) held: VecDeque<Request>,
    /// The next available entry to take.
    pub(super) next: u16,
    /// Used since the last look: the head, and what was written.
    pub(super) used: Vec<(u16, u32)>,
}

impl Queue {
    fn take(&mut self) -> Option<Request> {
        if !self.runs || self.broken {
            return None;
        }
        let Some(request) = self.offered.pop_front() else {
            self.broken = self.claims;
            return None;
        };
        self.next = self.next.wrapping_add(1);
        let pieces = cut(&request.readable, &self.cuts).len() + cut(&request.writable, &self.cuts).len();
        self.broken = request.malformed || pieces > PIECES_MAX;
        (!self.broken).then_some(request)
    }

    fn put_back(&mut self, request: Request) {
        self.offered.push_front(request);
        self.next = self.next.wrapping_sub(1);
    }

    /// Returns where the next one goes on.
    pub(super) fn stop(&mut self) -> u16 {
        self.runs = false;
        while let Some(request) = self.held.pop_back() {
            self.put_back(request);
        }
        self.next
    }

    /// What is held, piece by piece.
    fn pieces_held(&self) -> Vec<Piece> {
        self.held.iter().flat_map(|request| cut(&request.writable, &self.cuts)).collect()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) guest_frames: u64,
    pub(super) guest_bytes: u64,
    pub(super) guest_malformed: u64,
    pub(super) guest_too_long: u64,
    pub(super) lan_frames: u64,
    pub(super) lan_bytes: u64,
    pub(super) lan_refused: u64,
    pub(super) lan_ignored: u64,
}

#[derive(Debug)]
pub(super) struct Model {
    features: u64,
    /// Entries of each queue.
    size: u16,
    pub(super) receive: Queue,
    pub(super) transmit: Queue,
    pub(super) link_up: bool,
    /// The LAN takes nothing for now.
    pub(super) full: bool,
    /// Packets of the LAN, with their headers, that the device has not taken.
    pub(super) coming: VecDeque<Vec<u8>>,
    /// Packets that the LAN gets, with their headers.
    pub(super) sent: Vec<Vec<u8>>,
    /// What the device has written of the driver's buffers.
    pub(super) written: Vec<Piece>,
    /// What it may say that it has written besides: buffers of frames that were dropped.
    pub(super) perhaps_written: Vec<Piece>,
    /// How many packets in a row were small.
    pub(super) small_frames: u32,
    pub(super) figures: Figures,
}

impl Model {
    pub(super) fn new(features: u64, size: u16, figures: Figures) -> Self {
        Self {
            features,
            size,
            receive: Queue::default(),
            transmit: Queue::default(),
            link_up: true,
            full: false,
            coming: VecDeque::new(),
            sent: Vec::new(),
            written: Vec::new(),
            perhaps_written: Vec::new(),
            small_frames: 0,
            figures,
        }
    }

    pub(super) fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// §5.1.6: `num_buffers` is there with VERSION_1 or MRG_RXBUF.
    pub(super) fn header_bytes(&self) -> usize {
        if self.has(VERSION_1) || self.has(MRG_RXBUF) { 12 } else { 10 }
    }

    /// The device does all that there is to do.
    pub(super) fn run(&mut self, memory: &mut [u8]) {
        self.transmit(memory);
        self.receive(memory);
    }

    fn transmit(&mut self, memory: &[u8]) {
        while let Some(request) = self.transmit.take() {
            let bytes = gather(memory, &request.readable);
            if let Some(packet) = self.packet(&bytes) {
                let frame_bytes = packet.len() - self.header_bytes();
                let is_taken = self.link_up && !self.has_too_many_pieces(&request);
                if is_taken && self.full {
                    self.transmit.put_back(request);
                    return;
                }
                self.figures.guest_frames += 1;
                self.figures.guest_bytes += frame_bytes as u64;
                if is_taken {
                    self.sent.push(packet);
                } else {
                    self.figures.lan_refused += 1;
                }
            } else {
                self.figures.guest_malformed += 1;
            }
            self.transmit.used.push((request.head, 0));
        }
    }

    /// The kernel takes no more in one call. What is short is put together before.
    fn has_too_many_pieces(&self, request: &Request) -> bool {
        let mut of_header = self.header_bytes();
        let mut of_frame = 0;
        for (_, bytes) in cut(&request.readable, &self.transmit.cuts) {
            let taken = of_header.min(bytes as usize);
            of_header -= taken;
            of_frame += usize::from(taken < bytes as usize);
        }
        total(&request.readable) > 2048 && 1 + of_frame > PIECES_MAX
    }

    /// What the LAN gets if the driver sends this (§5.1.6.2); `None` when it is nothing to send.
    fn packet(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, frame) = bytes.split_at_checked(self.header_bytes())?;
        if frame.len() < FRAME_MIN || frame.len() > FRAME_MAX {
            return None;
        }
        let word = |at: usize| usize::from(header[at]) + 256 * usize::from(header[at + 1]);
        let (length, size, start, offset) = (word(2), word(4), word(6), word(8));
        let checksum = header[0] % 2 == 1;
        if checksum && !(self.has(CSUM) && start >= 14 && start + offset + 2 <= frame.len()) {
            return None;
        }
        let large = match header[1] % 128 {
            0 => false,
            1 if self.has(HOST_TSO4) => true,
            4 if self.has(HOST_TSO6) => true,
            5 if self.has(HOST_USO) => true,
            _ => return None,
        };
        let congestion = header[1] >= 128;
        if large && (!checksum || size == 0 || congestion && !self.has(HOST_ECN)) {
            return None;
        }
        // what means something, and zeros for all else
        let mut packet = vec![0; header.len()];
        if checksum {
            packet[0] = 1;
            packet[6..10].copy_from_slice(&header[6..10]);
        }
        if large {
            packet[1] = header[1];
            packet[2..4].copy_from_slice(&(length.min(frame.len()) as u16).to_le_bytes());
            packet[4..6].copy_from_slice(&header[4..6]);
        }
        packet.extend_from_slice(frame);
        Some(packet)
    }

    /// What a frame may need with its header.
    fn frame_max(&self) -> usize {
        let large = [GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4, GUEST_USO6];
        let frame = if large.iter().any(|bit| self.has(*bit)) { FRAME_MAX } else { FRAME_OF_LAN };
        frame + self.header_bytes()
    }

    /// Whether the device asks the LAN for a packet: it has one buffer, or where buffers are merged as many as the longest
    /// frame needs, or a quarter of the ring, or half of the pieces that the kernel takes in a call.
    fn has_room(&self) -> bool {
        if !self.has(MRG_RXBUF) || self.receive.held.is_empty() {
            return !self.receive.held.is_empty();
        }
        let pieces = self.receive.pieces_held();
        total(&pieces) >= self.frame_max()
            || self.receive.held.len() >= usize::from(self.size / 4)
            || pieces.len() >= PIECES_MAX / 2
    }

    fn receive(&mut self, memory: &mut [u8]) {
        loop {
            while !self.has_room() {
                let Some(request) = self.receive.take() else { return };
                self.receive.held.push_back(request);
            }
            let Some(packet) = self.coming.pop_front() else { return };
            let pieces = self.receive.pieces_held();
            let room = total(&pieces);
            let (first, direct) = self.direct(&pieces);
            // where a call has more room than a frame may need, nothing is looked for behind it
            let bytes = if direct > self.frame_max() {
                self.fill(memory, first, &packet);
                if packet.len() < direct { packet.len() } else { room + 1 }
            } else {
                self.fill(memory, &pieces, &packet[..packet.len().min(direct + FRAME_MAX)]);
                packet.len()
            };
            self.small_frames = if bytes <= SMALL { self.small_frames + 1 } else { 0 };
            let frame_bytes = packet.len().saturating_sub(self.header_bytes());
            if frame_bytes >= FRAME_MIN && self.link_up && bytes <= room {
                self.figures.lan_frames += 1;
                self.figures.lan_bytes += frame_bytes as u64;
                self.give(memory, packet.len());
                continue;
            }
            self.perhaps_written.extend(pieces);
            if frame_bytes < FRAME_MIN {
                continue;
            }
            if self.link_up {
                self.figures.guest_too_long += 1;
            } else {
                self.figures.lan_ignored += 1;
            }
        }
    }

    /// The pieces into which a frame is read at once, and their bytes: what one call takes, besides one for what does not
    /// fit, and few of them after small frames.
    fn direct<'p>(&self, pieces: &'p [Piece]) -> (&'p [Piece], usize) {
        let mut count = pieces.len();
        if count > PIECES_MAX - 1 {
            count = PIECES_MAX - 1;
        } else if self.small_frames >= SMALL_FRAMES {
            count = (1..count).find(|count| total(&pieces[..*count]) >= SMALL).unwrap_or(count);
        }
        (&pieces[..count], total(&pieces[..count]))
    }

    /// Writes into the pieces, as far as there is room.
    fn fill(&mut self, memory: &mut [u8], pieces: &[Piece], mut data: &[u8]) {
        for &(at, bytes) in pieces {
            let (now, rest) = data.split_at(data.len().min(bytes as usize));
            memory[at as usize..][..now.len()].copy_from_slice(now);
            self.written.push((at, now.len() as u32));
            data = rest;
        }
    }

    /// A packet of so many bytes is in what is held (§5.1.6.4).
    fn give(&mut self, memory: &mut [u8], mut bytes: usize) {
        let mut chains = Vec::new();
        while bytes > 0 {
            let chain = self.receive.held.pop_front().expect("there is room");
            let here = bytes.min(total(&chain.writable));
            self.receive.used.push((chain.head, here as u32));
            bytes -= here;
            chains.push(chain);
        }
        if self.header_bytes() == 12 {
            // in the first buffer, which a driver of sense has made long enough
            let mut front = Vec::new();
            let mut skip = 10;
            for &(at, bytes) in &chains[0].writable {
                let skipped = skip.min(bytes);
                skip -= skipped;
                front.push((at + u64::from(skipped), bytes - skipped));
            }
            self.fill(memory, &front, &(chains.len() as u16).to_le_bytes());
        }
    }
}
