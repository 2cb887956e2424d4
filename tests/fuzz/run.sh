#!/bin/sh
# Runs each fuzz target for so many seconds: run.sh SECONDS [TARGET]...
# What a target finds is left in target/fuzz/TARGET-*; put it into tests/fuzz/found/TARGET of vhost-blk-backend, or of
# vhost-net-backend for control_queue, frames, filter, packets and peers, where `cargo test` runs it from then on.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- control vhost_user chain control_queue frames filter packets peers
command -v g++ >/dev/null || { echo "fuzz: libFuzzer is compiled with g++: apt-get install g++" >&2; exit 1; }
root=$(cd ../.. && pwd)
work=$root/target/fuzz
# The seeds' program has a main function of its own, so it is built without the instrumentation.
cargo build --release --quiet --target-dir "$work/plain" --bin seeds
"$work/plain/release/seeds" "$work/seeds"
for target in "$@"; do
    RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
        cargo build --release --quiet --target x86_64-unknown-linux-gnu --target-dir "$work/instrumented" \
        --bin "$target"
    mkdir -p "$work/corpus/$target"
    echo "fuzz: $target for $seconds seconds"
    COLO_LOG=off "$work/instrumented/x86_64-unknown-linux-gnu/release/$target" "$work/corpus/$target" \
        "$work/seeds/$target" -max_total_time="$seconds" -max_len=4096 -timeout=60 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="$work/$target-"
done
