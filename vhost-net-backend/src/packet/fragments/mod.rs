//! Fragments of IP datagrams, put together (RFC 791 §3.2, RFC 8200 §4.5).
//!
//! Nothing is dropped here: what goes in comes out, in a datagram or one by one. One by one comes what makes no datagram:
//! fragments that overlap (RFC 5722; receivers of IPv4 choose differently which one counts, so that there is no datagram to
//! speak of either), that lie about their lengths, or whose others do not come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::{DerefMut, Range};

use super::{Addresses, Kind, Packet, Transport, Vlan, be16, be32, checksum};

/// The longest IP packet.
const PACKET_BYTES_MAX: usize = 65_535;
/// Bytes of a fragment header of IPv6.
const V6_FRAGMENT_BYTES: usize = 8;
/// Datagrams that are remembered because their fragments come one by one.
const SINGLE_MAX: usize = 4096;
/// How long they are, in microseconds: fragments of one datagram are sent in one go.
const SINGLE_US: u64 = 2_000_000;
/// Bytes that a fragment costs beside its own.
const FRAGMENT_COST: usize = 128;

/// What fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    vlan: Vlan,
    addresses: Addresses,
    /// No part of an IPv6 datagram's name (RFC 8200 §4.5): 0.
    protocol: u8,
    identification: u32,
}

/// A fragment, as its headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which datagram it belongs to.
    pub key: DatagramKey,
    network_at: usize,
    /// Its place in the datagram, in bytes.
    offset: usize,
    /// Whether there is something behind it.
    more: bool,
    content: Range<usize>,
}

impl Packet {
    /// Whether it is a fragment.
    pub fn is_fragment(&self) -> bool {
        matches!(&self.kind, Kind::Datagram { transport: Transport::Fragment { .. }, .. })
    }

    /// The fragment that `frame`, which is this packet, carries.
    pub fn fragment(&self, frame: &[u8]) -> Option<Fragment> {
        let Kind::Datagram { addresses, transport: Transport::Fragment { protocol }, place, content } =
            &self.kind
        else {
            return None;
        };
        let is_v4 = addresses.source.is_ipv4();
        let (identification, offset, more) = if is_v4 {
            let identification = be16(frame, self.network_at + 4)?.into();
            (identification, usize::from(place & 0x1fff) * 8, place & 0x2000 != 0)
        } else {
            (be32(frame, content.start - 4)?, usize::from(place & 0xfff8), place & 1 != 0)
        };
        let key = DatagramKey {
            vlan: self.vlan,
            addresses: *addresses,
            protocol: if is_v4 { *protocol } else { 0 },
            identification,
        };
        Some(Fragment { key, network_at: self.network_at, offset, more, content: content.clone() })
    }
}

/// A fragment in its datagram: which frame, and where in it.
#[derive(Clone, Debug)]
struct Part {
    frame: usize,
    content: Range<usize>,
}

/// A datagram of which something is missing.
#[derive(Debug)]
struct Partial<F> {
    since_us: u64,
    network_at: usize,
    /// In the order in which they came.
    frames: Vec<F>,
    /// By their offsets.
    parts: BTreeMap<usize, Part>,
    progress: Progress,
}

/// How much of a datagram has come.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    bytes: usize,
    total: Option<usize>,
}

impl Progress {
    fn add(&mut self, fragment: &Fragment) {
        self.bytes += fragment.content.len();
        if !fragment.more {
            self.total = Some(fragment.offset + fragment.content.len());
        }
    }

    fn is_complete(&self) -> bool {
        self.total.is_some_and(|total| self.bytes >= total)
    }
}

/// A datagram, and the frames that it came in.
#[derive(Debug)]
pub struct Datagram<F> {
    /// A frame as if it had not been fragmented. Its identification is zero.
    pub frame: Vec<u8>,
    payload_at: usize,
    /// In the order in which they came.
    frames: Vec<F>,
    parts: BTreeMap<usize, Part>,
}

