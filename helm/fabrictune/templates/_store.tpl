{{/* What the two S3 servers differ in: image, arguments, keys, probes. (dict root own) */}}

{{- define "fabrictune.store.minio" -}}
image: {{ include "fabrictune.image" (dict "root" .root "image" .own.minio.image "home" "quay.io") }}
args: {{- concat (list "server" "/data" "--console-address" ":9001") .own.minio.args | toYaml | nindent 2 }}
{{- $keys := include "fabrictune.store.keys" (dict "root" .root "user" "MINIO_ROOT_USER" "password" "MINIO_ROOT_PASSWORD") }}
env: {{- include "fabrictune.env" (merge (dict "env" $keys) .) | nindent 2 }}
livenessProbe: {httpGet: {path: /minio/health/live, port: s3}, periodSeconds: 10, timeoutSeconds: 5}
readinessProbe: {httpGet: {path: /minio/health/ready, port: s3}, periodSeconds: 5, timeoutSeconds: 5}
{{- end }}

{{/* Its parts talk to each other by loopback, since they ask for no key; only S3 listens to others. */}}
{{- define "fabrictune.store.seaweedfs" -}}
image: {{ include "fabrictune.image" (dict "root" .root "image" .own.seaweedfs.image "home" "docker.io") }}
command: [weed]
args: {{- concat (list "server" "-dir=/data" "-ip=127.0.0.1" "-ip.bind=127.0.0.1" "-volume.max=0" "-master.telemetry=false" "-filer" "-s3"
    "-s3.ip.bind=0.0.0.0" "-s3.port=9000" "-s3.port.iceberg=0" "-s3.port.lance=0") .own.seaweedfs.args | toYaml | nindent 2 }}
{{- $keys := include "fabrictune.store.keys" (dict "root" .root "user" "AWS_ACCESS_KEY_ID" "password" "AWS_SECRET_ACCESS_KEY") }}
env: {{- include "fabrictune.env" (merge (dict "env" $keys) .) | nindent 2 }}
livenessProbe: {httpGet: {path: /healthz, port: s3}, initialDelaySeconds: 10, periodSeconds: 10, timeoutSeconds: 5}
readinessProbe: {httpGet: {path: /healthz, port: s3}, periodSeconds: 5, timeoutSeconds: 5}
{{- end }}

{{- define "fabrictune.store.keys" -}}
{{- $secret := include "fabrictune.storeSecret" .root -}}
- {name: HOME, value: /tmp}
- {name: {{ .user }}, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: access-key}}}
- {name: {{ .password }}, valueFrom: {secretKeyRef: {name: {{ $secret }}, key: secret-key}}}
{{- end }}

{{- define "fabrictune.store.volumes" -}}
- {name: tmp, emptyDir: {}}
{{- if not .persistence.enabled }}
- {name: data, emptyDir: {}}
{{- else if .persistence.existingClaim }}
- {name: data, persistentVolumeClaim: {claimName: {{ .persistence.existingClaim }}}}
{{- end }}
{{- with .extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
