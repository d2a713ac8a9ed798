#!/bin/sh
# Builds the Debian package, checks what is in it with the programs that will read it, installs it into a
# Debian system in a folder, and removes it again. Needs dpkg and a C compiler; the installation needs root
# and systemd on Debian, and says so where it is left out.
#
#   dist/check-deb.sh              build and check
#   dist/check-deb.sh FILE.deb     check this one
#   QKD_CHROOT=DIR dist/check-deb.sh [FILE.deb]
#                                  install into this Debian system, not into one made of this machine's
#                                  packages (debootstrap --variant=minbase --include=systemd bookworm DIR)
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
    # Optimised it takes minutes to compile, and saves seconds here.
    cargo_deb=3.8.0
    if [ "$(target/tools/bin/cargo-deb --version 2>/dev/null)" != "$cargo_deb" ]; then
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=0 \
            cargo install cargo-deb --version "$cargo_deb" --locked --quiet --force --root target/tools
    fi
    deb=$(target/tools/bin/cargo-deb --no-build --locked | tail -n 1)
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
for script in postinst prerm postrm; do sh -n "$root/control/$script" || fail "$script"; done

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

if [ -z "${QKD_CHROOT:-}" ] && [ "$(id -u)" = 0 ] &&
    command -v deb-systemd-helper >/dev/null && command -v systemd-sysusers >/dev/null; then
    QKD_CHROOT="$root/debian"
    mkdir "$QKD_CHROOT"
    dist/debian-root.sh "$QKD_CHROOT"
fi
if [ -n "${QKD_CHROOT:-}" ]; then
    echo "== install and remove"
    in_chroot() { chroot "$QKD_CHROOT" /usr/bin/env -i LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
    # dpkg's own records and the user, which Debian keeps, are no remains.
    files() {
        (cd "$QKD_CHROOT" && find . -xdev ! -path './var/lib/dpkg/*' ! -path './var/log/*' ! -path './tmp/*' \
            ! -path './etc/*-' ! -name .pwd.lock ! -path './etc/*shadow' ! -path './run/systemd*' | sort)
    }
    files >"$root/before"
    cp "$deb" "$QKD_CHROOT/tmp/qkd-bridge.deb"
    in_chroot dpkg -i /tmp/qkd-bridge.deb || fail "does not install"
    in_chroot id qkd-bridge || fail "installed without its user"
    in_chroot qkd-bridge --version || fail "does not run there"
    systemd-tmpfiles --create --root="$QKD_CHROOT" qkd-bridge.conf || fail "folders"
    [ "$(in_chroot stat -c '%a %U' /run/qkd-bridge/keys)" = "700 qkd-bridge" ] || fail "folder for hand-over files"
    in_chroot systemd-analyze verify --man=no qkd-bridge.service || fail "unit"
    [ "$(in_chroot systemctl is-enabled qkd-bridge.service)" = disabled ] || fail "enabled without being asked"
    in_chroot dpkg -i /tmp/qkd-bridge.deb >/dev/null || fail "does not install twice"
    echo "kept" >"$QKD_CHROOT/etc/qkd-bridge/node.toml"
    in_chroot dpkg --purge qkd-bridge || fail "does not go away"
    [ -s "$QKD_CHROOT/etc/qkd-bridge/node.toml" ] || fail "purging took what somebody wrote"
    rm "$QKD_CHROOT/etc/qkd-bridge/node.toml" && rmdir "$QKD_CHROOT/etc/qkd-bridge"
    files | diff "$root/before" - || fail "purging left this, or took it"
else
    echo "== install and remove: left out, this is not root on Debian with systemd"
fi
echo "== good: $(dpkg-deb -f "$deb" Package Version Architecture | tr '\n' ' ')"
