//! Datagrams cut and put together again; etherparse does the same beside us.

use proptest::prelude::*;

use super::*;
use crate::packet::PROTOCOL_UDP;
use crate::test_frames::{Tcp, fragments, put_together};

fn put(reassembler: &mut Reassembler<Vec<u8>>, frame: &[u8], now_us: u64) -> Put<Vec<u8>> {
    let fragment = Packet::parse(frame).fragment(frame).unwrap();
    reassembler.put(&fragment, frame.to_vec(), now_us)
}

fn datagram(v6: bool, data: &[u8]) -> Vec<u8> {
    let mut frame = Tcp { v6, seq: 7, ack: Some(9), data, ..Tcp::default() }.frame();
    if v6 {
        frame.splice(12..12, [0x81, 0, 0, 7]);
    }
    frame
}

proptest! {
    #[test]
    fn what_was_cut_is_put_together_whatever_the_order(
        v6: bool,
        data in prop::collection::vec(any::<u8>(), 30..4000),
        units in 1usize..200,
        order in prop::collection::vec(any::<prop::sample::Index>(), 600),
        others in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let frame = datagram(v6, &data);
        let pieces = fragments(&frame, 77, units * 8);
        prop_assume!(pieces.len() > 1);
        let other = fragments(&frame, 78, 8);
        let mut left = pieces.clone();
        let shuffled: Vec<Vec<u8>> =
            order.iter().map_while(|index| (!left.is_empty()).then(|| left.swap_remove(index.index(left.len())))).collect();
        prop_assume!(left.is_empty());
        let mut reassembler = Reassembler::default();
        // some of another datagram, which never becomes whole
        let mut kept: Vec<_> = others.iter().map(|index| &other[index.index(other.len() - 1)]).collect();
        kept.sort();
        kept.dedup();
        for piece in &kept {
            prop_assert!(matches!(put(&mut reassembler, piece, 1), Put::Kept));
        }
        let (last, first) = shuffled.split_last().unwrap();
        for piece in first {
            prop_assert!(matches!(put(&mut reassembler, piece, 1), Put::Kept));
        }
        let bytes: usize = first.iter().chain(kept.iter().copied()).map(Vec::len).sum();
        prop_assert_eq!((reassembler.frames(), reassembler.bytes()), (first.len() + kept.len(), bytes));
        let Put::Whole(whole) = put(&mut reassembler, last, 1) else { panic!("not whole") };
        prop_assert_eq!(reassembler.frames(), kept.len());
        let packet = Packet::parse(&whole.frame);
        let Kind::Tcp { segment, .. } = &packet.kind else { panic!("{packet:?}") };
        prop_assert_eq!(&whole.frame[segment.payload.clone()], &data[..]);
        prop_assert_eq!(packet.flow_from_guest(&whole.frame), Packet::parse(&frame).flow_from_guest(&frame));
        // etherparse finds the same
        let payload_at = segment.at;
        prop_assert_eq!(put_together(&shuffled), [(6, whole.frame[payload_at..].to_vec())]);
        let first_piece = pieces[0].clone();
        let changed = {
            let mut whole = whole;
            whole.frame[payload_at] ^= 0xff;
            whole.into_fragments()
        };
        let at = shuffled.iter().position(|piece| *piece == first_piece).unwrap();
        for (index, (before, after)) in shuffled.iter().zip(&changed).enumerate() {
            prop_assert_eq!(before == after, index != at);
        }
    }

    /// Whatever comes, all of it comes out once, and in order within its datagram.
    #[test]
    fn nothing_is_lost(
        steps in prop::collection::vec((0u8..3, 0u16..12, 1u16..5, any::<bool>(), 0u64..2000), 1..120),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut reassembler = Reassembler::default();
        let (mut now_us, mut out) = (0, Vec::new());
        let mut sent = Vec::new();
        for (step, (id, offset, units, more, us)) in steps.iter().enumerate() {
            now_us += us;
            let mut frame = vec![0; 14];
            frame[12] = 8;
            frame.extend([0x45, 0, 0, 20 + 8 * *units as u8, 0, *id, u8::from(*more) << 5, *offset as u8, 64]);
            frame.extend([PROTOCOL_UDP, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
            frame.extend((0..8 * *units).map(|at| (step as u16 + at) as u8));
            let packet = Packet::parse(&frame);
            let Some(fragment) = packet.fragment(&frame) else {
                continue;
            };
            sent.push(frame.clone());
            match reassembler.put(&fragment, frame, now_us) {
                Put::Kept => {}
                Put::Whole(datagram) => {
                    let bytes = Packet::parse(&datagram.frame).network_at + 20;
                    prop_assert_eq!(datagram.frame.len() - bytes, put_together(&datagram.frames)[0].1.len());
                    out.extend(datagram.into_fragments());
                }
                Put::Singly(frames) => out.extend(frames),
            }
            out.extend(reassembler.give_up(now_us.saturating_sub(5000), now_us));
            prop_assert!(reassembler.oldest_us().is_none_or(|since_us| since_us + 5000 >= now_us));
            if cut.index(steps.len()) == step {
                out.extend(reassembler.give_up(u64::MAX, now_us));
                prop_assert_eq!((reassembler.frames(), reassembler.bytes(), reassembler.cost()), (0, 0, 0));
            }
        }
        out.extend(reassembler.give_up(u64::MAX, now_us));
        prop_assert_eq!(reassembler.partials.len() + reassembler.begun.len(), 0);
        out.sort();
        sent.sort();
        prop_assert_eq!(out, sent);
    }
}

#[test]
fn what_overlaps_comes_one_by_one_and_so_does_the_rest() {
    let frame = datagram(true, &[5; 100]);
    let (some, others) = (fragments(&frame, 7, 48), fragments(&frame, 7, 40));
    let mut reassembler = Reassembler::default();
    assert!(matches!(put(&mut reassembler, &some[1], 1), Put::Kept));
    assert!(matches!(put(&mut reassembler, &some[0], 1), Put::Kept));
    let Put::Singly(frames) = put(&mut reassembler, &others[1], 1) else { panic!("it overlaps") };
    assert_eq!(frames, [some[1].clone(), some[0].clone(), others[1].clone()]);
    let Put::Singly(frames) = put(&mut reassembler, &some[2], 1) else { panic!("of the same datagram") };
    assert_eq!(frames, [some[2].clone()]);
    // that was the end of it: the same identification is another datagram now
    assert!(matches!(put(&mut reassembler, &some[1], 1), Put::Kept));
}

#[test]
fn what_lies_about_its_length_is_no_datagram() {
    let frame = datagram(false, &[5; 100]);
    let pieces = fragments(&frame, 7, 40);
    let place = |piece: &Vec<u8>, place: u16| {
        let mut piece = piece.clone();
        piece[20..22].copy_from_slice(&place.to_be_bytes());
        piece
    };
    let more = 0x2000;
    for (first, lie) in [
        // behind the end
        (&pieces[2], place(&pieces[0], more | 15)),
        // a second end
        (&pieces[2], place(&pieces[0], 20)),
        // an end before what has come
        (&pieces[1], place(&frame[..14 + 20 + 16].to_vec(), 1)),
        // not a multiple of 8
        (&pieces[0], place(&frame[..14 + 20 + 41].to_vec(), more | 5)),
        // longer than a packet can be
        (&pieces[0], place(&pieces[1], 0x1fff)),
    ] {
        let mut lie = lie;
        let bytes = (lie.len() - 14) as u16;
        lie[16..18].copy_from_slice(&bytes.to_be_bytes());
        lie[18..20].copy_from_slice(&[0, 7]);
        let mut reassembler = Reassembler::default();
        assert!(matches!(put(&mut reassembler, first, 1), Put::Kept));
        let Put::Singly(frames) = put(&mut reassembler, &lie, 1) else { panic!("{lie:02x?}") };
        assert_eq!(frames, [first.clone(), lie]);
    }
}

#[test]
fn no_more_is_remembered_than_makes_sense() {
    let frame = datagram(true, &[5; 100]);
    let mut reassembler: Reassembler<Vec<u8>> = Reassembler::default();
    for id in 0..2 * SINGLE_MAX as u16 {
        put(&mut reassembler, &fragments(&frame, id, 40)[0], 1);
        reassembler.give_up(u64::MAX, 1);
    }
    assert_eq!((reassembler.single.len(), reassembler.singled.len()), (SINGLE_MAX, SINGLE_MAX));
    put(&mut reassembler, &fragments(&frame, 9, 40)[0], SINGLE_US + 2);
    reassembler.give_up(u64::MAX, SINGLE_US + 2);
    assert_eq!((reassembler.single.len(), reassembler.singled.len()), (1, 1));
}
