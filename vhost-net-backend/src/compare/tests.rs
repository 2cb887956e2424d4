//! Stories, and random ones against a model that remembers everything.

use std::collections::{HashMap, VecDeque};

use etherparse::TcpOptionElement;
use proptest::prelude::*;

use super::*;
use crate::policy::{Mask, Treatment, pattern};
use crate::test_frames::{Done, Seen, Tcp, arp, carry_out, fragments, other, put_together, read, udp};

/// A comparison with a clock.
struct Bench {
    compare: Compare,
    actions: Actions,
    now_us: u64,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self { compare: Compare::new(limits), actions: Actions::new(), now_us: 1 }
    }

    fn with_policy(limits: Limits, json: &str) -> Self {
        let compare = Compare::with_policy(limits, json.parse().unwrap());
        Self { compare, ..Self::new(Limits::default()) }
    }

    fn pvm(&mut self, frame: &[u8]) -> Done {
        let buffer = self.actions.pool().copy_of(frame);
        self.compare.pvm_says(buffer, Packet::parse(frame), self.now_us, &mut self.actions);
        carry_out(&mut self.actions)
    }

    fn svm(&mut self, frame: &[u8]) -> Done {
        self.compare.svm_says(frame, self.now_us, &mut self.actions);
        carry_out(&mut self.actions)
    }

    fn commit(&mut self) -> Done {
        self.compare.commit(&mut self.actions);
        carry_out(&mut self.actions)
    }

    fn after_us(&mut self, us: u64) -> Done {
        self.now_us += us;
        self.compare.tick(self.now_us, &mut self.actions);
        carry_out(&mut self.actions)
    }
}

fn bench() -> Bench {
    Bench::new(Limits::default())
}

fn nothing() -> Done {
    Done::default()
}

fn leaves(frames: &[&[u8]]) -> Done {
    Done { to_lan: frames.iter().map(|frame| frame.to_vec()).collect(), ..Done::default() }
}

fn data(seq: u32, data: &[u8]) -> Vec<u8> {
    Tcp { seq, ack: Some(1), data, ..Tcp::default() }.frame()
}

fn ack(ack: u32) -> Vec<u8> {
    Tcp { seq: 100, ack: Some(ack), ..Tcp::default() }.frame()
}

#[test]
fn data_leaves_when_the_svm_has_said_it_in_other_pieces() {
    let mut bench = bench();
    assert_eq!(bench.pvm(&data(100, b"abcdef")), nothing());
    assert_eq!(bench.svm(&data(100, b"ab")), nothing());
    assert_eq!(bench.svm(&data(104, b"efgh")), nothing());
    assert_eq!(bench.svm(&data(101, b"bcde")), leaves(&[&data(100, b"abcdef")]));
    assert_eq!(bench.pvm(&data(106, b"gh")), leaves(&[&data(106, b"gh")]));
    // said before by both
    assert_eq!(bench.pvm(&data(102, b"cdefgh")), leaves(&[&data(102, b"cdefgh")]));
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    assert_eq!(bench.after_us(10_000_000), nothing());
}

#[test]
fn an_acknowledgment_waits_for_the_svms() {
    let mut bench = bench();
    assert_eq!(bench.pvm(&ack(50)), nothing());
    assert_eq!(bench.pvm(&ack(60)), nothing());
    assert_eq!(bench.svm(&ack(55)), leaves(&[&ack(50)]));
    // a client that loses packets counts duplicates: none may be missing
    assert_eq!(bench.pvm(&ack(60)), nothing());
    assert_eq!(bench.svm(&ack(60)), leaves(&[&ack(60), &ack(60)]));
    assert_eq!(bench.pvm(&ack(60)), leaves(&[&ack(60)]));
}

#[test]
fn a_different_byte_asks_for_a_checkpoint_and_holds() {
    let mut bench = bench();
    bench.svm(&data(100, b"abcX"));
    let done = bench.pvm(&data(100, b"abcdef"));
    assert_eq!(done.to_lan.len(), 0);
    assert_eq!(done.wanted.len(), 1);
    assert_eq!(done.wanted[0].0, Cause::Mismatch);
    assert_eq!(done.wanted[0].1, "tcp 10.0.0.9:6379 -> 10.0.0.1:40000: offset 103: PVM 0x64, SVM 0x58");
    // the SVM's truth comes too late, and one wish an epoch is enough
    assert_eq!(bench.svm(&data(100, b"abcdef")), nothing());
    assert_eq!(bench.pvm(&data(106, b"g")), nothing());
    assert_eq!(bench.after_us(1_000_000), nothing());
    assert_eq!(bench.commit(), leaves(&[&data(100, b"abcdef"), &data(106, b"g")]));
    // the SVM is the PVM now
    assert_eq!(bench.pvm(&data(107, b"h")), nothing());
    assert_eq!(bench.svm(&data(107, b"h")), leaves(&[&data(107, b"h")]));
    assert_eq!(bench.compare.stats().mismatches, 1);
}

#[test]
fn what_repeats_does_not_wait_for_what_is_new() {
    let mut bench = bench();
    bench.svm(&data(100, b"abc"));
    assert_eq!(bench.pvm(&data(100, b"abc")), leaves(&[&data(100, b"abc")]));
    assert_eq!(bench.pvm(&data(103, b"def")), nothing());
    // the client has lost it, and perhaps the SVM will say no more before it is heard
    assert_eq!(bench.pvm(&data(100, b"abc")), leaves(&[&data(100, b"abc")]));
    assert_eq!(bench.pvm(&ack(1)), leaves(&[&ack(1)]));
    assert_eq!(bench.pvm(&ack(9)), nothing());
    assert_eq!(bench.pvm(&data(100, b"abc")), nothing());
    assert_eq!(bench.svm(&ack(9)), leaves(&[&ack(9), &data(100, b"abc")]));
    assert_eq!(bench.svm(&data(103, b"def")), leaves(&[&data(103, b"def")]));
}

#[test]
fn a_new_connection_waits_for_the_last_acknowledgments_of_the_old_one() {
    let mut bench = bench();
    let syn = Tcp { seq: 7, ack: Some(50), syn: true, ..Tcp::default() }.frame();
    assert_eq!(bench.pvm(&ack(9)), nothing());
    assert_eq!(bench.pvm(&syn), nothing());
    assert_eq!(bench.pvm(&ack(50)), nothing());
    assert_eq!(bench.svm(&ack(9)), leaves(&[&ack(9)]));
    assert_eq!(bench.svm(&syn), leaves(&[&syn, &ack(50)]));
}

#[test]
fn what_a_commit_released_needs_no_svm_again() {
    let mut bench = bench();
    let segment = Tcp { seq: 100, ack: Some(50), data: b"abc", ..Tcp::default() }.frame();
    let syn = Tcp { seq: 7, ack: Some(50), syn: true, client_port_offset: 1, ..Tcp::default() }.frame();
    bench.svm(&ack(70));
    bench.pvm(&segment);
    bench.pvm(&syn);
    assert_eq!(bench.commit(), leaves(&[&segment, &syn]));
    assert_eq!(bench.pvm(&segment), leaves(&[&segment]));
    assert_eq!(bench.pvm(&ack(50)), leaves(&[&ack(50)]));
    assert_eq!(bench.pvm(&syn), leaves(&[&syn]));
    // that the SVM was further once does not count: it is the PVM now
    assert_eq!(bench.pvm(&ack(60)), nothing());
}

