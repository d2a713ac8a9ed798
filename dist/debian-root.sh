#!/bin/sh
# A Debian system in a folder, in seconds: copies of the packages of this machine that a package of ours
# meets at its installation, with dpkg's records of them. Run as root on Debian with systemd.
#
#   dist/debian-root.sh DIR [PACKAGE...]   the packages besides, with what they depend on
set -eu
root=$1 && shift

# systemd and what every Debian has of which maintainer scripts make use, and all that those depend on.
all=
new="libc-bin base-files dash coreutils diffutils perl-base init-system-helpers dpkg tar sed grep systemd $*"
while [ -n "$new" ]; do
    all="$all $new"
    new=$(dpkg-query -W -f '${Pre-Depends},${Depends}\n' $new 2>/dev/null | tr ',|' '\n\n' |
        sed 's/^ *//; s/[ (:].*//; /^$/d' | sort -u | while read -r name; do
            case " $(echo $all) " in *" $name "*) continue ;; esac
            [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" != installed ] || echo "$name"
        done)
    new=$(echo $new)
done

mkdir -p "$root/usr" "$root/dev" "$root/proc" "$root/run" "$root/tmp" "$root/etc" "$root/var/lib/dpkg/info" \
    "$root/var/lib/dpkg/updates"
for link in bin sbin lib lib64; do
    mkdir -p "$root/usr/$link"
    [ ! -L "/$link" ] || ln -s "usr/$link" "$root/$link"
done
# Of manuals and translations nothing runs.
dpkg -L $all | grep -v -e '^/\(bin\|sbin\|lib\|lib64\|\.\)$' -e '^/usr/share/\(doc\|man\|locale\|info\)/' -e '^diverted' |
    sort -u | while read -r file; do [ ! -e "$file" ] && [ ! -L "$file" ] || echo ".$file"; done |
    tar -C / -c --no-recursion -T - | tar -C "$root" -x --keep-directory-symlink
dpkg-query -s $all >"$root/var/lib/dpkg/status"
for name in $all; do
    cp /var/lib/dpkg/info/"$name".list /var/lib/dpkg/info/"$name":*.list "$root/var/lib/dpkg/info/" 2>/dev/null || true
done
echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
echo "root:x:0:" >"$root/etc/group"
# A container may forbid the device; then what is written there is a file.
mknod -m 666 "$root/dev/null" c 1 3 2>/dev/null || : >"$root/dev/null"
