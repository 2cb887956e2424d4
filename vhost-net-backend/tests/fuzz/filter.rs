//! QEMU's filters, or whoever is there in their place, that send anything: what leaves must have been sent by the primary,
//! and nothing leaves on the primary's word alone.

use std::collections::HashMap;

use vhost_net_backend::filter::{Comparison, Decoder, Message, NotifyDecoder, Packet, encode};
use vhost_net_backend::packet::{self, Kind};
use vhost_net_backend::proxy::Config;

use super::input::Input;

/// Few enough that an input reaches them.
const HELD_BYTES_MAX: usize = 8 << 10;
const HELD_BYTES_FULL: usize = 16 << 10;
const SVM_BYTES_MAX: usize = 16 << 10;
const FLOWS_MAX: usize = 4;

/// A header and a frame.
type Sent = (Vec<u8>, Vec<u8>);

/// The program without its sockets, and what it was told.
struct Stand {
    comparison: Comparison,
    vnet_hdr: bool,
    inputs: [Decoder; 2],
    notify: NotifyDecoder,
    now_us: u64,
    out: Vec<u8>,
    /// What the primary sent and has not left.
    sent: HashMap<Sent, usize>,
    /// Whether something may leave: the secondary has spoken, or a checkpoint was committed.
    may_leave: bool,
}

impl Stand {
    fn new(vnet_hdr: bool) -> Self {
        let mut config = Config::default();
        config.compare.held_bytes_max = HELD_BYTES_MAX;
        config.compare.held_bytes_full = HELD_BYTES_FULL;
        config.compare.svm_bytes_max = SVM_BYTES_MAX;
        config.compare.flows_max = FLOWS_MAX;
        Self {
            comparison: Comparison::new(&config, vnet_hdr, 0),
            vnet_hdr,
            inputs: [Decoder::new(vnet_hdr), Decoder::new(vnet_hdr)],
            notify: NotifyDecoder::default(),
            now_us: 0,
            out: Vec::new(),
            sent: HashMap::new(),
            may_leave: false,
        }
    }

    /// Bytes come from the primary or the secondary.
    fn receive(&mut self, secondary: bool, mut bytes: &[u8]) {
        let decoder = &mut self.inputs[usize::from(secondary)];
        while !bytes.is_empty() {
            decoder.fill(&mut bytes).unwrap();
            loop {
                match decoder.next_packet() {
                    Ok(Some(packet)) if secondary => {
                        self.may_leave = true;
                        self.comparison.svm_says(packet, self.now_us, &mut self.out);
                    }
                    Ok(Some(packet)) => {
                        *self.sent.entry(sent(packet)).or_default() += 1;
                        self.comparison.pvm_says(packet, self.now_us, &mut self.out);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.comparison.lost(error.to_string());
                        decoder.restart();
                        bytes = &[];
                        break;
                    }
                }
            }
        }
        self.check();
    }

    fn notified(&mut self, bytes: &[u8]) {
        self.notify.push(bytes);
        loop {
            match self.notify.next_message() {
                Ok(Some(Message::Checkpoint)) => self.commit(),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => {
                    self.notify = NotifyDecoder::default();
                    break;
                }
            }
        }
    }

    fn commit(&mut self) {
        let epoch = self.comparison.epoch();
        self.may_leave = true;
        self.comparison.commit(epoch, self.now_us, &mut self.out).unwrap();
        self.check();
        assert_eq!((self.comparison.epoch(), self.comparison.awaits_checkpoint()), (epoch + 1, false));
        self.may_leave = false;
        let status = self.comparison.status();
        assert_eq!(status["proxy"]["compare"]["held_packets"], 0, "{status:#}");
    }

    fn tick(&mut self, us: u64) {
        self.now_us += us;
        self.comparison.tick(self.now_us, &mut self.out);
        self.comparison.take_wish();
        self.check();
    }

    /// Looks at what has left.
    fn check(&mut self) {
        let mut decoder = Decoder::new(self.vnet_hdr);
        let mut bytes = &self.out[..];
        while !bytes.is_empty() {
            decoder.fill(&mut bytes).unwrap();
            while let Some(packet) = decoder.next_packet().expect("what leaves is well framed") {
                // what repeats a stream that has left needs no more than that, and an acknowledgment no news
                assert!(
                    self.may_leave || is_tcp(packet.frame),
                    "The primary's word was enough: {packet:02x?}"
                );
                let said = sent(packet);
                match self.sent.get_mut(&said) {
                    Some(count) if *count > 0 => *count -= 1,
                    // made to open a window again
                    _ => assert!(is_bare_acknowledgment(packet.frame), "Nobody has sent {packet:02x?}"),
                }
            }
        }
        self.out.clear();
        let status = self.comparison.status();
        let held = status["proxy"]["compare"]["held_bytes"].as_u64().unwrap() as usize;
        assert!(held <= HELD_BYTES_FULL + 70_000, "{status:#}");
    }
}