#[test]
fn events_wait_for_the_same_event() {
    let mut bench = bench();
    let fin = |seq, data| Tcp { seq, ack: Some(1), fin: true, data, ..Tcp::default() }.frame();
    assert_eq!(bench.pvm(&fin(100, b"ab")), nothing());
    assert_eq!(bench.svm(&data(100, b"ab")), nothing());
    assert_eq!(bench.svm(&fin(102, b"")), leaves(&[&fin(100, b"ab")]));
    assert_eq!(bench.pvm(&fin(102, b"")), leaves(&[&fin(102, b"")]));
    let rst = Tcp { seq: 103, rst: true, ..Tcp::default() }.frame();
    assert_eq!(bench.pvm(&rst), nothing());
    assert_eq!(bench.svm(&Tcp { seq: 99, rst: true, ..Tcp::default() }.frame()), leaves(&[&rst]));
    assert_eq!(bench.pvm(&rst), leaves(&[&rst]));
}

#[test]
fn different_events_are_mismatches() {
    let fin = Tcp { seq: 102, ack: Some(1), fin: true, ..Tcp::default() }.frame();
    let rst = Tcp { seq: 100, rst: true, ..Tcp::default() }.frame();
    let refusal = Tcp { seq: 0, ack: Some(8), rst: true, ..Tcp::default() }.frame();
    let accept = Tcp { seq: 70, ack: Some(8), syn: true, ..Tcp::default() }.frame();
    let options = [TcpOptionElement::WindowScale(7)];
    let scaling = Tcp { seq: 70, ack: Some(8), syn: true, options: &options, ..Tcp::default() }.frame();
    for (svm, pvm) in [
        (&fin, &data(100, b"abc")),
        (&rst, &data(100, b"abc")),
        (&data(100, b"abc"), &fin),
        (&rst, &fin),
        (&refusal, &accept),
        (&accept, &refusal),
        (&accept, &scaling),
    ] {
        let mut bench = bench();
        // the bytes before the FIN are no part of the story
        if svm == &fin || pvm == &fin {
            bench.svm(&data(100, b"ab"));
        }
        assert_eq!(bench.svm(svm), nothing());
        let done = bench.pvm(pvm);
        assert_eq!((done.to_lan.len(), done.wanted.len()), (0, 1), "{:?} {:?}", read(svm), read(pvm));
        assert_eq!(done.wanted[0].0, Cause::Mismatch);
        assert_eq!(bench.commit(), leaves(&[pvm]));
    }
}

#[test]
fn a_reset_that_the_svm_repeats_is_remembered_once() {
    let mut bench = bench();
    for port in 0..100 {
        let rst = Tcp { seq: 100, rst: true, client_port_offset: port % 2, ..Tcp::default() }.frame();
        assert_eq!(bench.svm(&rst), nothing());
    }
    assert_eq!(bench.compare.resets.len(), 2);
}

#[test]
fn a_connection_that_only_the_svm_resets_is_a_mismatch_even_if_the_pvm_is_quiet() {
    let rst = |port| Tcp { seq: 100, rst: true, client_port_offset: port, ..Tcp::default() }.frame();
    let mut bench = bench();
    assert_eq!(bench.svm(&rst(0)), nothing());
    assert_eq!(bench.svm(&rst(1)), nothing());
    assert_eq!(bench.pvm(&rst(0)), leaves(&[&rst(0)]));
    assert_eq!(bench.after_us(99_999), nothing());
    let done = bench.after_us(1);
    assert_eq!(
        done.wanted,
        [(
            Cause::Mismatch,
            "tcp 10.0.0.9:6379 -> 10.0.0.1:40001: the PVM goes on, the SVM resets".to_owned()
        )]
    );
    assert_eq!(bench.compare.next_deadline(), None);
}

#[test]
fn each_refused_syn_waits_for_its_own_refusal() {
    let mut bench = bench();
    let refusal = |ack| Tcp { seq: 0, ack: Some(ack), rst: true, ..Tcp::default() }.frame();
    assert_eq!(bench.pvm(&refusal(8)), nothing());
    assert_eq!(bench.svm(&refusal(8)), leaves(&[&refusal(8)]));
    assert_eq!(bench.pvm(&refusal(9)), nothing());
    assert_eq!(bench.svm(&refusal(9)), leaves(&[&refusal(9)]));
}

#[test]
fn a_new_connection_on_the_same_ports_is_not_taken_for_the_old_one() {
    let mut bench = bench();
    let syn = |seq, ack| Tcp { seq, ack: Some(ack), syn: true, ..Tcp::default() }.frame();
    for isn in [0xffff_fffe, 5_000_000, 90] {
        assert_eq!(bench.pvm(&syn(isn, 1)), nothing());
        assert_eq!(bench.svm(&syn(isn, 1)), leaves(&[&syn(isn, 1)]));
        let first = isn.wrapping_add(1);
        assert_eq!(bench.pvm(&data(first, b"abcd")), nothing());
        assert_eq!(bench.svm(&data(first, b"abcd")), leaves(&[&data(first, b"abcd")]));
        assert_eq!(bench.pvm(&syn(isn, 1)), leaves(&[&syn(isn, 1)]));
    }
    // the SVM is one connection ahead
    bench.svm(&data(95, b"ef"));
    bench.svm(&syn(777, 1));
    assert_eq!(bench.pvm(&syn(777, 1)), leaves(&[&syn(777, 1)]));
}

#[test]
fn what_waits_too_long_says_what_for() {
    let cases: [(Vec<u8>, &str, u64); 6] = [
        (data(100, b"abc"), "waits for the SVM's bytes from 0 on", 100_000),
        (ack(5), "waits for the SVM's ack of 5, it has sent none", 250_000),
        (Tcp { syn: true, ..Tcp::default() }.frame(), "waits for the SVM's SYN", 100_000),
        (Tcp { fin: true, ..Tcp::default() }.frame(), "waits for the SVM's FIN", 100_000),
        (Tcp { rst: true, ..Tcp::default() }.frame(), "waits for the SVM's RST", 100_000),
        (
            udp(1, b"x"),
            "udp 10.0.0.9:53 -> 10.0.0.1:1: held for 100 ms, waits for the SVM's datagram",
            100_000,
        ),
    ];
    for (frame, what, limit_us) in cases {
        let mut bench = bench();
        bench.pvm(&frame);
        assert_eq!(bench.compare.next_deadline(), Some(1 + limit_us));
        assert_eq!(bench.after_us(limit_us - 1), nothing());
        let done = bench.after_us(1);
        assert_eq!(done.wanted.len(), 1);
        assert_eq!(done.wanted[0].0, Cause::HeldTooLong);
        assert!(done.wanted[0].1.contains(what), "{}", done.wanted[0].1);
        assert_eq!(bench.compare.next_deadline(), None);
        assert_eq!(bench.commit(), leaves(&[&frame]));
    }
}

#[test]
fn too_many_held_bytes_ask_for_a_checkpoint_and_then_stop_the_guest() {
    let mut bench = Bench::new(Limits { held_bytes_max: 3000, held_bytes_full: 6000, ..Limits::default() });
    let mut wanted = Vec::new();
    let mut sent = 0;
    while bench.compare.has_room() {
        wanted.extend(bench.pvm(&data(1000 * sent, &[7; 1000])).wanted);
        sent += 1;
    }
    assert_eq!(sent, 6);
    assert_eq!(wanted.iter().map(|wish| wish.0).collect::<Vec<_>>(), [Cause::HeldBytes]);
    assert_eq!(bench.commit().to_lan.len(), 6);
    assert!(bench.compare.has_room());
}

