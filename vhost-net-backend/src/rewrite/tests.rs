//! An SVM whose numbers are others than the PVM's, told twice: once in each space.

use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, TcpOptionElement, icmpv4, icmpv6};
use proptest::prelude::*;

use super::*;
use crate::packet::Addresses;
use crate::packet::checksum::{self, Checksum};
use crate::test_frames::{Done, Tcp, carry_out, fragments, read};
use crate::wire::OUTPUT;

/// One connection as the two VMs number it.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    v6: bool,
    /// EtherType and identifier of the tags.
    tags: &'static [(u16, u16)],
    port: u16,
    pvm_isn: u32,
    svm_isn: u32,
    /// Clocks at the SYNs; no timestamps at all without.
    clocks: Option<(u32, u32)>,
}

/// A segment, numbered from the SYN of its sender on.
#[derive(Clone, Debug, Default)]
struct Piece {
    from_client: bool,
    syn: bool,
    fin: bool,
    rst: bool,
    no_ack: bool,
    offset: u32,
    acked: u32,
    clock: u32,
    sack: Option<(u32, u32)>,
    misaligned: bool,
    data: Vec<u8>,
}

const CLIENT_ISN: u32 = 0xffff_ff00;

impl Numbers {
    /// Whether a reset of the guest has the number 0 in either space, by which it is taken for the refusal of a SYN.
    fn refuses(&self, piece: &Piece) -> bool {
        let zero = |isn: u32| isn.wrapping_add(piece.offset) == 0;
        piece.rst && !piece.from_client && (zero(self.pvm_isn) || zero(self.svm_isn))
    }

    fn frame(&self, piece: &Piece, of_svm: bool) -> Vec<u8> {
        let guest_isn = if of_svm { self.svm_isn } else { self.pvm_isn };
        let (isn, other_isn) =
            if piece.from_client { (CLIENT_ISN, guest_isn) } else { (guest_isn, CLIENT_ISN) };
        let ack = (!piece.no_ack).then(|| other_isn.wrapping_add(piece.acked));
        let mut options = Vec::new();
        if piece.misaligned {
            options.push(TcpOptionElement::Noop);
        }
        if let Some((pvm, svm)) = self.clocks {
            let guest = if of_svm { svm } else { pvm }.wrapping_add(piece.clock);
            options.push(match (piece.from_client, ack) {
                (false, _) => TcpOptionElement::Timestamp(guest, 77),
                (true, Some(_)) => TcpOptionElement::Timestamp(77, guest),
                (true, None) => TcpOptionElement::Timestamp(77, 0),
            });
        }
        if let (Some((start, end)), Some(_)) = (piece.sack, ack) {
            let edge = |at: u32| other_isn.wrapping_add(at);
            options.push(TcpOptionElement::SelectiveAcknowledgement(
                (edge(start), edge(end)),
                [Some((edge(end), edge(start))), None, None],
            ));
        }
        let mut frame = Tcp {
            v6: self.v6,
            client_port_offset: self.port,
            from_client: piece.from_client,
            seq: isn.wrapping_add(piece.offset),
            ack,
            syn: piece.syn,
            fin: piece.fin,
            rst: piece.rst,
            window: 512,
            options: &options,
            data: &piece.data,
        }
        .frame();
        let tags = self.tags.iter().flat_map(|(kind, id)| [kind.to_be_bytes(), id.to_be_bytes()].concat());
        frame.splice(12..12, tags);
        frame
    }

    fn isn(&self) -> Isn {
        let frame = self.frame(&syn(), false);
        let flow = Packet::parse(&frame).flow_from_guest(&frame);
        Isn { flow, isn: self.pvm_isn, timestamp: self.clocks.map(|clocks| clocks.0) }
    }
}

fn syn() -> Piece {
    Piece { syn: true, acked: 1, ..Piece::default() }
}

/// What a sender puts into the checksum field of so many bytes of TCP for another to complete (virtio 1.2 §5.1.6.2).
fn partial_checksum(addresses: &Addresses, bytes: usize) -> u16 {
    // the checksum over nothing but zeros is that over the pseudo header
    !checksum::of_tcp(addresses, &vec![0; bytes])
}

