{{/* The Job of one kind of work: (dict root kind). The servers fill in name, command, env, GPUs, cpu and memory; all the
     rest is here. 64, 65, 66, 77 and 78 say that trying again is of no use; 143 that somebody stopped the pod. */}}
{{- define "fabrictune.job" -}}
{{- $job := index .root.Values.jobs .kind }}
{{- $part := dict "root" .root "kind" .kind "own" $job "component" (printf "%s-worker" .kind) -}}
apiVersion: batch/v1
kind: Job
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  {{- if $job.kueueQueue }}
  suspend: true
  {{- end }}
  backoffLimit: 2
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
      - {action: FailJob, onExitCodes: {containerName: worker, operator: In, values: [64, 65, 66, 77, 78]}}
      - {action: Ignore, onExitCodes: {containerName: worker, operator: In, values: [143]}}
  ttlSecondsAfterFinished: {{ int $job.ttlSecondsAfterFinished }}
  template:
    metadata: {{- include "fabrictune.podMetadata" (merge (dict "labels" (dict "fabrictune.dev/kind" .kind)) $part) | nindent 6 }}
    spec: {{- include "fabrictune.job.pod" $part | nindent 6 }}
{{- end }}

{{- define "fabrictune.job.pod" -}}
{{- $own := .own -}}
restartPolicy: Never
serviceAccountName: {{ include "fabrictune.serviceAccount" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ int $own.terminationGracePeriodSeconds }}
{{- $lost := include "fabrictune.nodeLost" (int $own.nodeLostSeconds) | fromYamlArray }}
{{ include "fabrictune.pod" (merge (dict "tolerations" $lost "selector" (include "fabrictune.selector" . | fromYaml)) .) }}
containers:
  - name: worker
    image: {{ include "fabrictune.image" (dict "root" .root "image" $own.image) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [python, -m, services.{{ .kind }}.worker]
    env: {{- include "fabrictune.env" (merge (dict "env" (include "fabrictune.job.env" .)) .) | nindent 6 }}
    resources: {{- include "fabrictune.resources" . | nindent 6 }}
    securityContext: {{- include "fabrictune.securityContext" . | nindent 6 }}
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts: {{- include "fabrictune.job.mounts" . | nindent 6 }}
volumes: {{- include "fabrictune.job.volumes" . | nindent 2 }}
{{- end }}

{{- define "fabrictune.job.env" -}}
- {name: FABRICTUNE_DATA_DIR, value: /var/lib/fabrictune}
{{ include "fabrictune.env.store" .root }}
{{- if eq .kind "evaluation" }}
- {name: FABRICTUNE_GATEWAY_URL, value: {{ include "fabrictune.gateway" .root | quote }}}
{{- include "fabrictune.env.caller" .root }}
{{- end }}
{{- if eq .kind "training" }}
- {name: FABRICTUNE_GRACE_SECONDS, value: {{ .own.terminationGracePeriodSeconds | quote }}}
{{- end }}
{{- end }}

{{- define "fabrictune.job.mounts" -}}
- {name: data, mountPath: /var/lib/fabrictune}
{{ include "fabrictune.work.mounts" . }}
{{- end }}

{{- define "fabrictune.job.volumes" -}}
- name: data
  {{- toYaml (.own.dataVolume | default (dict "emptyDir" dict)) | nindent 2 }}
{{ include "fabrictune.work.volumes" . }}
{{- end }}

{{/* Lets the workers of one job find each other before they are ready; used for jobs on several nodes only. */}}
{{- define "fabrictune.job.service" -}}
{{- $part := dict "root" .root "kind" .kind "own" (index .root.Values.jobs .kind) "component" (printf "%s-worker" .kind) -}}
apiVersion: v1
kind: Service
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {fabrictune.dev/name: {{ .kind }}}
  ports:
    - {name: rendezvous, port: 29500}
{{- end }}
