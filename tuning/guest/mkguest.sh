#!/bin/sh
# Makes the test guest out of Debian packages: a kernel and an initramfs with redis, httpd, iperf3 and guest-agent.
#
#   mkguest.sh GUEST-AGENT [DIRECTORY]        (DIRECTORY: .cache/guest of the work tree)
#
# COLO_GUEST_KERNEL names the package that depends on the kernel: linux-image-cloud-amd64, or linux-image-amd64, which is
# slower to boot and has drivers of the network cards that QEMU emulates.
# Prints the directory that holds `vmlinuz` and `initrd`. What is there already and made from the same things is kept:
# the name of the directory is a hash of the script, the files beside it, the program and the packages' versions.
# Needs what install-deps.sh installs; touches nothing of the host outside of DIRECTORY.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
agent=$1
cache=${2:-$(cd "$here/../.." && pwd)/.cache/guest}

say() { echo "mkguest: $*" >&2; }
fail() { say "$*"; exit 1; }

# dpkg keeps versions of what is installed; the kernel is only downloaded, so apt's index tells it
flavour=${COLO_GUEST_KERNEL:-linux-image-cloud-amd64}
kernel=$(apt-cache depends "$flavour" 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || fail "apt knows no package $flavour: run 'apt-get update'"
kernel_version=$(apt-cache policy "$kernel" | sed -n 's/^ *Candidate: //p')
packages=$(dpkg-query -W -f '${Package} ${Version}\n' redis-tools busybox-static iperf3 libc6) ||
    fail "packages are missing: run tuning/install-deps.sh"
key=$( (echo "$kernel $kernel_version"; echo "$packages"
    cat "$here"/mkguest.sh "$here"/init "$here"/unmount "$here"/reboot "$here"/redis.conf "$agent") |
    sha256sum | cut -c 1-16)
out=$cache/$key
if [ -e "$out/complete" ]; then echo "$out"; exit 0; fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

# The kernel package, taken apart and not installed. 70 MB: kept apart from what changes more often.
packed=$cache/$kernel-$kernel_version
if [ ! -e "$packed" ]; then
    say "fetching $kernel $kernel_version"
    mkdir "$work/fetch"
    chmod 755 "$work" "$work/fetch"
    (cd "$work/fetch" && apt-get -o APT::Sandbox::User=root -q download "$kernel=$kernel_version" >&2)
    mkdir "$work/kernel"
    dpkg-deb -x "$work"/fetch/*.deb "$work/kernel"
    mv -T "$work/kernel" "$packed" 2>/dev/null || [ -e "$packed" ]
fi

root=$work/root
mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/tmp" "$root/etc" "$root/data" "$root/www" \
    "$root/lib/modules"

# virtio_pci and what stands on it are modules of this kernel; ext4 is built in. The order is that of loading.
put_module() {
    file=$(find "$packed/lib/modules" -name "$1.ko" | head -n 1)
    [ -n "$file" ] || fail "$kernel has no module $1"
    cp "$file" "$root/lib/modules/"
    echo "$1.ko" >>"$root/lib/modules/$2"
}
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci \
    failover net_failover virtio_net virtio_blk; do
    put_module "$module" order
done
if [ "$flavour" = linux-image-amd64 ]; then
    for module in e1000 mii 8139cp; do
        put_module "$module" order
    done
fi

# the same for VLANs; not loaded at boot
for module in llc stp mrp garp 8021q; do
    put_module "$module" vlan
done

# a dynamic program brings the libraries that it names
put() {
    cp -L "$1" "$root/bin/$2"
    ldd "$1" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}
cp "$(dpkg-query -L busybox-static | grep -x '.*/bin/busybox')" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
# redis-server and redis-check-rdb are one program in Debian, and redis-tools holds it: no service is installed here
put /usr/bin/redis-check-rdb redis-server
put /usr/bin/iperf3 iperf3
put "$agent" guest-agent
cp "$here/init" "$root/init"
cp "$here/unmount" "$here/reboot" "$here/redis.conf" "$root/etc/"
echo "a page from the guest" >"$root/www/index.html"
chmod 755 "$root/init"

mkdir "$work/made"
(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >"$work/made/initrd"
cp "$packed"/boot/vmlinuz-* "$work/made/vmlinuz"
touch "$work/made/complete"
mv -T "$work/made" "$out" 2>/dev/null || [ -e "$out/complete" ]
say "made $out"
echo "$out"