#[test]
fn an_svm_that_runs_ahead_is_bounded() {
    let mut bench = Bench::new(Limits { svm_bytes_max: 10_000, ..Limits::default() });
    let mut wanted = Vec::new();
    for piece in 0..100 {
        wanted.extend(bench.svm(&data(1000 * piece, &[7; 1000])).wanted);
        wanted.extend(bench.svm(&udp(9, &[piece as u8; 500])).wanted);
    }
    assert_eq!(wanted.iter().map(|wish| wish.0).collect::<Vec<_>>(), [Cause::Buffer]);
    assert!(bench.compare.stats().svm_bytes < 12_000);
    bench.commit();
    assert_eq!(bench.compare.stats().svm_bytes, 0);
}

#[test]
fn the_table_is_bounded_and_drops_nothing_that_holds() {
    let mut bench = Bench::new(Limits { flows_max: 10, ..Limits::default() });
    for port in 0..50 {
        bench.svm(&udp(port, b"x"));
        bench.pvm(&udp(port, b"x"));
    }
    assert!(bench.compare.stats().flows <= 10);
    for port in 0..50 {
        assert_eq!(bench.pvm(&udp(port, b"y")), nothing());
    }
    assert_eq!(bench.commit().to_lan.len(), 50);
    for port in 0..50 {
        bench.svm(&udp(port, b"x"));
        bench.pvm(&udp(port, b"x"));
    }
    assert!(bench.compare.stats().flows <= 50);
}

#[test]
fn idle_flows_age_but_an_established_connection_does_not() {
    let mut bench = bench();
    bench.svm(&udp(1, b"x"));
    bench.pvm(&udp(1, b"x"));
    bench.svm(&data(100, b"x"));
    bench.pvm(&data(100, b"x"));
    bench.after_us(3_600_000_000);
    assert_eq!(bench.compare.stats().flows, 1);
    assert_eq!(bench.pvm(&data(100, b"x")), leaves(&[&data(100, b"x")]));
    bench.after_us(8_000_000_000);
    assert_eq!(bench.compare.stats().flows, 0);
}

#[test]
fn datagrams_leave_in_order_and_frames_without_a_flow_in_any() {
    let mut bench = bench();
    assert_eq!(bench.pvm(&udp(1, b"a")), nothing());
    assert_eq!(bench.pvm(&udp(1, b"b")), nothing());
    assert_eq!(bench.svm(&udp(1, b"b")), nothing());
    assert_eq!(bench.svm(&udp(1, b"a")), leaves(&[&udp(1, b"a"), &udp(1, b"b")]));
    // each serves once
    assert_eq!(bench.pvm(&udp(1, b"a")), nothing());
    let frame = |data| other(0x88b5, data);
    assert_eq!(bench.pvm(&frame(b"a")), nothing());
    assert_eq!(bench.pvm(&frame(b"b")), nothing());
    assert_eq!(bench.svm(&frame(b"b")), leaves(&[&frame(b"b")]));
}

#[test]
fn what_the_svm_asked_by_arp_the_pvm_may_ask_again() {
    let mut bench = bench();
    assert_eq!(bench.pvm(&arp(1)), nothing());
    assert_eq!(bench.pvm(&arp(1)), nothing());
    assert_eq!(bench.svm(&arp(1)), leaves(&[&arp(1), &arp(1)]));
    assert_eq!(bench.pvm(&arp(1)), leaves(&[&arp(1)]));
    assert_eq!(bench.pvm(&arp(2)), nothing());
    bench.commit();
    assert_eq!(bench.pvm(&arp(1)), nothing());
}

#[test]
fn a_datagram_that_differs_is_a_mismatch_soon() {
    let mut bench = bench();
    bench.pvm(&udp(1, b"time 12:00"));
    assert_eq!(bench.svm(&udp(1, b"time 12:01")), nothing());
    assert_eq!(bench.after_us(29_999), nothing());
    let done = bench.after_us(1);
    assert_eq!(done.wanted.len(), 1);
    assert_eq!(done.wanted[0].0, Cause::Mismatch);
    assert!(done.wanted[0].1.ends_with("offset 9: PVM 0x30, SVM 0x31"), "{}", done.wanted[0].1);
}

#[test]
fn a_window_is_no_wider_than_the_svms_and_opens_when_it_does() {
    for v6 in [false, true] {
        let options = [TcpOptionElement::WindowScale(2)];
        let syn =
            Tcp { v6, seq: 9, ack: Some(1), syn: true, window: 100, options: &options, ..Tcp::default() };
        let data = |seq, ack, window, data| Tcp { v6, seq, ack: Some(ack), window, data, ..Tcp::default() };
        let mut bench = bench();
        bench.svm(&syn.frame());
        bench.pvm(&syn.frame());
        bench.svm(&data(10, 501, 1000, b"").frame());
        let out = bench.pvm(&data(10, 101, 5000, b"").frame()).to_lan;
        // the SVM's edge is 501 + 4000
        assert_eq!(read(&out[0]).window, 1100);
        bench.svm(&data(10, 501, 1000, b"xyz").frame());
        let out = bench.pvm(&data(10, 501, 5000, b"xyz").frame()).to_lan;
        assert_eq!((read(&out[0]).window, read(&out[0]).data), (1000, b"xyz".to_vec()));
        // a little more is not worth a packet
        assert_eq!(bench.svm(&data(13, 501, 1010, b"").frame()), nothing());
        let out = bench.svm(&data(13, 501, 3000, b"").frame()).to_lan;
        let opened = read(&out[0]);
        assert_eq!((opened.seq, opened.ack, opened.window), (13, Some(501), 3000));
        assert!(opened.data.is_empty());
        let out = bench.svm(&data(13, 501, 9000, b"").frame()).to_lan;
        assert_eq!(read(&out[0]).window, 5000);
        assert_eq!(bench.svm(&data(13, 501, 9500, b"").frame()), nothing());
        // it never shrinks: the PVM's own edge is what counts
        let out = bench.pvm(&data(13, 501, 5000, b"").frame()).to_lan;
        assert_eq!(read(&out[0]).window, 5000);
    }
}

