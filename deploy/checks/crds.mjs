// Validate what is no part of Kubernetes itself: a JSON list of manifests on stdin, one line of JSON a manifest that is of a known kind.
import * as argo from "@kubernetes-models/argo-rollouts/argoproj.io/v1alpha1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as gateway from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const known = { "argoproj.io/v1alpha1": argo, "keda.sh/v1alpha1": keda, "monitoring.coreos.com/v1": prometheus, "gateway.networking.k8s.io/v1": gateway };
let text = "";
for await (const part of process.stdin) text += part;
for (const { apiVersion, kind, ...rest } of JSON.parse(text)) {
    const Model = known[apiVersion]?.[kind];
    if (!Model) continue;
    let problem = "";
    try { new Model(rest).validate(); } catch (e) { problem = e.message; }
    console.log(JSON.stringify({ kind, name: rest.metadata?.name, problem }));
}