/// What comes of a fragment.
#[derive(Debug)]
pub enum Put<F> {
    /// It waits for others.
    Kept,
    /// It was the last one.
    Whole(Datagram<F>),
    /// It and those that waited for it are no datagram. In the order in which they came.
    Singly(Vec<F>),
}

/// Datagrams that are being put together.
#[derive(Debug)]
pub struct Reassembler<F> {
    partials: HashMap<DatagramKey, Partial<F>>,
    /// When each began, the oldest first, and some that are complete.
    begun: VecDeque<(u64, DatagramKey)>,
    /// Datagrams whose fragments come one by one.
    single: HashMap<DatagramKey, Progress>,
    /// When each became that, the oldest first, and some that are complete.
    singled: VecDeque<(u64, DatagramKey)>,
    bytes: usize,
    frames: usize,
}

impl<F> Default for Reassembler<F> {
    fn default() -> Self {
        Self {
            partials: HashMap::new(),
            begun: VecDeque::new(),
            single: HashMap::new(),
            singled: VecDeque::new(),
            bytes: 0,
            frames: 0,
        }
    }
}

impl<F: DerefMut<Target = [u8]>> Partial<F> {
    fn begun_by(fragment: &Fragment, now_us: u64) -> Self {
        Self {
            since_us: now_us,
            network_at: fragment.network_at,
            frames: Vec::new(),
            parts: BTreeMap::new(),
            progress: Progress::default(),
        }
    }

    /// Whether the fragment makes sense beside the others.
    fn fits(&self, fragment: &Fragment) -> bool {
        let (start, bytes) = (fragment.offset, fragment.content.len());
        let end = start + bytes;
        let last_end = self.parts.last_key_value().map_or(0, |(start, part)| start + part.content.len());
        let ends_with = match (self.progress.total, fragment.more) {
            (Some(total), true) => end < total,
            (Some(_), false) => false,
            (None, true) => true,
            (None, false) => end >= last_end,
        };
        let before = self.parts.range(..=start).next_back();
        let behind = self.parts.range(start..).next();
        bytes > 0
            && (!fragment.more || bytes.is_multiple_of(8))
            && end <= PACKET_BYTES_MAX
            && ends_with
            && before.is_none_or(|(at, part)| at + part.content.len() <= start)
            && behind.is_none_or(|(at, _)| end <= *at)
    }

    fn add(&mut self, fragment: &Fragment, frame: F) {
        let part = Part { frame: self.frames.len(), content: fragment.content.clone() };
        if fragment.offset == 0 {
            self.network_at = fragment.network_at;
        }
        self.parts.insert(fragment.offset, part);
        self.progress.add(fragment);
        self.frames.push(frame);
    }

    /// The datagram, of which nothing is missing.
    ///
    /// # Errors
    /// It is longer than IP packets are. The frames come back.
    fn whole(self) -> Result<Datagram<F>, Vec<F>> {
        let Self { network_at, frames, parts, .. } = self;
        let Some(first) = parts.get(&0) else {
            return Err(frames);
        };
        let payload_at = first.content.start;
        let mut frame = frames[first.frame][..payload_at].to_vec();
        for part in parts.values() {
            frame.extend_from_slice(&frames[part.frame][part.content.clone()]);
        }
        if frame.len() - network_at > PACKET_BYTES_MAX {
            return Err(frames);
        }
        mend_headers(&mut frame, network_at, payload_at);
        Ok(Datagram { frame, payload_at, frames, parts })
    }
}

