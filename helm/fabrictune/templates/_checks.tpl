{{/* What a JSON schema cannot compare. Prints nothing. */}}
{{- define "fabrictune.check" -}}
{{- with .Values.engine.autoscaling }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "engine.autoscaling.minReplicas (%d) is larger than engine.autoscaling.maxReplicas (%d)" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- end }}
