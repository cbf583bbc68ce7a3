#!/bin/sh
# Follow and steer a canary with kubectl and jq: rollout.sh wait|watch|promote|finish|abort [NAMESPACE] [NAME]
set -eu
do=$1 space=${2:-cxr} name=${3:-cxr-vit}
# the phase; Unseen as long as the controller has not looked at the newest specification: what it says is of the one before
phase() {
    # shellcheck disable=SC2046  # three words
    set -- $(kubectl --namespace "$space" get rollout "$name" --output 'jsonpath={.metadata.generation} {.status.observedGeneration} {.status.phase}')
    if [ "${1:-}" = "${2:-none}" ]; then echo "${3:-Unknown}"; else echo Unseen; fi
}
# the analysis that runs beside the canary: its status and its name
analysis() { kubectl --namespace "$space" get rollout "$name" --output 'jsonpath={.status.canary.currentBackgroundAnalysisRunStatus.status} {.status.canary.currentBackgroundAnalysisRunStatus.name}'; }
# bad WHY: what the analysis found, and the exit status that takes the canary back
bad() {
    echo "$name: $1" >&2
    kubectl --namespace "$space" get analysisrun --output wide
    exit 4
}
# come to rest PHASE...: wait until it is in one of these phases, or went wrong
rest() {
    minutes=${WAIT_MINUTES:-45}
    while [ "$minutes" -gt 0 ]; do
        now=$(phase)
        echo "$name: $now"
        for wanted; do [ "$now" != "$wanted" ] || return 0; done
        [ "$now" != Degraded ] || bad "it went wrong"
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
        minutes=${WATCH_MINUTES:-30} run=
        while :; do
            now=$(phase)
            # shellcheck disable=SC2046  # two words
            set -- $(analysis)
            found=${1:-none} run=${2:-}
            echo "$name: $now, analysis: $found"
            case $now in
                Healthy) echo "It is the version that ran before: nothing to compare."; exit 0 ;;
                Degraded) bad "it went wrong" ;;
            esac
            # one that ended without a word leaves the Rollout paused, and a promotion would pass over it
            case $found in Inconclusive | Failed | Error) bad "its analysis ended: $found" ;; esac
            [ "$minutes" -gt 0 ] || break
            sleep "${EVERY_S:-60}"
            minutes=$((minutes - 1))
        done
        [ -n "$run" ] || bad "no analysis runs beside it: it was not judged"
        report=$(kubectl --namespace "$space" get analysisrun "$run" --output json)
        silent=$(printf '%s\n' "$report" | jq -r '[.spec.metrics[].name] - [.status.metricResults[]? | select((.successful // 0) > 0) | .name] | join(", ")')
        [ -z "$silent" ] || bad "it was not judged: in all this time there was no figure for $silent"
        kubectl --namespace "$space" get analysisrun --output wide ;;
    promote)
        now=$(phase)
        case $now in
            Healthy) echo "$name: it reads all films already." ;;
            Degraded) bad "it went wrong and is not promoted" ;;
            *) status '{"status": {"pauseConditions": null, "promoteFull": true}}' ;;
        esac ;;
    abort) status '{"status": {"abort": true}}' ;;
    *) echo "rollout.sh wait|watch|promote|finish|abort [NAMESPACE] [NAME]" >&2; exit 2 ;;
esac