#[test]
fn a_client_hears_what_the_svm_has_missed() {
    for v6 in [false, true] {
        let tcp = Tcp { v6, seq: 10, window: 5000, ..Tcp::default() };
        let ack = |ack, window| Tcp { ack: Some(ack), window, ..tcp }.frame();
        let mut bench = bench();
        let syn = Tcp { v6, seq: 9, ack: Some(1), syn: true, window: 4000, ..Tcp::default() }.frame();
        bench.svm(&syn);
        bench.pvm(&syn);
        // of 1 to 300 the SVM has missed the last 100
        assert_eq!(bench.pvm(&ack(301, 5000)), nothing());
        assert_eq!(bench.svm(&ack(201, 4000)), nothing(), "it may get on by itself");
        // the client sends again what both have
        assert_eq!(bench.pvm(&ack(301, 5000)), nothing());
        let out = bench.svm(&ack(201, 4000)).to_lan;
        let lowered = read(&out[0]);
        assert_eq!((lowered.seq, lowered.ack, lowered.window, out.len()), (10, Some(201), 4000, 1));
        assert_eq!(bench.svm(&ack(201, 4000)), nothing(), "it has been told");
        // now what was missed, and the PVM's own acknowledgments leave
        let out = bench.svm(&ack(301, 4000)).to_lan;
        assert_eq!(out.iter().map(|frame| read(frame).ack).collect::<Vec<_>>(), [Some(301); 2]);
        assert_eq!(bench.compare.stats().acks_lowered, 1);
        // data that waits for an acknowledgment does not leave with less
        bench.svm(&Tcp { ack: Some(301), data: b"answer", ..tcp }.frame());
        assert_eq!(bench.pvm(&Tcp { ack: Some(501), data: b"answer", ..tcp }.frame()), nothing());
        let out = bench.svm(&Tcp { seq: 16, ..Tcp { ack: Some(401), ..tcp } }.frame()).to_lan;
        assert!(out.is_empty());
        let out = bench.svm(&Tcp { seq: 16, ..Tcp { ack: Some(401), ..tcp } }.frame()).to_lan;
        assert_eq!((read(&out[0]).seq, read(&out[0]).ack, read(&out[0]).data.len()), (10, Some(401), 0));
    }
}

#[test]
fn the_shift_of_a_connection_that_the_guest_opens_is_known_from_the_answer() {
    let options = [TcpOptionElement::WindowScale(2)];
    let syn = Tcp { seq: 9, syn: true, window: 100, options: &options, ..Tcp::default() }.frame();
    for (scales, expected) in [(true, 1100), (false, 1400)] {
        let mut bench = bench();
        bench.svm(&syn);
        bench.pvm(&syn);
        bench.compare.remote_answers(&Packet::parse(&syn).flow_from_guest(&syn), scales);
        let ack = |ack, window| Tcp { seq: 10, ack: Some(ack), window, ..Tcp::default() }.frame();
        bench.svm(&ack(501, 1000));
        let out = bench.pvm(&ack(101, 5000)).to_lan;
        assert_eq!(read(&out[0]).window, expected);
    }
}

#[test]
fn what_differed_is_remembered_with_its_bytes_and_counted() {
    let mut bench = bench();
    bench.after_us(6);
    bench.svm(&udp(9, b"answer 17 of 40"));
    bench.pvm(&udp(9, b"answer 18"));
    bench.after_us(100_000);
    bench.commit();
    bench.svm(&data(100, b"0123456789abcdefghXjk"));
    bench.pvm(&data(100, b"0123456789abcdef"));
    bench.pvm(&data(116, b"ghijk"));
    assert_eq!(bench.compare.stats().mismatches, 2);
    bench.commit();
    // this time it is found when the SVM's bytes come
    bench.pvm(&data(200, b"no"));
    bench.svm(&data(200, b"na"));
    bench.commit();
    bench.pvm(&Tcp { seq: 300, rst: true, ..Tcp::default() }.frame());
    bench.after_us(200_000);
    let stats = bench.compare.stats();
    let told: Vec<(u64, Cause, u32, &str)> = stats
        .recent_mismatches
        .iter()
        .map(|one| (one.at_us, one.cause, one.count, one.what.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (300_007, Cause::HeldTooLong, 3, "held for 200 ms, waits for the SVM's RST"),
            (100_007, Cause::Mismatch, 2, "offset 201: PVM 0x6f, SVM 0x61"),
            (100_007, Cause::Mismatch, 1, "offset 118: PVM 0x69, SVM 0x58"),
            (100_007, Cause::Mismatch, 1, "offset 8: PVM 0x38, SVM 0x37"),
        ]
    );
    let bytes =
        |index: usize| serde_json::to_value(&stats.recent_mismatches[index]).unwrap()["bytes"].clone();
    assert!(bytes(0).is_null());
    assert_eq!(bytes(1), serde_json::json!({"offset": 201, "before": "6e", "pvm": "6f", "svm": "61"}));
    assert_eq!(stats.recent_mismatches[2].bytes.as_ref().unwrap().svm, b"Xjk");
    let answers = stats.recent_mismatches[3].bytes.as_ref().unwrap();
    assert_eq!(
        (&answers.before[..], &answers.pvm[..], &answers.svm[..]),
        (&b"answer 1"[..], &b"8"[..], &b"7 of 40"[..])
    );
    let services: Vec<(&str, u64)> =
        stats.mismatches_by_service.iter().map(|one| (one.service.as_str(), one.count)).collect();
    assert_eq!(services, [("tcp guest 10.0.0.9:6379", 3), ("udp remote 10.0.0.1:9", 1)]);
}

#[test]
fn a_bypassed_flow_leaves_at_once_until_the_peer_is_lost() {
    let rules = r#"[{"protocol": "tcp", "guest_port": 6379, "action": "bypass"},
        {"protocol": "udp", "remote_port": 9, "action": "bypass"}]"#;
    let mut bench = Bench::with_policy(Limits::default(), rules);
    let syn = Tcp { seq: 99, ack: Some(1), syn: true, ..Tcp::default() }.frame();
    let flow = Packet::parse(&syn).flow_from_guest(&syn);
    assert_eq!(bench.svm(&data(100, b"other")), nothing());
    for frame in [&syn, &data(100, b"this"), &ack(70), &udp(9, b"this")] {
        assert_eq!(bench.pvm(frame), leaves(&[frame]));
    }
    // the rewriter is told only once
    assert!(bench.compare.has_seen_begin(&flow, 99));
    assert_eq!(bench.svm(&udp(9, b"other")), nothing());
    assert_eq!(bench.svm(&Tcp { seq: 9, rst: true, ..Tcp::default() }.frame()), nothing());
    assert_eq!(bench.pvm(&udp(8, b"this")), nothing());
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    assert_eq!((bench.compare.stats().bypassed, bench.compare.stats().svm_packets_unused), (4, 3));
    assert_eq!(bench.compare.next_deadline(), Some(100_001));
    assert_eq!(bench.commit(), leaves(&[&udp(8, b"this")]));
    // rule 3 holds for every flow
    bench.compare.suspend();
    assert_eq!(bench.pvm(&udp(9, b"late")), nothing());
    assert_eq!(bench.pvm(&data(104, b"late")), nothing());
    assert_eq!(bench.commit(), leaves(&[&udp(9, b"late"), &data(104, b"late")]));
}

#[test]
fn a_flow_that_waits_for_checkpoints_asks_for_none() {
    let rules =
        r#"[{"protocol": "udp", "action": "checkpoint"}, {"protocol": "tcp", "action": "checkpoint"}]"#;
    let limits = Limits { held_bytes_max: 500, ..Limits::default() };
    let mut bench = Bench::with_policy(limits, rules);
    let syn = Tcp { seq: 99, syn: true, ..Tcp::default() }.frame();
    let flow = Packet::parse(&syn).flow_from_guest(&syn);
    assert_eq!(bench.pvm(&udp(1, b"a")), nothing());
    assert_eq!(bench.pvm(&syn), nothing());
    assert!(bench.compare.has_seen_begin(&flow, 99));
    assert_eq!(bench.pvm(&udp(1, b"b")), nothing());
    assert_eq!(bench.svm(&udp(1, b"a")), nothing());
    assert_eq!(bench.svm(&udp(1, b"c")), nothing());
    assert_eq!(bench.svm(&syn), nothing());
    assert_eq!(bench.compare.next_deadline(), None);
    assert_eq!(bench.after_us(60_000_000), nothing());
    // one that is compared is no slower for it
    assert_eq!(bench.pvm(&arp(1)), nothing());
    assert_eq!(bench.svm(&arp(1)), leaves(&[&arp(1)]));
    assert_eq!(bench.commit(), leaves(&[&udp(1, b"a"), &syn, &udp(1, b"b")]));
    assert_eq!(bench.compare.stats().svm_packets_unused, 3);
    // but memory is memory
    let done = bench.pvm(&udp(1, &[0; 600]));
    assert_eq!(done.wanted.iter().map(|wish| wish.0).collect::<Vec<_>>(), [Cause::HeldBytes]);
}

