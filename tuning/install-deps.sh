#!/bin/sh
# Installs what COLO's demo, tests and benchmarks need on a fresh Debian 12 that has the Rust toolchain and root, and the
# packages that are named as arguments.
# Does nothing, not even `apt-get update`, where all is there.
set -eu

# redis-tools: redis-benchmark for the host, and the program redis-server for the guest without a service on the host;
# fio: for the guest of the disk tests; iperf3: for host and guest; dropbear and what follows: for the guest of the service
# tests and its clients.
packages="qemu-system-x86 redis-tools busybox-static e2fsprogs iproute2 iputils-ping cpio fio iperf3 \
    dropbear-bin openssl dnsmasq-base rsync libxxhash0 libpcre2-8-0 libnettle8 $*"
# qemu-img, for tests. Installed after the others: a newer one, where there is one, conflicts with Debian's
# qemu-system-x86, and is removed by it.
later="qemu-utils"

absent() {
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}
# shellcheck disable=SC2086
missing=$(absent $packages $later)
# the guest's kernel is downloaded by apt, which must know of it
index_missing=""
[ -n "$(apt-cache policy linux-image-cloud-amd64 2>/dev/null)" ] || index_missing=yes
[ -n "$missing$index_missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "install-deps:" ${missing:-the package index} "missing: run this as root" >&2
    exit 1
fi
apt-get -q update >&2
# shellcheck disable=SC2046,SC2086
for some in "$(absent $packages)" "$later"; do
    some=$(absent $some)
    [ -n "$some" ] || continue
    echo "install-deps: installing" $some >&2
    DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $some >&2
done
