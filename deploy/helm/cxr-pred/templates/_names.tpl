{{- define "cxr.labels" -}}
app.kubernetes.io/name: cxr-pred
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "cxr.all" -}}
{{ include "cxr.labels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
cxr.environment: {{ .root.Values.environment }}
{{- end }}

{{- define "cxr.image" -}}
{{- $image := printf "%s/%s" .root.Values.image.registry .name -}}
{{- if .digest }}{{ $image }}@{{ .digest }}{{ else }}{{ $image }}:{{ .root.Values.image.tag }}{{ end }}
{{- end }}

{{- define "cxr.pod" -}}
automountServiceAccountToken: false
serviceAccountName: {{ .Release.Name }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "cxr.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 10001
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "cxr.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "cxr.labels" . | nindent 8 }}
{{- end }}

{{- /* what a program finds in its environment: the first of several dictionaries wins */ -}}
{{- define "cxr.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- /* settings that vit and page share */ -}}
{{- define "cxr.settings" -}}
CXR_WORKERS: {{ .Values.service.workers | quote }}
CXR_THREADS: {{ .Values.service.threads | quote }}
CXR_MAX_UPLOAD_MB: {{ .Values.service.maxUploadMb | quote }}
CXR_LLM_TIMEOUT_S: {{ .Values.service.llmTimeoutS | quote }}
{{- if .Values.llm.enabled }}
CXR_LLM_URL: http://{{ .Release.Name }}-llm:8001
{{- end }}
{{- if .Values.gateway.enabled }}
# whose word on the client's address and on https is believed
FORWARDED_ALLOW_IPS: {{ .Values.gateway.pods | quote }}
{{- end }}
{{- end }}

{{- /* the image's entrypoint makes CXR_DATABASE_URL of the file cxr_database_url, and so on */ -}}
{{- define "cxr.mounts" -}}
- {name: state, mountPath: /var/lib/cxr}
- {name: tmp, mountPath: /tmp}
- {name: secrets, mountPath: /run/secrets, readOnly: true}
{{- if .Values.secrets.files }}
- {name: files, mountPath: /etc/cxr, readOnly: true}
{{- end }}
{{- end }}

{{- define "cxr.volumes" -}}
- name: state
  persistentVolumeClaim: {claimName: {{ .root.Release.Name }}-vit}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 256Mi}
- name: secrets
  secret:
    secretName: {{ .root.Values.secrets.service }}
    defaultMode: 0440
    items:
      {{- range .keys }}
      - {key: {{ . }}, path: cxr_{{ . | replace "-" "_" }}}
      {{- end }}
      {{- range $file, $key := .root.Values.secrets.more }}
      - {key: {{ $key }}, path: {{ $file }}}
      {{- end }}
{{- with .root.Values.secrets.files }}
- name: files
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "cxr.probes" -}}
startupProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  timeoutSeconds: 3
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 3
  failureThreshold: 6
{{- end }}

{{- /* a network policy's way out: names, the database, and what network.egress lists */ -}}
{{- define "cxr.dns" -}}
- to:
    - namespaceSelector:
        matchLabels: {kubernetes.io/metadata.name: kube-system}
      podSelector:
        matchLabels: {k8s-app: kube-dns}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{- define "cxr.listed" -}}
{{- range . }}
- to:
    - ipBlock: {cidr: {{ .cidr }}}
  ports:
    {{- range .ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end }}

{{- define "cxr.out" -}}
{{ include "cxr.dns" . }}
- to:
    - ipBlock: {cidr: {{ .Values.network.database.cidr }}}
  ports:
    - {port: {{ .Values.network.database.port }}, protocol: TCP}
{{- include "cxr.listed" .Values.network.egress }}
{{- end }}
