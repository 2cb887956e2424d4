//! The checkpoint engine: primary and secondary halves.