const DATES: &str = r#"[{"protocol": "tcp", "action": "mask",
    "mask": [{"prefix": "Date: ", "until": "\r\n", "max": 10}]}]"#;

#[test]
fn masked_bytes_may_differ_and_nothing_else() {
    let mut bench = Bench::with_policy(Limits::default(), DATES);
    let pvm = b"Date: 12:00\r\nlength 7\r\n";
    assert_eq!(bench.pvm(&data(100, &pvm[..9])), nothing());
    assert_eq!(bench.svm(&data(100, b"Da")), nothing());
    assert_eq!(bench.svm(&data(102, b"te: 1")), nothing());
    assert_eq!(bench.svm(&data(107, b"3:5")), leaves(&[&data(100, &pvm[..9])]));
    // the beginning again, with the mask that it had
    assert_eq!(bench.svm(&data(100, b"Date: 13:59\r\nle")), nothing());
    assert_eq!(bench.pvm(&data(100, pvm)), nothing());
    assert_eq!(bench.svm(&data(115, b"ngth 7\r\n")), leaves(&[&data(100, pvm)]));
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    // a checkpoint in the middle of a mask: the SVM goes on where the PVM was
    bench.pvm(&data(123, b"Date: 14"));
    assert_eq!(bench.commit(), leaves(&[&data(123, b"Date: 14")]));
    assert_eq!(bench.pvm(&data(131, b":00\r\n")), nothing());
    assert_eq!(bench.svm(&data(131, b":01\r\n")), leaves(&[&data(131, b":00\r\n")]));
    assert_eq!(bench.compare.stats().mismatches, 0);
    // another number of bytes
    bench.svm(&data(136, b"Date: 9:59\r\n"));
    let done = bench.pvm(&data(136, b"Date: 10:00\r\n"));
    assert_eq!(done.to_lan.len(), 0);
    let stats = bench.compare.stats();
    let bytes = stats.recent_mismatches[0].bytes.as_ref().unwrap();
    assert_eq!(
        (&bytes.before[..], &bytes.pvm[..], &bytes.svm[..]),
        (&b"Date: ****"[..], &b"*\r\n"[..], &b"\r\n"[..])
    );
    assert_eq!(bench.commit().to_lan.len(), 1);
    assert_eq!(bench.compare.stats().held_bytes, 0);
    // the same connection's flow anew: the mask begins anew too
    let syn = Tcp { seq: 5, ack: Some(1), syn: true, data: b"Date: 1", ..Tcp::default() }.frame();
    let theirs = Tcp { seq: 5, ack: Some(1), syn: true, data: b"Date: 2", ..Tcp::default() }.frame();
    assert_eq!(bench.pvm(&syn), nothing());
    assert_eq!(bench.svm(&theirs), leaves(&[&syn]));
    assert_eq!(bench.pvm(&data(13, b"34\r\nx")), nothing());
    assert_eq!(bench.svm(&data(13, b"56\r\nx")), leaves(&[&data(13, b"34\r\nx")]));
    // and another, which begins where the last one has been
    let syn = Tcp { seq: 8, ack: Some(1), syn: true, ..Tcp::default() }.frame();
    assert_eq!(bench.svm(&syn), nothing());
    assert_eq!(bench.pvm(&syn), leaves(&[&syn]));
    assert_eq!(bench.pvm(&data(9, b"Date: 1")), nothing());
    assert_eq!(bench.svm(&data(9, b"Date: 2")), leaves(&[&data(9, b"Date: 1")]));
}

#[test]
fn masked_bytes_of_a_datagram_stand_at_their_places() {
    let rules = r#"[{"protocol": "udp", "action": "mask", "mask": [{"offset": 2, "length": 2}]}]"#;
    let mut bench = Bench::with_policy(Limits::default(), rules);
    assert_eq!(bench.pvm(&udp(1, b"id17 yes")), nothing());
    assert_eq!(bench.svm(&udp(1, b"id23 yes")), leaves(&[&udp(1, b"id17 yes")]));
    assert_eq!(bench.svm(&udp(1, b"id25 yes")), nothing());
    assert_eq!(bench.pvm(&udp(1, b"id18 yes")), leaves(&[&udp(1, b"id18 yes")]));
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    bench.svm(&udp(1, b"id25 no"));
    bench.pvm(&udp(1, b"id19 yes"));
    assert_eq!(bench.after_us(100_000).wanted[0].0, Cause::Mismatch);
    assert_eq!(bench.commit(), leaves(&[&udp(1, b"id19 yes")]));
    assert_eq!(bench.compare.stats().held_bytes, 0);
}

/// A byte of the guest's stream: anything that tells positions apart.
fn byte(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

#[derive(Clone, Debug)]
enum Step {
    ClientSends(u32),
    /// New data, and how much of what the client sent is acknowledged with it, in percent.
    Pvm(u32, u32),
    Svm(u32, u32),
    /// Data from so many bytes back.
    PvmAgain(u32, u32),
    SvmAgain(u32, u32),
    /// What would be sent next is sent after what comes then.
    PvmLate(u32),
    SvmLate(u32),
    /// The SVM says something else so many bytes ahead.
    SvmDiverges(u32),
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u32..3000).prop_map(Step::ClientSends),
        8 => (0u32..200, 0u32..=100).prop_map(|(bytes, ack)| Step::Pvm(bytes, ack)),
        8 => (0u32..200, 0u32..=100).prop_map(|(bytes, ack)| Step::Svm(bytes, ack)),
        3 => (0u32..400, 0u32..300).prop_map(|(back, bytes)| Step::PvmAgain(back, bytes)),
        3 => (0u32..400, 0u32..300).prop_map(|(back, bytes)| Step::SvmAgain(back, bytes)),
        1 => (1u32..200).prop_map(Step::PvmLate),
        1 => (1u32..200).prop_map(Step::SvmLate),
        1 => (0u32..300).prop_map(Step::SvmDiverges),
        1 => Just(Step::Commit),
    ]
}

/// One end of the story: how far one VM is.
#[derive(Clone, Debug, Default)]
struct Vm {
    next: u64,
    acked: u32,
    late: Option<(u64, u64)>,
}

/// One connection, told by the model.
struct Story {
    bench: Bench,
    first: u32,
    client_isn: u32,
    client_sent: u32,
    pvm: Vm,
    svm: Vm,
    diverges_at: Option<u64>,
    /// What the PVM sent and has not left, and whether it says only what was said before.
    held: VecDeque<(Vec<u8>, bool)>,
    /// How far the PVM's stream went in order.
    said_to: u64,
    /// Positions that the SVM said rightly in this epoch, or that were released.
    allowed: std::collections::HashSet<u64>,
    svm_acked: u32,
    wanted: Vec<Cause>,
}

