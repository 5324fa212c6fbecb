{{/* What scales a serving revision: a HorizontalPodAutoscaler or KEDA's ScaledObject, by engine.autoscaling.mode. (root) */}}
{{- define "fabrictune.engine.autoscaler" -}}
{{- $part := dict "root" . "kind" "engine" "own" .Values.engine "component" "engine" -}}
{{- with .Values.engine.autoscaling }}
{{- if eq .mode "hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: engine}
  minReplicas: {{ int .minReplicas }}
  maxReplicas: {{ int .maxReplicas }}
  metrics: {{- toYaml .hpa.metrics | nindent 4 }}
  {{- with .hpa.behavior }}
  behavior: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if eq .mode "keda" -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  scaleTargetRef: {name: engine}
  minReplicaCount: {{ int .minReplicas }}
  maxReplicaCount: {{ int .maxReplicas }}
  pollingInterval: {{ int .keda.pollingInterval }}
  cooldownPeriod: {{ int .keda.cooldownPeriod }}
  {{- /* Nobody asks for a new engine before it is ready; KEDA would put it to sleep before it has ever been. */}}
  initialCooldownPeriod: {{ int $part.own.progressDeadlineSeconds }}
  triggers: {{- toYaml .keda.triggers | nindent 4 }}
  {{- with .keda.advanced }}
  advanced: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
