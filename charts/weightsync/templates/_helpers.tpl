{{- define "weightsync.labels" -}}
app.kubernetes.io/name: weightsync-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "weightsync.selector" -}}
app.kubernetes.io/name: weightsync-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weightsync.name" -}}
{{ printf "%s-operator" .Release.Name | trunc 53 | trimSuffix "-" }}
{{- end }}

{{- /* The key that all passwords are derived from: made once, kept over upgrades. */ -}}
{{- define "weightsync.operatorKey" -}}
{{- $existing := lookup "v1" "Secret" .Release.Namespace (printf "%s-key" (include "weightsync.name" .)) -}}
{{- if $existing }}{{ index $existing.data "key" }}{{ else }}{{ randAlphaNum 64 | b64enc }}{{ end -}}
{{- end }}
