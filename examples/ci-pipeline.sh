#!/usr/bin/env bash
# A pipeline around dmpctl: patch, measure, act on the answer. Every step can be given again after an interruption.
#
#   examples/ci-pipeline.sh runs/digits 0.5        # the run, and the distance above which the pipeline fails
#
# Exit codes of dmpctl: 0 done, 1 a bug, 2 usage, 3 something is missing, 4 integrity, 5 numbers, 6 a threshold was not met,
# 75 stopped and to be queued again (--requeue).
set -uo pipefail

run=${1:-runs/digits}
limit=${2:-0.5}
dmpctl=${DMPCTL:-dmpctl}

# What may be missing is found before anything is trained.
$dmpctl patch --run "$run" --dry-run --json > /dev/null || exit $?

$dmpctl patch --run "$run" --requeue --no-evaluate --json ${PATCH_OPTIONS:-}
code=$?
if [ $code -eq 75 ]; then
    echo "stopped by the scheduler: give the same command again" >&2
    exit 75
elif [ $code -ne 0 ]; then
    exit $code
fi

$dmpctl fid "$run" --versus backbone --fail-above "$limit" --json ${FID_OPTIONS:-} > "$run/fid.json"
code=$?
case $code in
    0) echo "the distance is at most $limit: $run/fid.json" ;;
    6) echo "the distance is above $limit: $run/fid.json" >&2 ;;
    *) exit $code ;;
esac

$dmpctl report "$run" --json > /dev/null || exit $?
exit $code
