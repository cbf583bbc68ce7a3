#!/bin/sh
# The gate on GPU memory: over 80 per cent, one more replica of the language service. gpu_memory.sh PROMETHEUS [NAMESPACE] [RELEASE]
set -eu
prometheus=$1 space=${2:-cxr} release=${3:-cxr}
query="100 * max(DCGM_FI_DEV_FB_USED{exported_namespace=\"$space\"} / (DCGM_FI_DEV_FB_USED{exported_namespace=\"$space\"} + DCGM_FI_DEV_FB_FREE{exported_namespace=\"$space\"}))"
used=$(curl --fail --silent --show-error --max-time 20 --get --data-urlencode "query=$query" "$prometheus/api/v1/query" | jq -r '.data.result[0].value[1] // empty')
[ -n "$used" ] || { echo "No GPU reports its memory: nothing to judge."; exit 0; }
echo "GPU memory: $used per cent"
# whole numbers are enough
if [ "${used%.*}" -ge 80 ]; then
    least=$(kubectl --namespace "$space" get scaledobject "$release-llm" --output 'jsonpath={.spec.minReplicaCount}')
    kubectl --namespace "$space" patch scaledobject "$release-llm" --type merge --patch "{\"spec\": {\"minReplicaCount\": $((least + 1))}}"
fi
