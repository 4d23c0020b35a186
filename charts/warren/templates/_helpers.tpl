{{- define "warren.node" -}}{{ if .Values.compat.istioNames }}ztunnel{{ else }}warren-node{{ end }}{{- end }}
{{- define "warren.control" -}}{{ if .Values.compat.istioNames }}istiod{{ else }}warren-control{{ end }}{{ include "warren.suffix" . }}{{- end }}
{{- /* What the names of a second control plane's objects end in; empty for that which the agents ask, whose release has the rest of the mesh. */ -}}
{{- define "warren.suffix" -}}{{ if ne .Values.revision "default" }}-{{ .Values.revision }}{{ end }}{{- end }}
{{- define "warren.mesh" -}}{{ if eq .Values.revision "default" }}true{{ end }}{{- end }}
{{- define "warren.image" -}}
{{ .root.Values.image.registry }}/{{ .name }}:{{ .tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- define "warren.labels" -}}
app.kubernetes.io/part-of: warren
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
{{- define "warren.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- define "warren.env" -}}
{{- range $k, $v := . }}
- name: {{ $k }}
  value: {{ $v | quote }}
{{- end }}
{{- end }}
{{- /* An affinity for all nodes but those with a label. */ -}}
{{- define "warren.affinityWithout" -}}
{{- $without := dict "key" .key "operator" "NotIn" "values" (list .value) }}
{{- $node := .affinity.nodeAffinity | default dict }}
{{- $terms := list }}
{{- range (($node.requiredDuringSchedulingIgnoredDuringExecution | default dict).nodeSelectorTerms | default (list dict)) }}
{{- $terms = append $terms (merge (dict "matchExpressions" (append (.matchExpressions | default list) $without)) .) }}
{{- end }}
{{- $required := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms) }}
{{- toYaml (merge (dict "nodeAffinity" (merge $required $node)) .affinity) }}
{{- end }}
