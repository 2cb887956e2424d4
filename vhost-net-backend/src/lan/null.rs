//! A LAN that is not there: what the back end itself can do, without a kernel behind it.

use std::str::FromStr;

use crate::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};

/// What a LAN does that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Null {
    /// It takes every frame and gives none.
    Drop,
    /// It also gives frames of this length, in bytes, as fast as the guest takes them.
    Generate(usize),
    /// It gives back what it gets.
    Reflect,
}

impl FromStr for Null {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("generate:")) {
            ("drop", _) => Ok(Self::Drop),
            ("reflect", _) => Ok(Self::Reflect),
            (_, Some(bytes)) => bytes
                .parse()
                .ok()
                .filter(|bytes| (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(bytes))
                .map(Self::Generate)
                .ok_or_else(|| {
                    format!("{bytes:?} is no length of a frame: {FRAME_BYTES_MIN} to {FRAME_BYTES_MAX} bytes")
                }),
            _ => Err(format!("{text:?}: say drop, generate:BYTES or reflect")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_does_is_said_in_one_word() {
        assert_eq!("drop".parse(), Ok(Null::Drop));
        assert_eq!("reflect".parse(), Ok(Null::Reflect));
        assert_eq!("generate:64".parse(), Ok(Null::Generate(64)));
        for wrong in ["", "generate", "generate:", "generate:13", "generate:65558", "generate:-1"] {
            assert!(wrong.parse::<Null>().is_err(), "{wrong}");
        }
    }
}
