#!/bin/sh
# The gate on GPU memory: over 80 per cent, one more replica of the language service. gpu_memory.sh PROMETHEUS [NAMESPACE] [RELEASE]
# Exit 4: it is over, and there are as many replicas as there may be.
set -eu
prometheus=$1 space=${2:-cxr} release=${3:-cxr}
query="100 * max(DCGM_FI_DEV_FB_USED{exported_namespace=\"$space\"} / (DCGM_FI_DEV_FB_USED{exported_namespace=\"$space\"} + DCGM_FI_DEV_FB_FREE{exported_namespace=\"$space\"}))"
# a Prometheus that does not answer is an error, and not a GPU that reports nothing
answer=$(curl --fail --silent --show-error --max-time 20 --get --data-urlencode "query=$query" "$prometheus/api/v1/query")
used=$(printf '%s\n' "$answer" | jq -r '.data.result[0].value[1] // empty')
[ -n "$used" ] || { echo "GPU memory: not measured. No GPU reports it, so this gate judged nothing."; exit 0; }
echo "GPU memory: $used per cent"
# whole numbers are enough
[ "${used%.*}" -ge 80 ] || exit 0
of() { kubectl --namespace "$space" get scaledobject "$release-llm" --output "jsonpath={.spec.$1}"; }
least=$(of minReplicaCount) most=$(of maxReplicaCount)
least=${least:-0} most=${most:-100} # KEDA's own, where nothing is said
if [ "$least" -ge "$most" ]; then
    echo "$release-llm has $least replicas at least and may have $most: no room for one more. Raise llm.autoscale.max, or give it GPUs with more memory." >&2
    exit 4
fi
kubectl --namespace "$space" patch scaledobject "$release-llm" --type merge --patch "{\"spec\": {\"minReplicaCount\": $((least + 1))}}"
