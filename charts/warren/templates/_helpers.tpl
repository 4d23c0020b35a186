{{- define "warren.node" -}}{{ if .Values.compat.istioNames }}ztunnel{{ else }}warren-node{{ end }}{{- end }}
{{- define "warren.control" -}}{{ if .Values.compat.istioNames }}istiod{{ else }}warren-control{{ end }}{{ include "warren.suffix" . }}{{- end }}
{{- /* istio.io/rev of the control plane's objects. Beside an Istio it is not "default", which is that one's. */ -}}
{{- define "warren.revision" -}}
{{- if .Values.besideIstio.enabled -}}
{{- if ne .Values.revision "default" }}{{ fail (printf "revision %s: beside an Istio there is one control plane of Warren; leave revision at default, or besideIstio.enabled at false" .Values.revision) }}{{ end -}}
{{- if .Values.compat.istioNames }}{{ fail "compat.istioNames: those are the names of the Istio that besideIstio is about" }}{{ end -}}
warren
{{- else }}{{ .Values.revision }}{{ end }}
{{- end }}
{{- /* What the names of a control plane's objects end in that is beside another; empty for that which has the mesh for itself. */ -}}
{{- define "warren.suffix" -}}{{ if ne (include "warren.revision" .) "default" }}-{{ include "warren.revision" . }}{{ end }}{{- end }}
{{- /* Is this what there is once in a mesh: the root, the webhook? Beside an Istio that is Istio's. */ -}}
{{- define "warren.mesh" -}}{{ if eq (include "warren.revision" .) "default" }}true{{ end }}{{- end }}
{{- /* Is this the release that has the agents? */ -}}
{{- define "warren.agents" -}}{{ if or (include "warren.mesh" .) .Values.besideIstio.enabled }}true{{ end }}{{- end }}
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
{{- /* Beside an Istio: the nodes that were moved. warren migrate sets the label. */ -}}
{{- define "warren.moved" -}}
{{ if .Values.besideIstio.enabled }}[{key: warren.io/migration, operator: In, values: [warren]}]{{ else }}[]{{ end }}
{{- end }}
{{- /* An affinity, and of its nodes those alone that also match the expressions. */ -}}
{{- define "warren.affinityAnd" -}}
{{- $and := .and }}
{{- $node := .affinity.nodeAffinity | default dict }}
{{- $terms := list }}
{{- range (($node.requiredDuringSchedulingIgnoredDuringExecution | default dict).nodeSelectorTerms | default (list dict)) }}
{{- $terms = append $terms (merge (dict "matchExpressions" (concat (.matchExpressions | default list) $and)) .) }}
{{- end }}
{{- $required := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms) }}
{{- toYaml (merge (dict "nodeAffinity" (merge $required $node)) .affinity) }}
{{- end }}
