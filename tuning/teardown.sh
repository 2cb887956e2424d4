#!/bin/sh
# Removes laboratories: their processes, network namespaces and files.
#
#   teardown.sh wait DIRECTORY     that of DIRECTORY, once standard input is closed (its owner has ended, however)
#   teardown.sh stale DIRECTORY    all below DIRECTORY whose owner lives no more
#
# A laboratory is a directory whose name ends in its run id, with a file `owner` (process id and start time).
set -u
trap '' INT TERM HUP

remove() {
    run=$(basename "$1")
    for namespace in $(ip netns list | sed -n "s/^\(colo-$run-[^ ]*\).*/\1/p"); do
        tries=0
        while pids=$(ip netns pids "$namespace") && [ -n "$pids" ] && [ "$tries" -lt 500 ]; do
            # shellcheck disable=SC2086
            kill -KILL $pids 2>/dev/null
            sleep 0.02
            tries=$((tries + 1))
        done
        ip netns delete "$namespace"
    done
    [ -e "$1/keep" ] || rm -rf "$1"
}

case $1 in
wait)
    cat >/dev/null
    remove "$2"
    rmdir "$(dirname "$2")" 2>/dev/null
    ;;
stale)
    for directory in "$2"/*; do
        [ -e "$directory/owner" ] || continue
        read -r pid start <"$directory/owner"
        # field 22 of stat, counted behind the name in parentheses, which may hold anything
        now=$(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null | cut -d' ' -f20)
        [ "$now" = "$start" ] || remove "$directory"
    done
    rmdir "$2" 2>/dev/null
    ;;
esac
exit 0
