{{/* What jobs and engines share: they are made by the servers, from the ConfigMap of templates. (dict root kind own component) */}}

{{/* The servers put each workload's own name in. helm.sh/chart is left out: an upgrade of the chart is no change of a running job. */}}
{{- define "fabrictune.template.metadata" -}}
{{- $standard := dict "app.kubernetes.io/version" .root.Chart.AppVersion "app.kubernetes.io/managed-by" "fabrictune" "fabrictune.dev/kind" .kind }}
{{- $selector := include "fabrictune.selector" . | fromYaml }}
{{- with .own.kueueQueue }}{{ $_ := set $standard "kueue.x-k8s.io/queue-name" . }}{{ end -}}
name: {{ .kind }}
labels: {{- include "fabrictune.merge" (list .root.Values.commonLabels .own.labels $selector $standard) | nindent 2 }}
annotations: {{- include "fabrictune.merge" (list .root.Values.commonAnnotations .own.annotations (dict "fabrictune.dev/gpu-resource" .own.gpuResource)) | nindent 2 }}
{{- end }}

{{- define "fabrictune.work.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if .own.sharedMemory }}
- {name: shared-memory, mountPath: /dev/shm}
{{- end }}
{{- if and (eq .kind "evaluation") (ne .root.Values.tls.mode "off") }}
- {name: tls, mountPath: /etc/fabrictune/tls, readOnly: true}
{{- end }}
{{- if .root.Values.objectStore.caSecret }}
- {name: store-ca, mountPath: /etc/fabrictune/store, readOnly: true}
{{- end }}
{{- with .own.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fabrictune.work.volumes" -}}
- {name: tmp, emptyDir: {}}
{{- with .own.sharedMemory }}
- {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ . }}}}
{{- end }}
{{- if and (eq .kind "evaluation") (ne .root.Values.tls.mode "off") }}
- {name: tls, secret: {secretName: {{ include "fabrictune.tlsSecret" .root }}, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}
{{- with .root.Values.objectStore.caSecret }}
- {name: store-ca, secret: {secretName: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}
{{- with .own.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
