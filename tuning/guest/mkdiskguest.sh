#!/bin/sh
# Makes the guest of the disk tests: the initramfs of mkguest.sh with another first program, and a small disk with
# fio, which is too large to be unpacked into memory at each boot.
#
#   mkdiskguest.sh GUEST              (GUEST: the directory that mkguest.sh has printed)
#
# Prints the directory that holds `initrd` and `tools.img`; the kernel is that of GUEST. What is there already and made
# from the same things is kept.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
guest=$1
fail() { echo "mkdiskguest: $*" >&2; exit 1; }

version=$(dpkg-query -W -f '${Package} ${Version}\n' fio libc6) || fail "fio is missing: run tuning/install-deps.sh"
key=$( (echo "$version"; basename "$guest"; cat "$here/mkdiskguest.sh" "$here"/disk/*) | sha256sum | cut -c 1-16)
out=$(dirname "$guest")/disk-$key
if [ -e "$out/complete" ]; then echo "$out"; exit 0; fi

work=$(mktemp -d "$(dirname "$guest")/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP

mkdir -p "$work/tools/lib" "$work/root/bin" "$work/root/etc" "$work/made"
cp /usr/bin/fio "$work/tools/"
ldd /usr/bin/fio | grep -o '/[^ ]*' | while read -r library; do cp -L "$library" "$work/tools/lib/"; done
kib=$(du -sk "$work/tools" | cut -f 1)
mke2fs -q -t ext4 -O ^has_journal -d "$work/tools" "$work/made/tools.img" $((kib + kib / 8 + 1024))k >&2

cp "$here/disk/init" "$work/root/init"
cp "$here/disk/console" "$work/root/etc/"
cp "$here/disk/fio" "$here/disk/generation" "$here/disk/load" "$work/root/bin/"
chmod 755 "$work/root/init" "$work/root/bin/"*
# the kernel takes one archive after the other, and the later file of a name
cp "$guest/initrd" "$work/made/initrd"
(cd "$work/root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >>"$work/made/initrd"
touch "$work/made/complete"
mv -T "$work/made" "$out" 2>/dev/null || [ -e "$out/complete" ]
echo "$out"
