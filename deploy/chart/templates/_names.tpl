{{- define "quotum.name" -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- end -}}

{{- define "quotum.labels" -}}
app.kubernetes.io/name: quotum
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What tells the pods of this fleet from all others. */}}
{{- define "quotum.selector" -}}
{{- if .Values.embedded.enabled -}}
{{- toYaml .Values.embedded.podLabels -}}
{{- else -}}
{{- include "quotum.labels" . -}}
{{- end -}}
{{- end -}}

{{- define "quotum.secret.gossip" -}}
{{- .Values.gossip.existingSecret | default (printf "%s-gossip" (include "quotum.name" .)) -}}
{{- end -}}
{{- define "quotum.secret.proxy" -}}
{{- .Values.proxy.existingSecret | default (printf "%s-proxy" (include "quotum.name" .)) -}}
{{- end -}}
{{- define "quotum.secret.upstream" -}}
{{- .Values.upstream.existingSecret | default (printf "%s-upstream" (include "quotum.name" .)) -}}
{{- end -}}

{{/* Where the pods are listed. */}}
{{- define "quotum.seeds" -}}
{{ include "quotum.name" . }}-headless:7946
{{- end -}}