impl Story {
    fn new(first: u32, client_isn: u32, opened: bool) -> Self {
        let mut story = Self {
            bench: Bench::new(Limits { clamp_windows: false, ..Limits::default() }),
            first,
            client_isn,
            client_sent: 0,
            pvm: Vm::default(),
            svm: Vm::default(),
            diverges_at: None,
            held: VecDeque::new(),
            said_to: 0,
            allowed: Default::default(),
            svm_acked: 0,
            wanted: Vec::new(),
        };
        if opened {
            let syn = Tcp { seq: first.wrapping_sub(1), ack: Some(client_isn), syn: true, ..Tcp::default() }
                .frame();
            assert_eq!(story.bench.pvm(&syn), nothing());
            assert_eq!(story.bench.svm(&syn), leaves(&[&syn]));
        }
        story
    }

    fn frame(&self, from: u64, to: u64, acked: u32, diverges_at: Option<u64>) -> Vec<u8> {
        let data: Vec<u8> = (from..to).map(|at| byte(at) ^ u8::from(diverges_at == Some(at))).collect();
        Tcp {
            seq: self.first.wrapping_add(from as u32),
            ack: Some(self.client_isn.wrapping_add(acked)),
            data: &data,
            ..Tcp::default()
        }
        .frame()
    }

    fn pvm_sends(&mut self, from: u64, to: u64) {
        let frame = self.frame(from, to, self.pvm.acked, None);
        // what was sent once, in whatever order, may be sent again
        self.held.push_back((frame.clone(), from == to || to <= self.said_to));
        self.said_to = self.said_to.max(to);
        let done = self.bench.pvm(&frame);
        self.look(done, false);
    }

    fn svm_sends(&mut self, from: u64, to: u64) {
        let frame = self.frame(from, to, self.svm.acked, self.diverges_at);
        self.allowed.extend((from..to).filter(|at| Some(*at) != self.diverges_at));
        self.svm_acked = self.svm.acked;
        let done = self.bench.svm(&frame);
        self.look(done, false);
    }

    /// Whether it is the SVM's acknowledgment in place of the PVM's, which waits and is further.
    fn is_lowered(&self, seen: &Seen) -> bool {
        let acked = |seen: &Seen| seen.ack.map(|ack| ack.wrapping_sub(self.client_isn));
        seen.data.is_empty()
            && acked(seen) == Some(self.svm_acked)
            && self.held.iter().any(|(held, _)| {
                let held = read(held);
                held.seq == seen.seq && acked(&held) > acked(seen)
            })
    }

    /// What leaves is what the PVM sent, in order but for what repeats, and without a commit nothing that the SVM has not
    /// said.
    fn look(&mut self, done: Done, committed: bool) {
        for frame in done.to_lan {
            // of two that are equal, the one that may leave
            let equal = |index: &usize| self.held[*index].0 == frame;
            let may_leave = |index: &usize| *index == 0 || self.held[*index].1;
            let mut equals = (0..self.held.len()).filter(equal);
            let Some(index) = equals.clone().find(may_leave).or_else(|| equals.next()) else {
                assert!(!committed && self.is_lowered(&read(&frame)), "the PVM has not sent {frame:02x?}");
                continue;
            };
            let (frame, repeats) = self.held.remove(index).unwrap();
            assert!(index == 0 || (repeats && !committed), "out of order");
            let seen = read(&frame);
            let from = u64::from(seen.seq.wrapping_sub(self.first));
            let positions = from..from + seen.data.len() as u64;
            if !committed {
                assert!(
                    positions.clone().all(|at| self.allowed.contains(&at)),
                    "unsaid bytes in {positions:?}"
                );
                let acked = seen.ack.unwrap().wrapping_sub(self.client_isn);
                assert!(acked <= self.svm_acked, "{acked} acknowledged, {} by the SVM", self.svm_acked);
            }
            self.allowed.extend(positions);
        }
        self.wanted.extend(done.wanted.into_iter().map(|wish| wish.0));
    }

    fn commit(&mut self) {
        let done = self.bench.commit();
        self.look(done, true);
        assert!(self.held.is_empty());
        assert_eq!(self.bench.compare.stats().held_packets, 0);
        // the SVM is what the PVM is: it has not said what it did not release
        self.allowed.retain(|at| *at < self.pvm.next);
        self.svm = self.pvm.clone();
        self.svm_acked = self.pvm.acked;
        self.diverges_at = None;
        self.wanted.clear();
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::ClientSends(bytes) => self.client_sent += bytes,
            Step::Pvm(bytes, ack) => {
                self.pvm.acked += (self.client_sent - self.pvm.acked) * ack / 100;
                let from = self.pvm.next;
                self.pvm.next += u64::from(bytes);
                self.pvm_sends(from, self.pvm.next);
                if let Some((from, to)) = self.pvm.late.take() {
                    self.pvm_sends(from, to);
                }
            }
            Step::Svm(bytes, ack) => {
                self.svm.acked += (self.client_sent - self.svm.acked) * ack / 100;
                let from = self.svm.next;
                self.svm.next += u64::from(bytes);
                self.svm_sends(from, self.svm.next);
                if let Some((from, to)) = self.svm.late.take() {
                    self.svm_sends(from, to);
                }
            }
            Step::PvmAgain(back, bytes) => {
                let from = self.pvm.next.saturating_sub(u64::from(back));
                self.pvm_sends(from, (from + u64::from(bytes)).min(self.pvm.next));
            }
            Step::SvmAgain(back, bytes) => {
                let from = self.svm.next.saturating_sub(u64::from(back));
                self.svm_sends(from, (from + u64::from(bytes)).min(self.svm.next));
            }
            Step::PvmLate(bytes) => {
                if self.pvm.late.is_none() {
                    self.pvm.late = Some((self.pvm.next, self.pvm.next + u64::from(bytes)));
                    self.pvm.next += u64::from(bytes);
                }
            }
            Step::SvmLate(bytes) => {
                if self.svm.late.is_none() {
                    self.svm.late = Some((self.svm.next, self.svm.next + u64::from(bytes)));
                    self.svm.next += u64::from(bytes);
                }
            }
            Step::SvmDiverges(ahead) => {
                // only what it has not said yet: what is said twice is the same both times
                if self.diverges_at.is_none() {
                    self.diverges_at = Some(self.svm.next + u64::from(ahead));
                }
            }
            Step::Commit => self.commit(),
        }
    }

    /// The SVM says all that the PVM said.
    fn catch_up(&mut self) {
        for vm in [self.pvm.late.take(), self.svm.late.take()].into_iter().enumerate() {
            match vm {
                (0, Some((from, to))) => self.pvm_sends(from, to),
                (_, Some((from, to))) => self.svm_sends(from, to),
                _ => {}
            }
        }
        self.svm.acked = self.svm.acked.max(self.pvm.acked);
        self.svm_sends(self.svm.next, self.svm.next.max(self.pvm.next));
        self.svm.next = self.svm.next.max(self.pvm.next);
    }
}

