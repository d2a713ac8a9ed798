#!/bin/sh
# Builds the Debian package, unpacks it into a folder as a machine without anything else, and checks what
# is there with the programs that will read it. Needs cargo-deb, dpkg-deb and systemd; no root.
#
#   dist/check-deb.sh              build and check
#   dist/check-deb.sh FILE.deb     check this one
#   QKD_CHROOT=DIR dist/check-deb.sh [FILE.deb]
#                                  as root: also install it into this Debian system and remove it again
#                                  (debootstrap --variant=minbase --include=systemd bookworm DIR)
set -eu
cd "$(dirname "$0")/.."

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
fail() { echo "check-deb: $*" >&2; exit 1; }

if [ $# -gt 0 ]; then
    deb=$1
else
    cargo build --release --locked --bin qkd-bridge
    rm -rf target/package && mkdir -p target/package/completions
    target/release/qkd-bridge completions bash >target/package/completions/qkd-bridge
    target/release/qkd-bridge completions zsh >target/package/completions/_qkd-bridge
    target/release/qkd-bridge completions fish >target/package/completions/qkd-bridge.fish
    target/release/qkd-bridge man --dir target/package/man
    deb=$(cargo deb --no-build --locked | tail -n 1)
fi
tree="$root/tree"
dpkg-deb -x "$deb" "$tree"
dpkg-deb -e "$deb" "$root/control"

echo "== files"
for file in \
    usr/bin/qkd-bridge \
    usr/lib/systemd/system/qkd-bridge.service \
    usr/lib/sysusers.d/qkd-bridge.conf \
    usr/lib/tmpfiles.d/qkd-bridge.conf \
    usr/share/doc/qkd-bridge/60-qkd-bridge.rules \
    usr/share/doc/qkd-bridge/quick-start.md \
    usr/share/doc/qkd-bridge/drivers.md \
    usr/share/doc/qkd-bridge/serial-protocol.md \
    usr/share/doc/qkd-bridge/ring-abi.md \
    usr/share/doc/qkd-bridge/examples/serial_device.py \
    usr/share/doc/qkd-bridge/examples/ring_producer.c \
    usr/share/doc/qkd-bridge/copyright \
    usr/include/qkd_ring.h \
    usr/share/bash-completion/completions/qkd-bridge \
    usr/share/zsh/vendor-completions/_qkd-bridge \
    usr/share/fish/vendor_completions.d/qkd-bridge.fish \
    usr/share/man/man1/qkd-bridge.1.gz \
    usr/share/man/man1/qkd-bridge-run.1.gz
do
    [ -s "$tree/$file" ] || fail "$file is not there"
done
[ -x "$tree/usr/bin/qkd-bridge" ] || fail "the program cannot be run"
find "$tree" -perm /022 ! -type l | grep . && fail "writable for others"
sh -n "$root/control/postinst" || fail "postinst"

echo "== program"
version=$(dpkg-deb -f "$deb" Version)
printed=$("$tree/usr/bin/qkd-bridge" --version)
case "$version" in "${printed#qkd-bridge }"*) ;; *) fail "$printed in package $version" ;; esac
# Completions are those of this program.
"$tree/usr/bin/qkd-bridge" completions bash |
    cmp -s - "$tree/usr/share/bash-completion/completions/qkd-bridge" || fail "completions of another version"

if command -v man >/dev/null; then
    MANWIDTH=100 man --warnings -l "$tree/usr/share/man/man1/qkd-bridge-run.1.gz" >"$root/man" 2>&1 || fail "manual page"
    grep -q "SIGHUP" "$root/man" || fail "manual page of run"
fi

if command -v systemd-analyze >/dev/null; then
echo "== unit"
for unit in network-online time-sync multi-user sysinit basic shutdown network; do
    cp "/usr/lib/systemd/system/$unit.target" "$tree/usr/lib/systemd/system/" 2>/dev/null || true
done
mkdir -p "$tree/bin" && cp /bin/sh "$tree/bin/"
# Unknown keys are told and make no exit status.
systemd-analyze verify --man=no --root="$tree" qkd-bridge.service 2>&1 | grep . && fail "unit"
# Anything above 3 is a protection that went missing.
systemd-analyze security --offline=true --threshold=30 --root="$tree" qkd-bridge.service >"$root/security" ||
    { tail -1 "$root/security"; fail "unit is exposed"; }

echo "== user and folders"
mkdir -p "$tree/etc"
systemd-sysusers --root="$tree" qkd-bridge.conf
grep -q '^qkd-bridge:' "$tree/etc/passwd" || fail "no user"
if [ "$(id -u)" = 0 ]; then
    systemd-tmpfiles --create --root="$tree" qkd-bridge.conf
    [ "$(stat -c %a "$tree/run/qkd-bridge/keys")" = 700 ] || fail "folder for hand-over files"
fi

else
    echo "== unit, user and folders: not looked at, there is no systemd here"
fi

echo "== header"
if command -v cc >/dev/null; then
    cc -std=c11 -Wall -Wextra -Werror -I "$tree/usr/include" -o "$root/ring_producer" \
        "$tree/usr/share/doc/qkd-bridge/examples/ring_producer.c" || fail "the example does not compile"
fi
if [ -n "${QKD_CHROOT:-}" ]; then
    echo "== install and remove"
    in_chroot() { chroot "$QKD_CHROOT" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
    cp "$deb" "$QKD_CHROOT/tmp/qkd-bridge.deb"
    in_chroot dpkg -i /tmp/qkd-bridge.deb || fail "does not install"
    in_chroot id qkd-bridge || fail "installed without its user"
    in_chroot qkd-bridge --version || fail "does not run there"
    in_chroot systemd-analyze verify --man=no qkd-bridge.service || fail "unit"
    [ "$(in_chroot systemctl is-enabled qkd-bridge.service)" = disabled ] || fail "enabled without being asked"
    in_chroot dpkg -i /tmp/qkd-bridge.deb >/dev/null || fail "does not install twice"
    in_chroot dpkg --purge qkd-bridge || fail "does not go away"
    [ ! -e "$QKD_CHROOT/usr/bin/qkd-bridge" ] || fail "the program stayed"
fi
echo "== good: $(dpkg-deb -f "$deb" Package Version Architecture | tr '\n' ' ')"
