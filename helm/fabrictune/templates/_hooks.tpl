{{/* Short pods of the pipeline's image, before an install or upgrade (bootstrap) and after an uninstall. Their
     ServiceAccount, Role and RoleBinding are hooks too, and go with them. */}}

{{/* (dict root suffix component hook) → metadata with the annotations `hook` */}}
{{- define "fabrictune.hook.metadata" -}}
{{- include "fabrictune.metadata" (merge (dict "own" .root.Values.hooks "annotations" .hook) .) }}
{{- end }}

{{/* (dict root weight) → metadata of what runs before an install or upgrade, and goes with its success */}}
{{- define "fabrictune.bootstrap.metadata" -}}
{{- $hook := dict "helm.sh/hook" "pre-install,pre-upgrade" "helm.sh/hook-weight" .weight "helm.sh/hook-delete-policy" "before-hook-creation,hook-succeeded" }}
{{- include "fabrictune.hook.metadata" (dict "root" .root "component" "hooks" "suffix" "bootstrap" "hook" $hook) }}
{{- end }}

{{/* (dict root weight) → metadata of what runs after an uninstall, and goes with its success */}}
{{- define "fabrictune.uninstall.metadata" -}}
{{- $hook := dict "helm.sh/hook" "post-delete" "helm.sh/hook-weight" .weight "helm.sh/hook-delete-policy" "before-hook-creation,hook-succeeded" }}
{{- include "fabrictune.hook.metadata" (dict "root" .root "component" "hooks" "suffix" "uninstall" "hook" $hook) }}
{{- end }}

{{/* (dict root name env) → spec of a hook's Job; name is that of its ServiceAccount */}}
{{- define "fabrictune.hook.job" -}}
{{- $part := dict "root" .root "own" .root.Values.hooks "component" "hooks" "env" .env -}}
backoffLimit: 5
ttlSecondsAfterFinished: 3600
activeDeadlineSeconds: 300
template:
  metadata: {{- include "fabrictune.podMetadata" $part | nindent 4 }}
  spec:
    restartPolicy: Never
    serviceAccountName: {{ .name }}
    automountServiceAccountToken: true
    {{- include "fabrictune.pod" (merge (dict "selector" (include "fabrictune.selector" $part | fromYaml)) $part) | nindent 4 }}
    containers:
      - name: {{ .module }}
        image: {{ include "fabrictune.image" (dict "root" .root "image" .root.Values.services.pipeline.image) }}
        imagePullPolicy: {{ .root.Values.image.pullPolicy }}
        command: [python, -m, services.common.hooks.{{ .module }}]
        env: {{- include "fabrictune.env" $part | nindent 10 }}
        resources: {{- toYaml .root.Values.hooks.resources | nindent 10 }}
        securityContext: {{- include "fabrictune.securityContext" $part | nindent 10 }}
        terminationMessagePolicy: FallbackToLogsOnError
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          {{- with .root.Values.hooks.extraVolumeMounts }}{{ toYaml . | nindent 10 }}{{ end }}
    volumes:
      - {name: tmp, emptyDir: {}}
      {{- with .root.Values.hooks.extraVolumes }}{{ toYaml . | nindent 6 }}{{ end }}
{{- end }}

{{/* What services.common.hooks.bootstrap makes when it is absent, as JSON */}}
{{- define "fabrictune.bootstrap" -}}
{{- $store := .Values.objectStore -}}
{{- $hosts := concat .Values.tls.hosts (compact (list .Values.ingress.host .Values.gatewayApi.host)) | uniq -}}
{{ dict "tls" (eq .Values.tls.mode "generated") "auth" (eq .Values.auth.mode "generated")
    "store" (and (ne $store.mode "external") (not $store.existingSecret))
    "services" (keys .Values.services | sortAlpha) "hosts" $hosts | toJson }}
{{- end }}

{{/* The Secrets that it makes, as JSON: {"names": […]} */}}
{{- define "fabrictune.bootstrap.secrets" -}}
{{- $make := include "fabrictune.bootstrap" . | fromJson }}
{{- $names := list }}
{{- if $make.tls }}{{ $names = append $names "tls" }}{{ end }}
{{- if $make.auth }}{{ $names = concat $names (list "tokens" "token-admin" "token-services") }}{{ end }}
{{- if $make.store }}{{ $names = append $names "store" }}{{ end }}
{{- $full := list }}{{ range $names }}{{ $full = append $full (printf "%s-%s" (include "fabrictune.fullname" $) .) }}{{ end -}}
{{ dict "names" $full | toJson }}
{{- end }}