/// A rewriter with its exit.
struct Bench {
    rewriter: Rewriter,
    actions: Actions,
    exit: Exit,
    /// What the checksum field of a frame holds on its way through here.
    header: FrameHeader,
    now_us: u64,
    /// The highest clock that the SVM has sent, and that the client has echoed, since their SYNs.
    said: u32,
    echoed: u32,
}

impl Bench {
    fn new() -> Self {
        Self {
            rewriter: Rewriter::new(Limits::default()),
            actions: Actions::new(),
            exit: Exit::Peer { epoch: 1 },
            header: FrameHeader::default(),
            now_us: 1,
            said: 0,
            echoed: 0,
        }
    }

    fn pvm_begins(&mut self, numbers: &Numbers) -> Vec<Vec<u8>> {
        self.rewriter.pvm_begins(&numbers.isn(), self.now_us, self.exit, &mut self.actions);
        self.sent()
    }

    fn out(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        let frame = self.left_open(frame);
        self.rewriter.outbound(self.header, &frame, self.now_us, self.exit, &mut self.actions);
        self.sent()
    }

    fn inbound(&mut self, frame: &[u8]) -> Vec<u8> {
        let frame = self.left_open(frame);
        self.rewriter.inbound(self.header, &frame, self.now_us, &mut self.actions);
        let mut done = carry_out(&mut self.actions);
        assert_eq!(done.to_guest.len(), 1);
        self.completed(done.to_guest.remove(0))
    }

    /// The frame as one that leaves the checksum to others hands it over.
    fn left_open(&self, frame: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        if let (Kind::Tcp { segment, addresses }, Checksum::Partial) =
            (Packet::parse(&frame).kind, self.header.checksum())
        {
            let pseudo = partial_checksum(&addresses, frame.len() - segment.at);
            frame[segment.at + 16..segment.at + 18].copy_from_slice(&pseudo.to_be_bytes());
        }
        frame
    }