proptest! {
    #[test]
    fn a_tcp_stream_leaves_as_far_as_the_svm_says_the_same(
        first in prop_oneof![any::<u32>(), (u32::MAX - 2000)..=u32::MAX],
        client_isn in prop_oneof![any::<u32>(), (u32::MAX - 2000)..=u32::MAX],
        opened in any::<bool>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut story = Story::new(first, client_isn, opened);
        for step in &steps {
            story.take(step);
        }
        story.catch_up();
        let differs = story.diverges_at.is_some_and(|at| at < story.pvm.next);
        if differs {
            // what was released before the SVM began to differ may cover the place: then nothing is left to compare
            prop_assert!(story.wanted.is_empty() || story.wanted == [Cause::Mismatch]);
            if !story.held.is_empty() {
                prop_assert_eq!(&story.wanted, &[Cause::Mismatch]);
            }
        } else {
            prop_assert_eq!(&story.wanted, &[]);
            prop_assert!(story.held.is_empty());
        }
        story.commit();
        prop_assert_eq!(story.bench.compare.stats().svm_bytes, 0);
    }

    #[test]
    fn a_masked_stream_leaves_as_if_it_were_one_segment(
        patterns in prop::collection::vec(pattern(), 1..4),
        pvm in "[abc]{1,60}",
        changes in prop::collection::vec((any::<prop::sample::Index>(), b'a'..=b'd'), 0..4),
        opened in any::<bool>(),
        isn in prop_oneof![Just(99), (u32::MAX - 60)..=u32::MAX],
        // who speaks, how much, and from how far back
        steps in prop::collection::vec((any::<bool>(), 0usize..9, 0usize..6), 0..60),
    ) {
        let mut svm = pvm.clone().into_bytes();
        for (at, byte) in changes {
            let at = at.index(svm.len());
            svm[at] = byte;
        }
        let pvm = pvm.into_bytes();
        let mask = std::sync::Arc::new(Mask::new(&patterns));
        let whole = |stream: &[u8]| {
            let mut out = stream.to_vec();
            let start = opened.then_some(0);
            mask.cover(&mut Default::default(), start, stream, |range| out[range].fill(mask.fill()));
            out
        };
        let (pvm_masked, svm_masked) = (whole(&pvm), whole(&svm));
        let differs_at = pvm_masked.iter().zip(&svm_masked).position(|(a, b)| a != b);

        let limits = Limits { clamp_windows: false, ..Limits::default() };
        let policy = Policy::of_all(&Treatment::Mask(mask));
        let mut bench = Bench { compare: Compare::with_policy(limits, policy), ..bench() };
        if opened {
            let syn = Tcp { seq: isn, ack: Some(1), syn: true, ..Tcp::default() }.frame();
            bench.pvm(&syn);
            bench.svm(&syn);
        }
        let frame = |stream: &[u8], from: usize, to: usize| {
            data(isn.wrapping_add(1 + from as u32), &stream[from..to])
        };
        let mut left: Vec<usize> = Vec::new();
        let mut sent = Vec::new();
        let mut wanted = Vec::new();
        let mut next = [0_usize; 2];
        let all = [(true, 60, 0), (false, 60, 0)];
        for (by_pvm, bytes, back) in steps.into_iter().chain(all) {
            let (stream, next) = if by_pvm { (&pvm, &mut next[0]) } else { (&svm, &mut next[1]) };
            let from = next.saturating_sub(back);
            let to = (from + bytes).min(stream.len());
            *next = to.max(*next);
            if from == to {
                continue;
            }
            let done = if by_pvm {
                sent.push((from, to));
                bench.pvm(&frame(stream, from, to))
            } else {
                bench.svm(&frame(stream, from, to))
            };
            for left_frame in done.to_lan {
                let seen = read(&left_frame);
                left.push(seen.seq.wrapping_sub(isn.wrapping_add(1)) as usize + seen.data.len());
            }
            wanted.extend(done.wanted.into_iter().map(|wish| wish.0));
        }
        match differs_at {
            None => {
                prop_assert_eq!(wanted, []);
                prop_assert_eq!(left.len(), sent.len());
            }
            Some(at) => {
                prop_assert_eq!(wanted, [Cause::Mismatch]);
                prop_assert!(left.iter().all(|end| *end <= at), "{:?} left, {} differs", left, at);
                // in order, all before it
                let before = sent.iter().take_while(|(_, end)| *end <= at).count();
                prop_assert!(left.len() >= before, "{} of {} left", left.len(), before);
            }
        }
        bench.commit();
        prop_assert_eq!(bench.compare.stats().svm_bytes, 0);
        prop_assert_eq!(bench.compare.stats().held_bytes, 0);
    }

    #[test]
    fn a_datagram_leaves_for_each_that_the_svm_sends(
        steps in prop::collection::vec((any::<bool>(), 0u8..3, 0u8..5), 1..150),
        commit_at in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let mut bench = bench();
        let message = |kind: u8, content: u8| match kind {
            0 => udp(1, &[content]),
            1 => udp(2, &[content]),
            _ => other(0x88b5, &[content]),
        };
        let mut sent: HashMap<Vec<u8>, usize> = HashMap::new();
        let mut said: HashMap<Vec<u8>, usize> = HashMap::new();
        let mut order: Vec<Vec<u8>> = Vec::new();
        let mut left = Vec::new();
        let commits: Vec<usize> = commit_at.iter().map(|index| index.index(steps.len())).collect();
        for (index, (pvm, kind, content)) in steps.iter().enumerate() {
            let frame = message(*kind, *content);
            let done = if *pvm {
                *sent.entry(frame.clone()).or_default() += 1;
                order.push(frame.clone());
                bench.pvm(&frame)
            } else {
                *said.entry(frame.clone()).or_default() += 1;
                bench.svm(&frame)
            };
            for frame in done.to_lan {
                let count = said.get_mut(&frame).unwrap();
                prop_assert!(*count > 0);
                *count -= 1;
                left.push(frame);
            }
            if commits.contains(&index) {
                left.extend(bench.commit().to_lan);
                prop_assert_eq!(left.len(), order.len());
                said.clear();
            }
        }
        left.extend(bench.commit().to_lan);
        // of each flow everything in order, and nothing twice
        for kind in 0..2 {
            let of_flow = |frames: &[Vec<u8>]| -> Vec<Vec<u8>> {
                frames.iter().filter(|frame| (0..5).any(|content| **frame == message(kind, content))).cloned().collect()
            };
            prop_assert_eq!(of_flow(&left), of_flow(&order));
        }
        left.sort();
        order.sort();
        prop_assert_eq!(left, order);
    }

    #[test]
    fn no_frames_make_it_panic_and_none_is_lost(
        frames in prop::collection::vec((any::<bool>(), crate::packet::tests::frame_like(), 0u64..200_000), 1..60),
        limits in (0usize..3000, 0usize..3000, 1usize..6),
        treatment in prop_oneof![
            Just(Treatment::Compare),
            Just(Treatment::Bypass),
            Just(Treatment::Checkpoint),
            prop::collection::vec(pattern(), 1..3).prop_map(|patterns| Treatment::Mask(Mask::new(&patterns).into())),
        ],
    ) {
        let limits = Limits {
            held_bytes_max: limits.0,
            svm_bytes_max: limits.1,
            flows_max: limits.2,
            ..Limits::default()
        };
        let mut bench = Bench { compare: Compare::with_policy(limits, Policy::of_all(&treatment)), ..bench() };
        let (mut sent, mut left) = (0, 0);
        for (pvm, frame, us) in frames {
            let done = if pvm {
                sent += 1;
                bench.pvm(&frame)
            } else {
                bench.svm(&frame)
            };
            left += done.to_lan.len();
            left += bench.after_us(us).to_lan.len();
            if us % 16 == 0 {
                left += bench.commit().to_lan.len();
            }
        }
        left += bench.commit().to_lan.len();
        let stats = bench.compare.stats();
        prop_assert_eq!(left as u64, sent + stats.windows_reopened + stats.acks_lowered);
    }
}

