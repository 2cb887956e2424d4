//! The laboratory on one machine that the demo, the tests and the benchmarks use.