    fn completed(&self, mut frame: Vec<u8>) -> Vec<u8> {
        if let (Kind::Tcp { segment, .. }, Checksum::Partial) =
            (Packet::parse(&frame).kind, self.header.checksum())
        {
            let sum = checksum::of(&[&frame[segment.at..]]);
            frame[segment.at + 16..segment.at + 18].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let done = carry_out(&mut self.actions);
        let frames: Vec<Vec<u8>> = match self.exit {
            Exit::Lan => done.to_lan,
            Exit::Peer { epoch } => done
                .to_peer
                .into_iter()
                .map(|(kind, of, payload)| {
                    assert_eq!((kind, of), (OUTPUT, epoch));
                    payload
                })
                .collect(),
        };
        frames.into_iter().map(|frame| self.completed(frame)).collect()
    }

    fn take_over(&mut self) -> Done {
        self.rewriter.take_over(&mut self.actions);
        self.exit = Exit::Lan;
        carry_out(&mut self.actions)
    }

    /// The piece as it comes out: no clock runs back, and none is echoed that was never sent.
    fn other_side(&mut self, piece: &Piece) -> Piece {
        let mut other = piece.clone();
        if !piece.from_client {
            self.said = self.said.max(piece.clock);
            other.clock = piece.clock.max(self.echoed);
        } else if !piece.no_ack {
            self.echoed = self.echoed.max(piece.clock);
            other.clock = piece.clock.min(self.said);
        }
        other
    }

    /// Both directions of a segment come out in the other space.
    fn passes(&mut self, numbers: &Numbers, piece: &Piece) {
        let other = self.other_side(piece);
        let (pvm, svm) = if piece.from_client {
            (numbers.frame(piece, false), numbers.frame(&other, true))
        } else {
            (numbers.frame(&other, false), numbers.frame(piece, true))
        };
        if piece.from_client {
            let frame = self.inbound(&pvm);
            assert_eq!(read(&frame), read(&svm));
            assert_eq!(frame, svm);
        } else {
            let frames = self.out(&svm);
            assert_eq!(frames.iter().map(|frame| read(frame)).collect::<Vec<_>>(), [read(&pvm)]);
            assert_eq!(frames, [pvm]);
        }
    }

    /// What has no shift passes as it is.
    fn passes_unchanged(&mut self, frame: &[u8], from_client: bool) {
        if from_client {
            assert_eq!(self.inbound(frame), frame);
        } else {
            assert_eq!(self.out(frame), [frame]);
        }
    }
}

fn numbers() -> impl Strategy<Value = Numbers> {
    let near_wrap = || prop_oneof![any::<u32>(), (u32::MAX - 500)..=u32::MAX];
    let tags =
        prop::sample::select(vec![&[][..], &[(0x8100, 7)], &[(0x88a8, 100), (0x8100, 7)], &[(0x9100, 9)]]);
    (any::<bool>(), tags, near_wrap(), near_wrap(), prop::option::of((near_wrap(), near_wrap()))).prop_map(
        |(v6, tags, pvm_isn, svm_isn, clocks)| Numbers { v6, tags, port: 0, pvm_isn, svm_isn, clocks },
    )
}

fn piece() -> impl Strategy<Value = Piece> {
    (
        any::<[bool; 3]>(),
        0u8..10,
        1u32..5000,
        1u32..5000,
        0u32..5000,
        prop::option::of((1u32..5000, 1u32..5000)),
        prop::collection::vec(any::<u8>(), 0..20),
    )
        .prop_map(|([from_client, fin, misaligned], rare, offset, acked, clock, sack, data)| Piece {
            from_client,
            fin: fin && rare == 0,
            rst: rare == 1,
            no_ack: rare == 1 && from_client,
            offset,
            acked,
            clock,
            sack,
            misaligned,
            data: if rare == 1 { Vec::new() } else { data },
            ..Piece::default()
        })
}

proptest! {
    #[test]
    fn each_side_sees_the_numbers_that_it_expects(
        first in numbers(),
        second in numbers(),
        pvm_first in any::<bool>(),
        guest_opens in any::<bool>(),
        pieces in prop::collection::vec(piece(), 1..30),
        early in prop::collection::vec(piece(), 0..5),
        turn in any::<prop::sample::Index>(),
        end in 0u8..4,
        partial: bool,
    ) {
        let mut bench = Bench::new();
        if partial {
            // NEEDS_CSUM
            bench.header = FrameHeader::read(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        }
        // another connection on other ports is never touched
        let foreign = Numbers { port: 1, ..second };
        let turn = turn.index(pieces.len());
        let opening = if guest_opens { Piece { no_ack: true, acked: 0, ..syn() } } else { syn() };
        // a VM that takes the same number again has not begun anew
        let differ = first.pvm_isn != second.pvm_isn && first.svm_isn != second.svm_isn;
        let mut numbers = first;
        for (index, piece) in std::iter::once(None).chain(pieces.iter().map(Some)).enumerate() {
            let begins = match piece {
                None => true,
                Some(_) if index == turn + 1 && end == 1 && differ => {
                    // the same ports again
                    numbers = Numbers { v6: first.v6, tags: first.tags, ..second };
                    true
                }
                Some(_) => false,
            };
            if begins {
                (bench.said, bench.echoed) = (0, 0);
                if guest_opens && piece.is_none() {
                    // nothing of it is known: a stray packet passes
                    bench.passes_unchanged(&numbers.frame(&pieces[0], false), pieces[0].from_client);
                }
                let begun = numbers.frame(&opening, false);
                if pvm_first {
                    prop_assert!(bench.pvm_begins(&numbers).is_empty());
                    bench.passes(&numbers, &opening);
                } else {
                    prop_assert!(bench.out(&numbers.frame(&opening, true)).is_empty());
                    let early: Vec<_> = early.iter().filter(|piece| !piece.from_client && !numbers.refuses(piece)).collect();
                    let mut expected = vec![begun];
                    for piece in early {
                        prop_assert!(bench.out(&numbers.frame(piece, true)).is_empty());
                        expected.push(numbers.frame(&bench.other_side(piece), false));
                    }
                    prop_assert_eq!(bench.pvm_begins(&numbers), expected);
                }
                prop_assert!(bench.pvm_begins(&numbers).is_empty());
                bench.passes(&numbers, &opening);
            }
            if let Some(piece) = piece {
                if index == turn + 1 && end == 2 {
                    bench.rewriter.commit();
                }
                if index == turn + 1 && end == 3 {
                    prop_assert_eq!(bench.take_over(), Done::default());
                }
                if index > turn && end == 2 {
                    bench.passes_unchanged(&numbers.frame(piece, piece.from_client), piece.from_client);
                } else if !numbers.refuses(piece) {
                    bench.passes(&numbers, piece);
                }
                bench.passes_unchanged(&foreign.frame(piece, true), piece.from_client);
            }
        }
    }

    #[test]
    fn of_a_segment_in_fragments_the_first_is_rewritten(
        numbers in numbers(),
        mut pieces in prop::collection::vec(piece(), 1..6),
        units in 1usize..20,
    ) {
        let mut bench = Bench::new();
        bench.pvm_begins(&numbers);
        bench.passes(&numbers, &syn());
        for piece in &mut pieces {
            piece.data = vec![piece.acked as u8; 200];
            // the checksum of a part cannot be verified, and then no echo is believed that is ahead of the SVM's clock
            piece.clock = 0;
            if numbers.refuses(piece) {
                continue;
            }
            let (of_pvm, of_svm) = (numbers.frame(piece, false), numbers.frame(piece, true));
            let Kind::Tcp { segment, .. } = Packet::parse(&of_pvm).kind else { unreachable!() };
            let header_fits = segment.payload.start - segment.at <= 8 * units;
            let other = if header_fits { bench.other_side(piece) } else { piece.clone() };
            let (given, expected) = match (piece.from_client, header_fits) {
                (true, true) => (of_pvm, numbers.frame(&other, true)),
                (false, true) => (of_svm, numbers.frame(&other, false)),
                // nothing but a part of the header: as it is
                (true, false) => (of_pvm.clone(), of_pvm),
                (false, false) => (of_svm.clone(), of_svm),
            };
            for (given, expected) in fragments(&given, 7, 8 * units).iter().zip(fragments(&expected, 7, 8 * units)) {
                if piece.from_client {
                    prop_assert_eq!(bench.inbound(given), expected);
                } else {
                    prop_assert_eq!(bench.out(given), [expected]);
                }
            }
        }
    }

    #[test]
    fn no_frames_make_it_panic(
        frames in prop::collection::vec((0u8..6, crate::packet::tests::frame_like(), any::<u32>()), 1..60),
    ) {
        let mut bench = Bench::new();
        bench.rewriter.limits = Limits { connections_max: 3, held_bytes_max: 300 };
        for (what, frame, number) in frames {
            bench.now_us += u64::from(number);
            match what {
                0 | 1 => drop(bench.out(&frame)),
                2 => drop(bench.inbound(&frame)),
                3 => {
                    let flow = Packet::parse(&frame).flow_from_guest(&frame);
                    let isn = Isn { flow, isn: number, timestamp: Some(number) };
                    bench.rewriter.pvm_begins(&isn, bench.now_us, bench.exit, &mut bench.actions);
                    bench.sent();
                }
                4 => bench.rewriter.tick(bench.now_us),
                _ if number % 8 == 0 => bench.rewriter.commit(),
                _ if number % 8 == 1 => drop(bench.take_over()),
                _ => {}
            }
            prop_assert!(bench.rewriter.stats().connections <= 3);
            prop_assert!(bench.rewriter.stats().held_bytes <= 300);
        }
    }
}

const NUMBERS: Numbers =
    Numbers { v6: false, tags: &[], port: 0, pvm_isn: 1000, svm_isn: 900_000, clocks: Some((5, 50)) };

fn opened() -> Bench {
    let mut bench = Bench::new();
    bench.pvm_begins(&NUMBERS);
    bench.passes(&NUMBERS, &syn());
    bench
}

const TWO_MSL_US: u64 = 240_000_000;

#[test]
fn a_connection_is_forgotten_when_both_ends_have_closed_it_and_packets_have_had_time_to_arrive() {
    let mut bench = opened();
    bench.take_over();
    let from_client = Piece { from_client: true, offset: 1, acked: 1, ..Piece::default() };
    let closing = [
        Piece { offset: 1, acked: 1, fin: true, ..Piece::default() },
        Piece { acked: 2, ..from_client.clone() },
        Piece { acked: 2, fin: true, ..from_client.clone() },
        Piece { offset: 2, acked: 2, ..Piece::default() },
    ];
    for piece in &closing {
        bench.now_us += TWO_MSL_US + 1;
        bench.rewriter.tick(bench.now_us);
        bench.passes(&NUMBERS, piece);
    }
    bench.now_us += TWO_MSL_US;
    bench.rewriter.tick(bench.now_us);
    bench.passes(&NUMBERS, &closing[3]);
    bench.now_us += TWO_MSL_US + 1;
    bench.rewriter.tick(bench.now_us);
    assert_eq!(bench.rewriter.stats().connections, 0);
}

/// Nothing is heard of any connection for so long that those which have ended are forgotten. How many are left.
fn left_after_silence(bench: &mut Bench) -> usize {
    bench.now_us += TWO_MSL_US + 1;
    for _ in 0..=bench.rewriter.visits.len() / VISITED_AT_ONCE {
        bench.rewriter.tick(bench.now_us);
    }
    bench.rewriter.stats().connections
}

#[test]
fn a_reset_that_the_guest_does_not_believe_ends_nothing() {
    let mut bench = opened();
    bench.take_over();
    let rst = |offset| Piece { from_client: true, rst: true, no_ack: true, offset, ..Piece::default() };
    // not where the guest expects it
    bench.passes(&NUMBERS, &rst(9));
    assert_eq!(left_after_silence(&mut bench), 1);
    // where it does, but the guest goes on
    bench.passes(&NUMBERS, &rst(1));
    bench.passes(&NUMBERS, &Piece { offset: 1, acked: 1, ..Piece::default() });
    assert_eq!(left_after_silence(&mut bench), 1);
    // behind data that the guest has not acknowledged yet
    let data = Piece { from_client: true, offset: 1, acked: 1, data: b"abc".to_vec(), ..Piece::default() };
    bench.passes(&NUMBERS, &data);
    bench.passes(&NUMBERS, &rst(4));
    assert_eq!(left_after_silence(&mut bench), 0);
}

#[test]
fn a_fin_that_the_guest_does_not_believe_ends_nothing() {
    let mut bench = opened();
    bench.take_over();
    let from_client = Piece { from_client: true, offset: 1, acked: 1, ..Piece::default() };
    bench.passes(&NUMBERS, &Piece { data: b"abcd".to_vec(), ..from_client.clone() });
    // the guest has finished, the client has not
    bench.passes(&NUMBERS, &Piece { offset: 1, acked: 5, fin: true, ..Piece::default() });
    bench.passes(&NUMBERS, &Piece { offset: 5, acked: 2, ..from_client.clone() });
    bench.passes(&NUMBERS, &Piece { offset: 2, fin: true, ..from_client.clone() });
    bench.passes(&NUMBERS, &Piece { offset: 2, acked: 5, ..Piece::default() });
    assert_eq!(left_after_silence(&mut bench), 1);
    bench.passes(&NUMBERS, &Piece { offset: 5, acked: 2, fin: true, ..from_client });
    bench.passes(&NUMBERS, &Piece { offset: 2, acked: 6, ..Piece::default() });
    assert_eq!(left_after_silence(&mut bench), 0);
}

#[test]
fn both_ends_may_open_at_once_and_close_at_once() {
    for pvm_first in [true, false] {
        let mut bench = Bench::new();
        let of_guest = Piece { syn: true, no_ack: true, ..Piece::default() };
        let of_client = Piece { from_client: true, ..of_guest.clone() };
        let answer = Piece { acked: 1, no_ack: false, ..of_guest.clone() };
        if pvm_first {
            bench.pvm_begins(&NUMBERS);
            bench.passes(&NUMBERS, &of_guest);
            bench.passes_unchanged(&NUMBERS.frame(&of_client, false), true);
            bench.passes(&NUMBERS, &answer);
        } else {
            assert!(bench.out(&NUMBERS.frame(&of_guest, true)).is_empty());
            bench.passes_unchanged(&NUMBERS.frame(&of_client, false), true);
            assert!(bench.out(&NUMBERS.frame(&answer, true)).is_empty());
            let both = [&of_guest, &answer].map(|piece| NUMBERS.frame(piece, false));
            assert_eq!(bench.pvm_begins(&NUMBERS), both);
        }
        bench.passes(&NUMBERS, &Piece { from_client: true, ..answer });
        bench.take_over();
        let fin = Piece { offset: 1, acked: 1, fin: true, ..Piece::default() };
        bench.passes(&NUMBERS, &fin);
        bench.passes(&NUMBERS, &Piece { from_client: true, ..fin });
        bench.passes(&NUMBERS, &Piece { offset: 2, acked: 2, ..Piece::default() });
        assert_eq!(left_after_silence(&mut bench), 1);
        bench.passes(&NUMBERS, &Piece { from_client: true, offset: 2, acked: 2, ..Piece::default() });
        assert_eq!(left_after_silence(&mut bench), 0);
    }
}

#[test]
fn thousands_of_connections_come_and_go_with_the_epochs() {
    const OF_EPOCH: u16 = 500;
    let numbers = |epoch: u16, number: u16| {
        let isn = |of: u32| u32::from(number).wrapping_mul(0x9e37_79b9).wrapping_add(u32::from(epoch) * of);
        Numbers {
            v6: number.is_multiple_of(3),
            port: epoch * OF_EPOCH + number,
            pvm_isn: isn(77_777),
            svm_isn: isn(99_991).wrapping_add(1),
            ..NUMBERS
        }
    };
    let of_guest = Piece { offset: 1, acked: 1, data: b"guest".to_vec(), ..Piece::default() };
    let of_client =
        Piece { from_client: true, offset: 1, acked: 1, data: b"client".to_vec(), ..Piece::default() };
    let mut bench = Bench::new();
    let open = |bench: &mut Bench, numbers: &Numbers| {
        (bench.said, bench.echoed) = (0, 0);
        bench.pvm_begins(numbers);
        // opened by either end in turn
        bench.passes(numbers, &Piece { no_ack: numbers.port.is_multiple_of(2), ..syn() });
        bench.passes(numbers, &of_client);
        bench.passes(numbers, &of_guest);
    };
    for epoch in 0..20 {
        for number in 0..OF_EPOCH {
            open(&mut bench, &numbers(epoch, number));
        }
        // one that the PVM never opens
        assert!(bench.out(&Numbers { port: 20_001, ..NUMBERS }.frame(&syn(), true)).is_empty());
        assert_eq!(bench.rewriter.stats().connections, usize::from(OF_EPOCH) + 1);
        bench.rewriter.commit();
        assert_eq!((bench.rewriter.stats().connections, bench.rewriter.stats().held_bytes), (0, 0));
        assert_eq!(bench.rewriter.visits.len(), 0);
        // both VMs number it alike now
        let old = numbers(epoch, 3).frame(&of_client, false);
        bench.passes_unchanged(&old, true);
    }
    for number in 0..OF_EPOCH {
        open(&mut bench, &numbers(20, number));
    }
    bench.take_over();
    let of = |number| numbers(20, number);
    let fin =
        |piece: &Piece, offset, acked| Piece { offset, acked, fin: true, data: Vec::new(), ..piece.clone() };
    for number in (0..OF_EPOCH).step_by(2) {
        bench.passes(&of(number), &fin(&of_client, 7, 6));
        bench.passes(&of(number), &fin(&of_guest, 6, 8));
        bench.passes(&of(number), &Piece { offset: 8, acked: 7, data: Vec::new(), ..of_client.clone() });
    }
    assert_eq!(left_after_silence(&mut bench), usize::from(OF_EPOCH) / 2);
    for number in (1..OF_EPOCH).step_by(2) {
        bench.passes(&of(number), &of_client);
        bench.passes(&of(number), &of_guest);
    }
}

#[test]
fn an_error_about_a_segment_quotes_the_number_that_the_guest_sent() {
    for v6 in [false, true] {
        let numbers = Numbers { v6, clocks: None, ..NUMBERS };
        let mut bench = Bench::new();
        bench.pvm_begins(&numbers);
        bench.passes(&numbers, &syn());
        let sent =
            Piece { offset: 1, acked: 1, data: b"too much for the next link".to_vec(), ..Piece::default() };
        // a router quotes so many bytes of the packet
        let error = |of_svm: bool, bytes: usize| {
            let packet = &numbers.frame(&sent, of_svm)[14..];
            let packet = &packet[..bytes.min(packet.len())];
            let mut frame = Vec::new();
            let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
            if v6 {
                let kind = Icmpv6Type::PacketTooBig { mtu: 1280 };
                ethernet.ipv6([7; 16], [8; 16], 64).icmpv6(kind).write(&mut frame, packet).unwrap();
            } else {
                let header = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1280 };
                let kind = Icmpv4Type::DestinationUnreachable(header);
                ethernet.ipv4([7; 4], [8; 4], 64).icmpv4(kind).write(&mut frame, packet).unwrap();
            }
            frame
        };
        let ip_bytes = if v6 { 40 } else { 20 };
        for bytes in [8, 11, 16, 18, 20, 1000] {
            assert_eq!(
                bench.inbound(&error(false, ip_bytes + bytes)),
                error(true, ip_bytes + bytes),
                "{bytes}"
            );
        }
        for bytes in [0, 7] {
            bench.passes_unchanged(&error(false, ip_bytes + bytes), true);
        }
        // what is no error quotes nothing
        let mut echo = error(false, 1000);
        echo[14 + ip_bytes] = if v6 { icmpv6::TYPE_ECHO_REQUEST } else { icmpv4::TYPE_ECHO_REQUEST };
        bench.passes_unchanged(&echo, true);
    }
}

#[test]
fn alone_a_new_connection_is_not_rewritten_and_what_waited_goes_out_as_it_is() {
    let mut bench = opened();
    let other = Numbers { port: 7, ..NUMBERS };
    let waits = other.frame(&syn(), true);
    assert!(bench.out(&waits).is_empty());
    assert_eq!(bench.take_over().to_lan, std::slice::from_ref(&waits));
    bench.passes_unchanged(&waits, false);
    // the old connection's ports again
    let again = Numbers { svm_isn: 123, ..NUMBERS };
    bench.passes(&NUMBERS, &syn());
    bench.passes_unchanged(&again.frame(&syn(), true), false);
    let answer = Piece { from_client: true, offset: 1, acked: 1, ..Piece::default() };
    bench.passes_unchanged(&again.frame(&answer, true), true);
}

#[test]
fn while_the_svm_is_behind_its_old_connection_keeps_its_numbers() {
    let mut bench = opened();
    let next = Numbers { pvm_isn: 5000, svm_isn: 1, ..NUMBERS };
    assert!(bench.pvm_begins(&next).is_empty());
    bench.passes(&NUMBERS, &Piece { offset: 9, acked: 3, ..Piece::default() });
    bench.passes(&NUMBERS, &Piece { from_client: true, offset: 3, acked: 9, ..Piece::default() });
    bench.passes(&next, &syn());
    bench.passes(&next, &Piece { from_client: true, offset: 1, acked: 1, ..Piece::default() });
}

#[test]
fn a_damaged_echo_does_not_move_the_clock() {
    let mut bench = opened();
    let from_client = Piece { from_client: true, offset: 1, acked: 1, ..Piece::default() };
    let mut damaged = NUMBERS.frame(&from_client, false);
    let Kind::Tcp { segment, .. } = Packet::parse(&damaged).kind else { panic!("it is TCP") };
    let at = segment.timestamps(&damaged).unwrap().at;
    damaged[at + 4] ^= 0x20;
    bench.inbound(&damaged);
    bench.passes(&NUMBERS, &Piece { offset: 1, acked: 1, clock: 2, ..Piece::default() });
    // the PVM's clock is ahead of the SVM's
    bench.passes(&NUMBERS, &Piece { clock: 9, ..from_client });
    bench.passes(&NUMBERS, &Piece { offset: 1, acked: 1, clock: 3, ..Piece::default() });
}

#[test]
fn a_refused_syn_keeps_its_zero() {
    let mut bench = opened();
    let refusal = Tcp { seq: 0, ack: Some(3), rst: true, ..Tcp::default() }.frame();
    assert_eq!(bench.out(&refusal), [refusal]);
}
