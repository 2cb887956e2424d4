# COLO on a fresh Debian 12 with the Rust toolchain, make and root. `make help` tells what there is.

CARGO ?= cargo
# the programs under test, for the demo, the tests and the benchmarks alike
export COLO_BIN_DIR := $(CURDIR)/target/release
ROUNDS ?= 20
SECONDS ?= 60
EVENTS ?= 20000000

.PHONY: help deps build demo test test-blkio test-failover bench-pair bench-blk bench-net-device bench-proxy \
	bench-digest fuzz simulate clean

help:
	@echo 'make demo                     a protected guest, a client at work, and then the primary host dies (3 minutes)'
	@echo 'make test                     everything that CI runs'
	@echo 'make test-blkio               the block device driven by a client that is not ours (libblkio)'
	@echo 'make test-failover ROUNDS=20  kill the primary host so many times'
	@echo 'make bench-pair               the figures of the README'
	@echo 'make bench-blk                the disk back end against qemu-storage-daemon and bare I/O (10 minutes)'
	@echo 'make bench-net-device         the network back end against DPDK and QEMU (8 minutes)'
	@echo 'make bench-proxy              the proxy against colo-compare of QEMU, and a pair without emulation (4 minutes)'
	@echo 'make bench-digest             what the digests of the secondary output cost'
	@echo 'make fuzz SECONDS=600         hostile guests, frontends, peers and controllers, each for so long'
	@echo 'make simulate EVENTS=20000000 a client of a protected VM in a bad network, so many events (10 minutes)'
	@echo 'make build                    the programs, in target/release'
	@echo 'make clean                    remove what was built, and laboratories of dead runs'

deps:
	@tuning/install-deps.sh

build:
	$(CARGO) build --release --workspace --bins

demo: deps build
	@target/release/colo-demo

test: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) build --release --workspace --bins
	guest=$$(tuning/guest/mkguest.sh $(COLO_BIN_DIR)/guest-agent) && \
		COLO_TEST_KERNEL=$$guest/vmlinuz COLO_TEST_INITRD=$$guest/initrd $(CARGO) test --workspace
	$(MAKE) test-blkio

# apart from the workspace: its dependencies are not the product's
test-blkio: build
	cd tests/blkio && $(CARGO) fmt --check && \
		$(CARGO) clippy --locked --all-targets -- -D warnings && $(CARGO) test --locked

test-failover: deps build
	COLO_TEST_ROUNDS=$(ROUNDS) $(CARGO) test -p colo-tests --test failover killing_host_a

bench-pair: deps build
	@target/release/bench-pair

bench-blk: deps build
	@target/release/bench-blk

bench-net-device: deps build
	@tuning/install-deps.sh dpdk-dev librte-net-vhost23 librte-net-tap23 librte-net-virtio23 librte-mempool-ring23
	@target/release/bench-net-device

bench-proxy: deps build
	@target/release/bench-proxy

bench-digest:
	$(CARGO) bench -p colo-bench --bench digest

fuzz:
	tests/fuzz/run.sh $(SECONDS)

# other seeds than those of `make test`; a failure names the seed that COLO_SIM_SEED runs again
simulate:
	COLO_SIM_EVENTS=$(EVENTS) COLO_SIM_FIRST=1000000 $(CARGO) test -p vhost-net-backend --test simulation -- --nocapture

clean:
	sh tuning/teardown.sh stale /var/tmp/colo-lab
	$(CARGO) clean
	rm -rf .cache
