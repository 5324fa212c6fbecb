{{/* Parts of the NetworkPolicies. */}}

{{/* labels of all pods of the release, those that the servers make included */}}
{{- define "fabrictune.network.release" -}}
app.kubernetes.io/name: {{ include "fabrictune.name" . }}
app.kubernetes.io/instance: {{ include "fabrictune.fullname" . }}
{{- end }}

{{/* (dict root components) → a pod selector */}}
{{- define "fabrictune.network.components" -}}
matchLabels: {{- include "fabrictune.network.release" .root | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .components }}}
{{- end }}

{{/* (dict root name) → metadata of a policy */}}
{{- define "fabrictune.network.metadata" -}}
{{- include "fabrictune.metadata" (dict "root" .root "component" "network" "own" .root.Values.networkPolicy "suffix" .name) }}
{{- end }}

{{/* (list ports [protocol …]) → ports of a rule; TCP when no protocol is named */}}
{{- define "fabrictune.network.ports" -}}
{{- $ports := list }}
{{- range $protocol := rest . | default (list "TCP") }}
{{- range first $ }}{{ $ports = append $ports (dict "port" (int .) "protocol" $protocol) }}{{ end }}
{{- end -}}
{{ toYaml (uniq $ports) }}
{{- end }}

{{/* URL → the port that it is reached at */}}
{{- define "fabrictune.network.portOf" -}}
{{- $url := urlParse . -}}
{{ regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}