/// Makes the first fragment's headers those of the whole.
fn mend_headers(frame: &mut [u8], network_at: usize, payload_at: usize) {
    let bytes = frame.len() - network_at;
    let (header, _) = frame[network_at..].split_at_mut(payload_at - network_at);
    if header[0] >> 4 == 4 {
        header[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
        // identification, flags, offset; the checksum
        header[4..8].fill(0);
        header[10..12].fill(0);
        let sum = checksum::of(&[header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        header[4..6].copy_from_slice(&((bytes - super::ip::V6_HEADER_BYTES) as u16).to_be_bytes());
        // a fragment header that says that this is all (RFC 6946)
        let at = header.len() - V6_FRAGMENT_BYTES;
        header[at + 2..].fill(0);
    }
}

impl<F: DerefMut<Target = [u8]>> Datagram<F> {
    /// Bytes of memory that it takes.
    pub fn cost(&self) -> usize {
        self.frame.len() + self.frames.iter().map(|frame| frame.len() + FRAGMENT_COST).sum::<usize>()
    }

    /// The fragments in the order in which they came, with what has been changed in the payload of [`Datagram::frame`].
    pub fn into_fragments(mut self) -> Vec<F> {
        for (offset, part) in self.parts {
            let at = self.payload_at + offset;
            let bytes = &self.frame[at..at + part.content.len()];
            self.frames[part.frame][part.content].copy_from_slice(bytes);
        }
        self.frames
    }
}

impl<F: DerefMut<Target = [u8]>> Reassembler<F> {
    /// A fragment has come, in this frame.
    pub fn put(&mut self, fragment: &Fragment, frame: F, now_us: u64) -> Put<F> {
        if let Some(progress) = self.single.get_mut(&fragment.key) {
            progress.add(fragment);
            if progress.is_complete() {
                self.single.remove(&fragment.key);
            }
            return Put::Singly(vec![frame]);
        }
        let partial = self.partials.entry(fragment.key).or_insert_with(|| {
            self.begun.push_back((now_us, fragment.key));
            Partial::begun_by(fragment, now_us)
        });
        let fits = partial.fits(fragment);
        self.bytes += frame.len();
        self.frames += 1;
        if !fits {
            partial.frames.push(frame);
            let progress = partial.progress;
            self.remember_single(fragment.key, progress, now_us);
            return Put::Singly(self.take(&fragment.key).map_or_else(Vec::new, |partial| partial.frames));
        }
        partial.add(fragment, frame);
        if !partial.progress.is_complete() {
            return Put::Kept;
        }
        match self.take(&fragment.key).map(Partial::whole) {
            Some(Ok(datagram)) => Put::Whole(datagram),
            Some(Err(frames)) => Put::Singly(frames),
            None => Put::Kept,
        }
    }

    fn take(&mut self, key: &DatagramKey) -> Option<Partial<F>> {
        let partial = self.partials.remove(key)?;
        while let Some((since_us, key)) = self.begun.front()
            && self.partials.get(key).is_none_or(|partial| partial.since_us != *since_us)
        {
            self.begun.pop_front();
        }
        self.frames -= partial.frames.len();
        self.bytes -= partial.frames.iter().map(|frame| frame.len()).sum::<usize>();
        Some(partial)
    }

    fn remember_single(&mut self, key: DatagramKey, progress: Progress, now_us: u64) {
        while let Some((since_us, oldest)) = self.singled.front()
            && (self.singled.len() >= SINGLE_MAX || since_us + SINGLE_US < now_us)
        {
            self.single.remove(oldest);
            self.singled.pop_front();
        }
        self.single.insert(key, progress);
        self.singled.push_back((now_us, key));
    }

    /// When the oldest of the datagrams of which something is missing began.
    pub fn oldest_us(&self) -> Option<u64> {
        Some(self.begun.front()?.0)
    }

    /// Gives up those that began before `before_us`: the fragments come out, and others of theirs will one by one.
    pub fn give_up(&mut self, before_us: u64, now_us: u64) -> Vec<F> {
        let mut frames = Vec::new();
        while let Some((since_us, key)) = self.begun.front().copied()
            && since_us < before_us
            && let Some(partial) = self.take(&key)
        {
            self.remember_single(key, partial.progress, now_us);
            frames.extend(partial.frames);
        }
        frames
    }

    /// The sender is what the sender of `other` is from now on; nothing that was kept here counts.
    pub fn become_like<G>(&mut self, other: &Reassembler<G>) {
        *self = Self { single: other.single.clone(), singled: other.singled.clone(), ..Self::default() };
    }

    /// Bytes of the frames that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many frames wait.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// About how much memory they take.
    pub fn cost(&self) -> usize {
        self.bytes + self.frames * FRAGMENT_COST
    }
}

#[cfg(test)]
mod tests;
