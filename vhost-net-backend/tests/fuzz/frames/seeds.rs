//! What sound drivers do, and some of what others do.

/// A frame of a kind of length, with what follows the kind, and a header of a kind with what follows that; in one piece
/// or more behind the header.
fn frame(length: &[u8], header: &[u8], cuts: &[u8], shape: u8) -> Vec<u8> {
    let mut bytes = [&[0], length, header, &[0, cuts.len() as u8], cuts, &[7, 1]].concat();
    (0..=cuts.len() as u8).for_each(|piece| bytes.extend([piece * 40, 16 * piece]));
    bytes.extend([0, shape]);
    bytes
}

fn buffers(kind: &[u8], cuts: &[u8], shape: u8) -> Vec<u8> {
    [&[4], kind, &[1, cuts.len() as u8], cuts, &[0, shape]].concat()
}

fn packet(length: &[u8], header: &[u8]) -> Vec<u8> {
    [&[7], length, header, &[0]].concat()
}

pub(in super::super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let settle = || vec![13, 0];
    let large = |kind: u8| vec![2 | kind << 4, 0];
    let mut all = Vec::new();
    // the ring's size and EVENT_IDX, where memory is cut, and features
    for (setup, features) in [(3, 0x0fff_u16), (7, 0x0fff), (10, 0x007d), (22, 0), (1, 2), (5, 0x0183)] {
        let mut sound = vec![setup];
        sound.extend(features.to_le_bytes());
        for round in 0..3 {
            sound.extend(frame(&[14, 46], &[0], &[12], 2));
            sound.extend(frame(&[4], &large(0), &[12, 14, 20], 0));
            sound.extend(frame(&[9], &large(1), &[3, 200, 0, 255], 1));
            sound.extend(frame(&[11, 0x00, 0x40], &large(2), &[40], 0x38));
            sound.extend(frame(&[5], &large(3), &[], 2));
            for _ in 0..4 {
                sound.extend(buffers(&[0], &[], 2));
                sound.extend(buffers(&[5], &[12, 200], 0));
            }
            sound.extend(buffers(&[1], &[12], 2));
            sound.extend(settle());
            sound.extend(packet(&[14, 50], &[0]));
            sound.extend(packet(&[4], &large(0)));
            sound.extend(packet(&[11, 0x00, 0x20], &large(1)));
            sound.extend(settle());
            sound.extend([10, round | 8, 10, 1 | round << 4]);
        }
        all.push(sound);
        let mut odd = vec![setup];
        odd.extend(features.to_le_bytes());
        for length in 0..11 {
            odd.extend(frame(&[length], &[0], &[12], 2));
            odd.extend(buffers(&[2, 60], &[5, 0, 9], 0));
            odd.extend(packet(&[length], &[0]));
            odd.extend(settle());
        }
        // as many pieces as there can be, with a frame that has and one that has no room in them
        for pieces in 0..7 {
            odd.extend([0, 13, 0x00, 0x08, 0, 0, 255, pieces, 7, 1, 0, 0]);
            (0..2).for_each(|_| odd.extend([4, 3, 0x00, 0x08, 1, 255, pieces, 0, 0]));
            odd.extend(packet(&[11, 0x00, 0x04], &[0]));
            odd.extend(packet(&[11, 0x00, 0x09], &[0]));
            odd.extend(settle());
        }
        odd.extend([12, 1]);
        odd.extend(frame(&[14, 46], &[0], &[12], 2));
        odd.extend(settle());
        odd.extend([11, 1]);
        odd.extend(frame(&[14, 47], &[0], &[12], 2));
        odd.extend(packet(&[14, 50], &[0]));
        odd.extend([12, 0, 11, 0]);
        all.push(odd);
        // so many small packets that long ones are not expected, and then some
        let mut long = vec![setup];
        long.extend(features.to_le_bytes());
        for _ in 0..24 {
            long.extend(buffers(&[0], &[12], 0));
        }
        for _ in 0..20 {
            long.extend(packet(&[14, 50], &[0]));
        }
        long.extend(settle());
        for length in [4, 5, 6, 8, 9, 10, 8] {
            for _ in 0..4 {
                long.extend(buffers(&[1], &[12, 200], 0));
                long.extend(buffers(&[0], &[], 0));
            }
            long.extend(packet(&[length], &[0]));
            long.extend(packet(&[11, 0x00, 0x20], &[0]));
            long.extend(packet(&[14, 50], &[0]));
            long.extend(settle());
        }
        all.push(long);
        let mut broken = vec![setup];
        broken.extend(features.to_le_bytes());
        for kind in 0..24 {
            broken.extend(frame(&[14, 46], &[0], &[12], 2));
            broken.extend(buffers(&[0], &[], 2));
            broken.extend([9, kind, 1, 13, 0]);
            broken.extend(packet(&[14, 50], &[0]));
            broken.extend([10, kind % 2, 13, 0]);
        }
        all.push(broken);
    }
    all.into_iter().map(|seed| ("frames", seed)).collect()
}
