#!/usr/bin/env bash
# Weakens every ordering of the ring in turn and shows that loom fails each time: the models would notice.
#
#   drivers/handover/weaken.sh
#
# Works on a copy; the sources stay as they are. A weakened source on which all models pass is an error.
set -euo pipefail
cd "$(dirname "$0")/../.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | tar --null -T - -c | tar -x -C "$copy"
target="$PWD/target/weaken"
ring=drivers/handover/src/ring

# File, what stands there once, what is put in its place, and what that takes away.
weakenings=(
    "producer.rs|.store(published, Ordering::Release)|.store(published, Ordering::Relaxed)|publishing the record"
    "consumer.rs|.load(at::WRITE_POS, Ordering::Acquire)|.load(at::WRITE_POS, Ordering::Relaxed)|seeing the record"
    "consumer.rs|.say(at::READ_POS, self.read_pos, Ordering::Release)|.say(at::READ_POS, self.read_pos, Ordering::Relaxed)|giving room back wiped"
    "producer.rs|.heard(at::READ_POS, Ordering::Acquire)|.heard(at::READ_POS, Ordering::Relaxed)|taking room after the wiping"
    "producer.rs|fence(Ordering::SeqCst);|fence(Ordering::AcqRel);|the producer's fence before the wish"
    "consumer.rs|fence(Ordering::SeqCst);|fence(Ordering::AcqRel);|the consumer's fence after the wish"
    "consumer.rs|.say(at::DURABLE_SESSION, session.get(), Ordering::Release)|.say(at::DURABLE_SESSION, session.get(), Ordering::Relaxed)|publishing the session of what is durable"
    "producer.rs|.heard(at::DURABLE_SESSION, Ordering::Acquire)|.heard(at::DURABLE_SESSION, Ordering::Relaxed)|seeing the session of what is durable"
)

models() {
    (cd "$copy" && RUSTFLAGS="--cfg loom" cargo test --locked -q -p qkd-handover --lib --release \
        --target-dir "$target" loom_ >"$copy/output" 2>&1)
}

echo "as it is: all models pass"
models || { cat "$copy/output"; exit 1; }
for weakening in "${weakenings[@]}"; do
    file="$copy/$ring/${weakening%%|*}"
    rest=${weakening#*|}
    before=${rest%%|*}
    rest=${rest#*|}
    after=${rest%%|*}
    name=${rest#*|}
    cp "$file" "$copy/kept"
    BEFORE="$before" AFTER="$after" python3 - "$file" <<'PYTHON'
import os, sys
path, before, after = sys.argv[1], os.environ["BEFORE"], os.environ["AFTER"]
text = open(path).read()
if text.count(before) != 1:
    sys.exit(f"{path}: {before!r} stands there {text.count(before)} times, not once")
open(path, "w").write(text.replace(before, after))
PYTHON
    if models; then
        echo "NOT NOTICED: without $name all models pass"
        exit 1
    fi
    grep -q "test result: FAILED" "$copy/output" || { cat "$copy/output"; exit 1; }
    echo "noticed: without $name: $(grep -c -- '--- FAILED\|\.\.\. FAILED' "$copy/output") model(s) fail"
    cp "$copy/kept" "$file"
done
echo "every ordering of the ring is held by a model"
