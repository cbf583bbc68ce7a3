#!/bin/sh
# Follow and steer a canary with kubectl alone: rollout.sh wait|watch|promote|abort [NAMESPACE] [NAME]
set -eu
do=$1 space=${2:-cxr} name=${3:-cxr-vit}
phase() { kubectl --namespace "$space" get rollout "$name" --output 'jsonpath={.status.phase}'; }
case $do in
    wait) # until it is paused at its share of the traffic, or went wrong
        minutes=${WAIT_MINUTES:-45}
        while [ "$minutes" -gt 0 ]; do
            now=$(phase)
            echo "$name: $now"
            case $now in
                Paused | Healthy) exit 0 ;;
                Degraded) kubectl --namespace "$space" get analysisrun --output wide; exit 4 ;;
            esac
            sleep 60
            minutes=$((minutes - 1))
        done
        echo "$name did not come to rest." >&2
        exit 4 ;;
    watch) # the pause, with the analysis running: anything but paused or healthy is a rollback
        minutes=${WATCH_MINUTES:-30}
        while [ "$minutes" -gt 0 ]; do
            now=$(phase)
            echo "$name: $now"
            [ "$now" != Degraded ] || exit 4
            sleep 60
            minutes=$((minutes - 1))
        done ;;
    promote) kubectl --namespace "$space" patch rollout "$name" --subresource status --type merge --patch '{"status": {"pauseConditions": null, "promoteFull": true}}' ;;
    abort) kubectl --namespace "$space" patch rollout "$name" --subresource status --type merge --patch '{"status": {"abort": true}}' ;;
    *) echo "rollout.sh wait|watch|promote|abort [NAMESPACE] [NAME]" >&2; exit 2 ;;
esac
