{{/* The parts of a server's Deployment. (dict root service own) */}}

{{- define "fabrictune.server.env" -}}
{{- $fullname := include "fabrictune.fullname" .root -}}
- {name: FABRICTUNE_CLUSTER, value: kubernetes}
- {name: FABRICTUNE_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: FABRICTUNE_RELEASE, value: {{ $fullname }}}
- {name: FABRICTUNE_TEMPLATES, value: /etc/fabrictune/templates}
- {name: FABRICTUNE_HOST, value: 0.0.0.0}
- {name: FABRICTUNE_LOG_FORMAT, value: json}
- {name: FABRICTUNE_DATA_DIR, value: /var/lib/fabrictune}
{{- /* The grace period without the pause before SIGTERM, and without 5 s to end in. */}}
- {name: FABRICTUNE_DRAIN_SECONDS, value: {{ sub (int (index .root.Values.services .service).terminationGracePeriodSeconds) 10 | quote }}}
{{ include "fabrictune.env.store" .root }}
{{- include "fabrictune.env.guard" .root }}
{{- if has .service (list "pipeline" "inference") }}
- {name: FABRICTUNE_GATEWAY_URL, value: {{ include (ternary "fabrictune.publicGateway" "fabrictune.gateway" (eq .service "inference")) .root | quote }}}
{{- include "fabrictune.env.caller" .root }}
{{- end }}
{{- if eq .service "pipeline" }}
{{ include "fabrictune.env.endpoints" .root }}
{{- end }}
{{- if eq .service "inference" }}
- {name: FABRICTUNE_OWNER, value: {{ $fullname }}-inference}
{{ include "fabrictune.env.engineHardware" .root }}
- {name: FABRICTUNE_ENGINE_GRACE_SECONDS, value: {{ .root.Values.engine.terminationGracePeriodSeconds | quote }}}
- {name: FABRICTUNE_ENGINE_START_SECONDS, value: {{ .root.Values.engine.startSeconds | quote }}}
{{- end }}
{{- end }}

{{/* Templates, tokens and certificates are read anew when they change; a subPath would hide the change. */}}
{{- define "fabrictune.server.mounts" -}}
- {name: data, mountPath: /var/lib/fabrictune}
- {name: tmp, mountPath: /tmp}
- {name: templates, mountPath: /etc/fabrictune/templates, readOnly: true}
{{- if ne .root.Values.tls.mode "off" }}
- {name: tls, mountPath: /etc/fabrictune/tls, readOnly: true}
{{- end }}
{{- if ne .root.Values.auth.mode "off" }}
- {name: tokens, mountPath: /etc/fabrictune/tokens, readOnly: true}
{{- end }}
{{- if .root.Values.objectStore.caSecret }}
- {name: store-ca, mountPath: /etc/fabrictune/store, readOnly: true}
{{- end }}
{{- with .own.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fabrictune.server.volumes" -}}
- {name: data, emptyDir: {}}
- {name: tmp, emptyDir: {}}
- {name: templates, configMap: {name: {{ include "fabrictune.fullname" .root }}-templates}}
{{- if ne .root.Values.tls.mode "off" }}
- {name: tls, secret: {secretName: {{ include "fabrictune.tlsSecret" .root }}}}
{{- end }}
{{- if ne .root.Values.auth.mode "off" }}
- {name: tokens, secret: {secretName: {{ .root.Values.auth.existingSecret | default (printf "%s-tokens" (include "fabrictune.fullname" .root)) }}, items: [{key: tokens.yaml, path: tokens.yaml}]}}
{{- end }}
{{- with .root.Values.objectStore.caSecret }}
- {name: store-ca, secret: {secretName: {{ . }}, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}
{{- with .own.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fabrictune.tlsSecret" -}}
{{ .Values.tls.existingSecret | default (printf "%s-tls" (include "fabrictune.fullname" .)) }}
{{- end }}

{{/* (dict root service) → what the server makes Jobs or engines from */}}
{{- define "fabrictune.server.template" -}}
{{- if eq .service "inference" -}}
{{ include "fabrictune.engine" .root }}
{{- else if ne .service "pipeline" -}}
{{ include "fabrictune.job" (dict "root" .root "kind" .service) }}
{{- end }}
{{- end }}
