#!/bin/sh
# Builds the container of dist/Containerfile and runs a node in it, without an engine, a registry or a
# network: the images that it begins from are made of this machine's own packages. Needs root and buildah on
# Debian, and says so where they are missing.
#
#   dist/check-container.sh        the second stage, around target/release/qkd-bridge
#   dist/check-container.sh whole  both stages: compiles everything anew, with this machine's Rust
#
# It does not try the images of docker.io; for that, build it as the first lines of dist/Containerfile say.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "check-container: $*" >&2; exit 1; }
if ! command -v buildah >/dev/null || ! command -v dpkg-query >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "== left out: this is not root on Debian with buildah (apt-get install buildah)"
    exit 0
fi

target=${CARGO_TARGET_DIR:-target}
work=$(mktemp -d)
trap '[ ! -s "$work/etc/pid" ] || kill "$(cat "$work/etc/pid")"; rm -rf "$work"' EXIT
# Neither namespaces nor overlays: it works in a container too.
buildah() { command buildah --root "$work/root" --runroot "$work/run" --storage-driver vfs "$@"; }

# An image of this machine's packages: image NAME PACKAGE...
image() {
    name=$1 && shift
    rm -rf "$work/debian" && mkdir "$work/debian"
    dist/debian-root.sh "$work/debian" "$@"
    # A link that no package has: gcc makes it at its installation.
    ln -s gcc "$work/debian/usr/bin/cc"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/debian" / >/dev/null
    # Rust's are where the image of docker.io has them; crates come from this machine.
    buildah config --env PATH=/usr/local/cargo/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --env CARGO_HOME=/cargo --env CARGO_NET_OFFLINE=true "$container"
    buildah commit --quiet "$container" "$name" >/dev/null
    buildah rm "$container" >/dev/null
}

echo "== images to begin from"
images=$(sed -n 's/^FROM \([^ ]*\).*/\1/p' dist/Containerfile)
image "$(echo "$images" | tail -n 1)" passwd

echo "== build"
build() { buildah bud --quiet --pull-never --isolation chroot -f dist/Containerfile -t qkd-bridge "$@" .; }
if [ "${1:-}" = whole ]; then
    image "$(echo "$images" | head -n 1)" gcc libc6-dev
    cargo fetch --locked --target "$(rustc -vV | sed -n 's/^host: //p')"
    build -v "$(rustc --print sysroot):/usr/local/cargo:ro" -v "${CARGO_HOME:-$HOME/.cargo}/registry:/cargo/registry:ro"
else
    [ -x "$target/release/qkd-bridge" ] || cargo build --release --locked --bin qkd-bridge
    # In place of the first stage.
    mkdir -p "$work/build/source/target/release"
    cp "$target/release/qkd-bridge" "$work/build/source/target/release/"
    build --build-context build="$work/build"
fi

echo "== program"
container=$(buildah from --pull-never localhost/qkd-bridge)
run() { buildah run --isolation chroot -v "$work/etc:/etc/qkd-bridge" "$container" -- "$@"; }
mkdir "$work/etc"
version=$(run qkd-bridge --version) || fail "does not run"
[ "$(run id -u):$(run id -g)" = 964:964 ] || fail "runs as $(run id)"
run test -w /var/lib/qkd-bridge || fail "its user cannot write to its data"
settings=$(buildah inspect --type image --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.Cmd}} {{.OCIv1.Config.StopSignal}}' localhost/qkd-bridge)
[ "$settings" = "[/usr/bin/qkd-bridge] [run --config /etc/qkd-bridge/node.toml] SIGTERM" ] || fail "starts $settings"

echo "== a node"
cat >"$work/etc/node.toml" <<'TOML'
[node]
id = "alice"
data = "/var/lib/qkd-bridge"
key_memory_mib = 4
allow_unlocked_memory = true
[tls]
ca = "pki/ca.pem"
certificate = "pki/node-alice.pem"
key = "pki/node-alice.key"
[kx]
listen = "127.0.0.1:0"
TOML
chown -R 964:964 "$work/etc"
run qkd-bridge pki init --dir /etc/qkd-bridge/pki --node alice >/dev/null || fail "certificates"
run sh -c 'echo $$ >/etc/qkd-bridge/pid; exec qkd-bridge run --config /etc/qkd-bridge/node.toml' >"$work/log" 2>&1 &
node=$!
tries=100
until run qkd-bridge status --json --config /etc/qkd-bridge/node.toml >"$work/status" 2>/dev/null; do
    tries=$((tries - 1))
    if [ $tries = 0 ] || ! kill -0 $node 2>/dev/null; then cat "$work/log"; fail "no node"; fi
    sleep 0.1
done
grep -q '"node": *"alice"' "$work/status" || { cat "$work/status"; fail "another node"; }
run test -s /var/lib/qkd-bridge/kek || fail "no store"
kill -TERM "$(cat "$work/etc/pid")"
wait $node || { cat "$work/log"; fail "does not stop when it is told to"; }
rm "$work/etc/pid"
echo "== good: $version"
