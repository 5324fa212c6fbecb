{{/* What every pod has. own: the values of its part. */}}

{{/* (dict root own [tolerations]) → fields of a PodSpec */}}
{{- define "fabrictune.pod" -}}
{{- $pods := .root.Values.pods -}}
enableServiceLinks: false
securityContext: {{- include "fabrictune.merge" (list $pods.podSecurityContext .own.podSecurityContext) | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "fabrictune.merge" (list $pods.nodeSelector .own.nodeSelector) | fromYaml }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat $pods.tolerations .own.tolerations (.tolerations | default list) }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .own.affinity | default $pods.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $selected := dict "labelSelector" (dict "matchLabels" .selector) }}
{{- $spread := list }}
{{- range .own.topologySpreadConstraints }}{{ $spread = append $spread (include "fabrictune.merge" (list $selected .) | fromYaml) }}{{ end }}
{{- with $spread }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .own.priorityClassName | default $pods.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{/* (dict root own) → the securityContext of a container */}}
{{- define "fabrictune.securityContext" -}}
{{ include "fabrictune.merge" (list .root.Values.pods.securityContext .own.securityContext) }}
{{- end }}

{{/* (dict root own env) → EnvVars: the chart's (YAML), those of all pods, the part's own. Of two with one name the later
     stays: a server-side apply refuses both. */}}
{{- define "fabrictune.env" -}}
{{- $all := concat (.env | default "[]" | fromYamlArray) .root.Values.pods.env .own.env }}
{{- $last := dict }}{{ range $i, $each := $all }}{{ $_ := set $last $each.name $i }}{{ end }}
{{- $kept := list }}{{ range $i, $each := $all }}{{ if eq $i (get $last $each.name) }}{{ $kept = append $kept $each }}{{ end }}{{ end -}}
{{ toYaml $kept }}
{{- end }}

{{/* (dict own) → resources, with ephemeral storage when it is asked for */}}
{{- define "fabrictune.resources" -}}
{{- $requests := .own.resources.requests | default dict }}
{{- with .own.ephemeralStorage }}{{ $requests = fromYaml (include "fabrictune.merge" (list $requests (dict "ephemeral-storage" .))) }}{{ end -}}
{{ include "fabrictune.merge" (list .own.resources (ternary (dict "requests" $requests) dict (not (empty $requests)))) }}
{{- end }}

{{/* seconds → tolerations: a pod on a node that went silent is given up after them */}}
{{- define "fabrictune.nodeLost" -}}
{{- range list "not-ready" "unreachable" }}
- {key: node.kubernetes.io/{{ . }}, operator: Exists, effect: NoExecute, tolerationSeconds: {{ $ }}}
{{- end }}
{{- end }}
