#!/bin/sh
# Makes the guest of the service tests: the initramfs of mkguest.sh with servers that people run, lighttpd, dropbear,
# OpenSSL, dnsmasq and rsync, and files for them to serve.
#
#   mkservices.sh GUEST               (GUEST: the directory that mkguest.sh has printed)
#
# Prints the directory that holds `initrd`; `srv`, what the guest serves; `id`, the key that its ssh server lets in; and
# `certificate`, that of its TLS server. What is there already and made from the same things is kept.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
guest=$1
fail() { echo "mkservices: $*" >&2; exit 1; }

# downloaded and taken apart, not installed: its package starts a server
lighttpd=$(apt-cache policy lighttpd | sed -n 's/^ *Candidate: //p')
[ -n "$lighttpd" ] || fail "apt knows no package lighttpd: run 'apt-get update'"
versions=$(dpkg-query -W -f '${Package} ${Version}\n' dropbear-bin openssl dnsmasq-base rsync libxxhash0 libpcre2-8-0 \
    libnettle8 libc6) || fail "packages are missing: run tuning/install-deps.sh"
key=$( (echo "$versions $lighttpd"; basename "$guest"; cat "$here/mkservices.sh" "$here"/services/*) |
    sha256sum | cut -c 1-16)
out=$(dirname "$guest")/services-$key
if [ -e "$out/complete" ]; then echo "$out"; exit 0; fi

work=$(mktemp -d "$(dirname "$guest")/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
root=$work/root
mkdir -p "$work/made/srv/tree" "$root/bin" "$root/etc/dropbear" "$root/root/.ssh" "$root/lib/lighttpd" "$work/fetch"

# a dynamic program brings the libraries that it names
put() {
    cp -L "$1" "$root/bin/"
    ldd "$1" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}
chmod 755 "$work" "$work/fetch"
(cd "$work/fetch" && apt-get -o APT::Sandbox::User=root -q download "lighttpd=$lighttpd" >&2)
dpkg-deb -x "$work"/fetch/*.deb "$work/lighttpd"
cp "$work"/lighttpd/usr/lib/lighttpd/*.so "$root/lib/lighttpd/"
for program in "$work/lighttpd/usr/sbin/lighttpd" /usr/sbin/dropbear /usr/bin/openssl /usr/sbin/dnsmasq /usr/bin/rsync; do
    put "$program"
done
ln -s /lib/lighttpd "$root/lighttpd"
cp "$here"/services/* "$root/etc/"
chmod 755 "$root/etc/more"
ln -s /proc/self/mounts "$root/etc/mtab"
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"
echo /bin/sh >"$root/etc/shells"

# keys: of this image, not of a user
dropbearkey -t ed25519 -f "$root/etc/dropbear/host" >/dev/null
dropbearkey -t ed25519 -f "$work/made/id" | grep ^ssh- >"$root/root/.ssh/authorized_keys"
chmod -R go-rwx "$root/root"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=guest \
    -keyout "$root/etc/tls.key" -out "$root/etc/tls.crt" 2>/dev/null
cp "$root/etc/tls.crt" "$work/made/certificate"

# content without repetitions, the same each time
bytes() { openssl enc -aes-128-ctr -K "$(printf %032d "$2")" -iv 0 -in /dev/zero 2>/dev/null | head -c "$1"; }
bytes 4194304 1 >"$work/made/srv/big"
for n in $(seq 1 100); do
    mkdir -p "$work/made/srv/tree/$((n % 7))"
    bytes $((n * n * 5)) "$n" >"$work/made/srv/tree/$((n % 7))/$n"
done
cp -a "$work/made/srv" "$root/srv"

# the kernel takes one archive after the other, and the later file of a name
cp "$guest/initrd" "$work/made/initrd"
(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >>"$work/made/initrd"
touch "$work/made/complete"
mv -T "$work/made" "$out" 2>/dev/null || [ -e "$out/complete" ]
echo "$out"
