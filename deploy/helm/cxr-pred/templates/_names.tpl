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