/// A packet but for what may be changed in it: the window of a TCP segment, and with it the checksum.
fn sent(packet: Packet<'_>) -> Sent {
    let mut frame = packet.frame.to_vec();
    if let Kind::Tcp { segment, .. } = packet::Packet::parse(&frame).kind {
        frame[segment.at + 14..segment.at + 18].fill(0);
    }
    (packet.header.to_vec(), frame)
}

fn is_tcp(frame: &[u8]) -> bool {
    matches!(packet::Packet::parse(frame).kind, Kind::Tcp { .. })
}

fn is_bare_acknowledgment(frame: &[u8]) -> bool {
    matches!(packet::Packet::parse(frame).kind, Kind::Tcp { segment, .. } if segment.payload.is_empty())
}

/// A frame that is nearly or quite sound.
fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.byte();
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9];
    if kind & 0x40 != 0 {
        frame.extend([0x81, 0, 0, input.byte()]);
    }
    match kind % 8 {
        0 => frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
        1 => {
            let bytes = usize::from(input.byte());
            return input.bytes(bytes).to_vec();
        }
        udp_or_tcp => {
            let (protocol, header): (u8, Vec<u8>) = if udp_or_tcp < 4 {
                (17, vec![0, 53, 0, kind >> 4 & 1, 0, 0, 0, 0])
            } else {
                let flags = [0x10, 0x12, 0x02, 0x18, 0x11, 0x14, 0x04, 0x19][usize::from(input.byte() % 8)];
                let (seq, ack, window) = (input.byte(), input.byte(), input.byte());
                let mut header = vec![0, 80, 0, kind >> 4 & 1, 0, 0, 0, seq, 0, 0, 0, ack, 0x50, flags];
                header.extend([window, 0, 0, 0, 0, 0]);
                (6, header)
            };
            let data = usize::from(input.byte() % 16);
            let data = input.bytes(data).to_vec();
            let total = (20 + header.len() + data.len()) as u16;
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 9, 10, 0, 0, 1]);
            frame.extend(header);
            frame.extend(data);
        }
    }
    frame
}

/// Anything that filters send, in any pieces, with checkpoints in between.
pub fn filter(data: &[u8]) {
    let mut input = Input(data);
    let mut stand = Stand::new(input.byte() % 2 == 1);
    while !input.is_empty() {
        let what = input.byte();
        match what % 8 {
            0 | 1 => {
                let bytes = usize::from(input.word() % 600);
                stand.receive(what % 8 == 1, input.bytes(bytes));
            }
            2..=5 => {
                let frame = frame(&mut input);
                let header = if stand.vnet_hdr {
                    let bytes = [12, 10, 0, 20][usize::from(what >> 6)];
                    let mut header = input.bytes(bytes).to_vec();
                    header.resize(bytes, 0);
                    header
                } else {
                    Vec::new()
                };
                let mut wire = Vec::new();
                encode(Packet { header: &header, frame: &frame }, stand.vnet_hdr, &mut wire);
                // cut anywhere, from either, or from both
                let cut = usize::from(what >> 3) % (wire.len() + 1);
                for secondary in [false, true] {
                    if what % 8 == 5 || secondary == (what % 8 == 4) {
                        stand.receive(secondary, &wire[..cut]);
                        stand.receive(secondary, &wire[cut..]);
                    }
                }
            }
            6 => stand.tick(u64::from(input.word()) * 16),
            _ => match input.byte() % 4 {
                0 => stand.commit(),
                1 => stand.notified(b"\0\0\0\x0fCOLO_CHECKPOINT"),
                _ => {
                    let bytes = usize::from(input.byte() % 40);
                    stand.notified(input.bytes(bytes));
                }
            },
        }
    }
    stand.commit();
}

/// What sound filters send.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let udp = [5, 2, 4, b'd', b'a', b't', b'a'];
    let opening = [[5, 4, 1, 9, 1, 200, 0], [5, 4, 0, 10, 1, 200, 0], [5, 4, 3, 10, 5, 200, 0]].concat();
    let differs = [&[3, 2, 1, b'a'][..], &[4, 2, 1, b'b'], &[6, 0xff, 0xff], &[7, 0]].concat();
    let narrowed =
        [[5, 4, 1, 9, 1, 9, 0], [4, 4, 0, 10, 5, 50, 0], [3, 4, 0, 10, 5, 200, 0], [4, 4, 0, 10, 9, 200, 0]];
    let raw = [&[0, 20, 0][..], &[0, 0, 0, 16], &[7; 16], &[1, 20, 0], &[0, 0, 0, 16], &[7; 16]].concat();
    let too_long = [0, 4, 0, 0xff, 0xff, 0xff, 0xff];
    [0, 1]
        .into_iter()
        .flat_map(|vnet_hdr| {
            let headers = |operations: &[u8]| [&[vnet_hdr], operations].concat();
            [
                headers(&udp),
                headers(&opening),
                headers(&differs),
                headers(&narrowed.concat()),
                headers(&raw),
                headers(&too_long),
            ]
        })
        .map(|seed| ("filter", seed))
        .collect()
}
