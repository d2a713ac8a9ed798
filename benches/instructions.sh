#!/bin/sh
# Counts the instructions of the kernels and of the pipeline's stage with callgrind and compares them
# with the stored figures: a check that holds on a noisy machine. Callgrind knows no AVX-512 and no
# SHA instructions, so only the portable and the AVX2 backend are counted.
#
#   benches/instructions.sh            compares; fails where a count is more than 3 % off
#   benches/instructions.sh --update   stores what it counts
#
# Another compiler may give other counts: the stored ones name theirs.
set -eu
cd "$(dirname "$0")/.."
stored=benches/instructions.txt
tolerance_percent=3

cargo build --quiet --release --example instructions
program=$(cargo metadata --format-version 1 --no-deps |
    sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/examples/instructions

total() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$@" 2>&1 |
        sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

# Per call: three more calls cost three times as much, and what start and end cost drops out.
count() {
    few=$(total "$1" "$2" 2)
    many=$(total "$1" "$2" 5)
    echo $(((many - few) / 3))
}

measure() {
    echo "# instructions per call; $(rustc --version)"
    for backend in portable avx2; do
        for case in $("$program"); do
            echo "$case $backend $(count "$case" "$backend")"
        done
    done
}

if [ "${1-}" = --update ]; then
    measure >"$stored.new"
    mv "$stored.new" "$stored"
    cat "$stored"
    exit
fi

measure | awk -v tolerance="$tolerance_percent" '
    FNR == NR { before[$1 " " $2] = $3; next }
    /^#/ { print; next }
    {
        known = before[$1 " " $2]
        off = known ? 100 * ($3 - known) / known : 100
        bad = off > tolerance || off < -tolerance
        printf "%-7s %-9s %10d, stored %10d: %+.1f %%%s\n", $1, $2, $3, known, off, bad ? "  OFF" : ""
        failed = failed || bad
    }
    END { exit failed }
' "$stored" -
