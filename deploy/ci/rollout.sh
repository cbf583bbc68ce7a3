#!/bin/sh
# Follow and steer a canary with kubectl alone: rollout.sh wait|watch|promote|finish|abort [NAMESPACE] [NAME]
set -eu
do=$1 space=${2:-cxr} name=${3:-cxr-vit}
# the phase; Unseen as long as the controller has not looked at the newest specification: what it says is of the one before
phase() {
    # shellcheck disable=SC2046  # three words
    set -- $(kubectl --namespace "$space" get rollout "$name" --output 'jsonpath={.metadata.generation} {.status.observedGeneration} {.status.phase}')
    if [ "${1:-}" = "${2:-none}" ]; then echo "${3:-Unknown}"; else echo Unseen; fi
}
# come to rest PHASE...: wait until it is in one of these phases, or went wrong
rest() {
    minutes=${WAIT_MINUTES:-45}
    while [ "$minutes" -gt 0 ]; do
        now=$(phase)
        echo "$name: $now"
        for wanted; do [ "$now" != "$wanted" ] || return 0; done
        if [ "$now" = Degraded ]; then
            kubectl --namespace "$space" get analysisrun --output wide
            return 4
        fi
        sleep "${EVERY_S:-60}"
        minutes=$((minutes - 1))
    done
    echo "$name did not come to rest." >&2
    return 4
}
status() { kubectl --namespace "$space" patch rollout "$name" --subresource status --type merge --patch "$1"; }
case $do in
    wait) rest Paused Healthy ;; # at its share of the traffic, or the same version as before
    finish) rest Healthy ;;      # after promote it is still paused for a moment
    watch) # the pause, with the analysis running
        minutes=${WATCH_MINUTES:-30}
        while [ "$minutes" -gt 0 ]; do
            now=$(phase)
            echo "$name: $now"
            [ "$now" != Degraded ] || exit 4
            sleep "${EVERY_S:-60}"
            minutes=$((minutes - 1))
        done
        # for whoever approves: a canary that read nothing was not judged
        kubectl --namespace "$space" get analysisrun --output wide ;;
    promote) status '{"status": {"pauseConditions": null, "promoteFull": true}}' ;;
    abort) status '{"status": {"abort": true}}' ;;
    *) echo "rollout.sh wait|watch|promote|finish|abort [NAMESPACE] [NAME]" >&2; exit 2 ;;
esac