/// What a VM does with the pieces of a datagram.
fn pieces(id: u16, data: &[u8], bytes: usize) -> Vec<Vec<u8>> {
    fragments(&udp(1, data), id, bytes)
}

proptest! {
    #[test]
    fn a_datagram_in_fragments_leaves_when_the_svm_has_said_all_of_it(
        data in prop::collection::vec(any::<u8>(), 100..3000),
        units in (2usize..40, 2usize..40),
        order in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 600),
        differs in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut svm_data = data.clone();
        if let Some(at) = differs {
            svm_data[at.index(data.len())] ^= 1;
        }
        let (mut pvm, mut svm) = (pieces(7, &data, units.0 * 8), pieces(900, &svm_data, units.1 * 8));
        let mut bench = bench();
        let (mut sent, mut left) = (Vec::new(), Vec::new());
        for (of_pvm, index) in order {
            let from = if of_pvm { &mut pvm } else { &mut svm };
            if from.is_empty() {
                continue;
            }
            let frame = from.swap_remove(index.index(from.len()));
            let done = if of_pvm {
                sent.push(frame.clone());
                bench.pvm(&frame)
            } else {
                bench.svm(&frame)
            };
            prop_assert!(done.wanted.is_empty());
            let whole = pvm.is_empty() && svm.is_empty();
            prop_assert_eq!(done.to_lan.len(), if whole && differs.is_none() { sent.len() } else { 0 });
            left.extend(done.to_lan);
        }
        prop_assume!(pvm.is_empty() && svm.is_empty());
        if differs.is_some() {
            let done = bench.after_us(100_000);
            prop_assert_eq!(done.wanted[0].0, Cause::Mismatch);
            left = bench.commit().to_lan;
        }
        prop_assert_eq!(&left, &sent);
        let stats = bench.compare.stats();
        prop_assert_eq!((stats.held_packets, stats.held_bytes, stats.svm_bytes), (0, 0, 0));
        if sent.len() > 1 {
            prop_assert_eq!(put_together(&left), [(17, udp(1, &data)[34..].to_vec())]);
        }
    }
}

#[test]
fn fragments_whose_others_do_not_come_are_compared_one_by_one() {
    let (pvm, svm) = (pieces(7, &[1; 100], 40), pieces(900, &[1; 100], 40));
    let mut bench = bench();
    assert_eq!(bench.pvm(&pvm[2]), nothing());
    assert_eq!(bench.svm(&svm[2]), nothing());
    assert_eq!(bench.pvm(&pvm[0]), nothing());
    assert_eq!(bench.compare.next_deadline(), Some(50_002));
    assert_eq!(bench.after_us(50_000), nothing());
    assert_eq!(bench.after_us(1), leaves(&[&pvm[2]]));
    // as is what comes later still
    assert_eq!(bench.pvm(&pvm[1]), nothing());
    assert_eq!(bench.svm(&svm[0]), leaves(&[&pvm[0]]));
    assert_eq!(bench.svm(&svm[1]), leaves(&[&pvm[1]]));
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    // of the SVM's datagram one came in time, and without the SVM one waits as long as others
    assert_eq!(bench.pvm(&pieces(8, &[1; 100], 40)[0]), nothing());
    let done = bench.after_us(50_001);
    assert_eq!(done, nothing());
    let done = bench.after_us(100_000);
    assert_eq!(done.wanted[0].0, Cause::HeldTooLong);
}

#[test]
fn a_datagram_that_a_commit_cuts_in_two_is_compared_to_its_end() {
    let mut bench = bench();
    let frames = pieces(7, &[1; 100], 40);
    let others = pieces(900, &[2; 100], 40);
    bench.pvm(&frames[0]);
    bench.pvm(&frames[1]);
    bench.svm(&others[0]);
    assert!(bench.compare.stats().svm_bytes > 0);
    assert_eq!(bench.commit(), leaves(&[&frames[0], &frames[1]]));
    assert_eq!(bench.compare.stats().svm_bytes, 0);
    // the SVM is what the PVM was then, and says the rest with the same identification
    assert_eq!(bench.svm(&frames[2]), nothing());
    assert_eq!(bench.pvm(&frames[2]), leaves(&[&frames[2]]));
    // and is through with it
    for frame in &frames {
        assert_eq!(bench.pvm(frame), nothing());
    }
    assert_eq!(bench.svm(&pieces(33, &[1; 100], 104)[0]), nothing());
    assert_eq!(bench.svm(&pieces(33, &[1; 100], 104)[1]), leaves(&[&frames[0], &frames[1], &frames[2]]));
}

#[test]
fn a_segment_in_fragments_belongs_to_its_stream() {
    let mut bench = bench();
    let syn = Tcp { seq: 99, ack: Some(1), syn: true, window: 1000, ..Tcp::default() }.frame();
    bench.svm(&syn);
    assert_eq!(bench.pvm(&syn), leaves(&[&syn]));
    let segment = |window| Tcp { seq: 100, ack: Some(41), window, data: &[9; 300], ..Tcp::default() }.frame();
    let pvm = fragments(&segment(5000), 7, 64);
    for frame in &pvm {
        assert_eq!(bench.pvm(frame), nothing());
    }
    // the SVM says it in other pieces, acknowledges as much, and has less room
    assert_eq!(bench.svm(&data(100, &[9; 200])), nothing());
    let last = Tcp { seq: 300, ack: Some(41), window: 1200, data: &[9; 100], ..Tcp::default() };
    let done = bench.svm(&last.frame());
    assert_eq!(done.to_lan[1..], pvm[1..]);
    assert_eq!(put_together(&done.to_lan), [(6, segment(1200)[34..].to_vec())]);
    // a retransmission as one
    assert_eq!(bench.pvm(&segment(1200)), leaves(&[&segment(1200)]));
}

#[test]
fn fragments_are_held_packets_like_others() {
    let frames = pieces(7, &[1; 1000], 504);
    let limits = Limits { held_bytes_max: 600, held_bytes_full: 700, ..Limits::default() };
    let mut bench = Bench::new(limits);
    assert_eq!(bench.pvm(&frames[0]), nothing());
    assert!(bench.compare.has_room());
    let done = bench.pvm(&pieces(8, &[1; 1000], 504)[0]);
    assert_eq!(done.wanted, [(Cause::HeldBytes, "1076 bytes in 2 packets are held".to_owned())]);
    assert!(!bench.compare.has_room());
    bench.compare.suspend();
    // one that is lost knows of no datagrams
    assert_eq!(bench.pvm(&frames[1]), nothing());
    assert_eq!(bench.after_us(10_000_000), nothing());
    let mut left = bench.commit().to_lan;
    left.sort();
    let mut sent = vec![frames[0].clone(), pieces(8, &[1; 1000], 504)[0].clone(), frames[1].clone()];
    sent.sort();
    assert_eq!(left, sent);
    bench.pvm(&frames[0]);
    bench.compare.discard_all();
    assert_eq!(bench.compare.stats().held_packets, 0);
}

#[test]
fn sizes() {
    println!(
        "packet {} held {} flow {} tcp {} key {}",
        size_of::<Packet>(),
        size_of::<HeldPacket>(),
        size_of::<super::flows::Flow>(),
        size_of::<super::tcp::TcpFlow>(),
        size_of::<FlowKey>()
    );
}
