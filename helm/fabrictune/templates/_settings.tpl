{{/* FABRICTUNE_… of servers and workers: services/common/config.py is their manual. */}}

{{/* The Secret with the store's keys; empty: workload identity */}}
{{- define "fabrictune.storeSecret" -}}
{{- $store := .Values.objectStore -}}
{{- $ours := ternary "" (printf "%s-store" (include "fabrictune.fullname" .)) (eq $store.mode "external") -}}
{{ $store.existingSecret | default $ours }}
{{- end }}

{{- define "fabrictune.env.store" -}}
{{- $store := .Values.objectStore -}}
{{- $ours := printf "http://%s" (include "fabrictune.address" (dict "root" . "name" "store" "port" 9000)) -}}
- {name: FABRICTUNE_S3_ENDPOINT, value: {{ $store.endpoint | default $ours | quote }}}
- {name: FABRICTUNE_S3_BUCKET, value: {{ $store.bucket | quote }}}
- {name: FABRICTUNE_S3_REGION, value: {{ $store.region | quote }}}
- {name: FABRICTUNE_S3_PATH_STYLE, value: {{ $store.pathStyle | quote }}}
{{- with include "fabrictune.storeSecret" . }}
- {name: FABRICTUNE_S3_ACCESS_KEY, valueFrom: {secretKeyRef: {name: {{ . }}, key: access-key}}}
- {name: FABRICTUNE_S3_SECRET_KEY, valueFrom: {secretKeyRef: {name: {{ . }}, key: secret-key}}}
{{- end }}
{{- if $store.caSecret }}
- {name: FABRICTUNE_S3_CA_FILE, value: /etc/fabrictune/store/ca.crt}
{{- end }}
{{- end }}

{{/* Where a caller within the cluster reaches the gateway */}}
{{- define "fabrictune.gateway" -}}
{{ ternary "http" "https" (eq .Values.tls.mode "off") }}://{{ include "fabrictune.address" (dict "root" . "name" "inference" "port" 8480) }}
{{- end }}

{{/* Where people reach it: they are outside */}}
{{- define "fabrictune.publicGateway" -}}
{{- if .Values.ingress.enabled }}https://{{ .Values.ingress.host }}
{{- else if .Values.gatewayApi.enabled }}https://{{ .Values.gatewayApi.host }}
{{- else }}{{ include "fabrictune.gateway" . }}
{{- end }}
{{- end }}

{{/* What a caller of our servers needs besides the gateway's address: a token, the authority */}}
{{- define "fabrictune.env.caller" -}}
{{- if ne .Values.auth.mode "off" }}
- {name: FABRICTUNE_TOKEN, valueFrom: {secretKeyRef: {name: {{ .Values.auth.existingSecret | default (printf "%s-token-services" (include "fabrictune.fullname" .)) }}, key: token}}}
{{- end }}
{{- if ne .Values.tls.mode "off" }}
- {name: FABRICTUNE_CA_FILE, value: /etc/fabrictune/tls/ca.crt}
{{- end }}
{{- end }}

{{- define "fabrictune.env.endpoints" -}}
{{- $to := dict }}
{{- range $name, $_ := omit .Values.services "pipeline" }}{{ $_ := set $to $name (include "fabrictune.address" (dict "root" $ "name" $name)) }}{{ end -}}
- {name: FABRICTUNE_ENDPOINTS, value: {{ toJson $to | quote }}}
{{- end }}

{{/* TLS, tokens and JWTs of a server */}}
{{- define "fabrictune.env.guard" -}}
{{- if ne .Values.tls.mode "off" }}
- {name: FABRICTUNE_TLS_CERTIFICATE, value: /etc/fabrictune/tls/tls.crt}
- {name: FABRICTUNE_TLS_KEY, value: /etc/fabrictune/tls/tls.key}
{{- end }}
{{- if ne .Values.auth.mode "off" }}
- {name: FABRICTUNE_TOKENS_FILE, value: /etc/fabrictune/tokens/tokens.yaml}
{{- with .Values.auth.oidc }}
{{- if .issuer }}
- {name: FABRICTUNE_OIDC_ISSUER, value: {{ .issuer | quote }}}
- {name: FABRICTUNE_OIDC_AUDIENCE, value: {{ .audience | quote }}}
- {name: FABRICTUNE_OIDC_ROLES_CLAIM, value: {{ .rolesClaim | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- if or (eq .Values.tls.mode "off") (eq .Values.auth.mode "off") }}
- {name: FABRICTUNE_INSECURE, value: "true"}
{{- end }}
{{- end }}

{{- define "fabrictune.env.engineHardware" -}}
{{- with .Values.engine.hardware }}
{{- $found := dict "gpus" (int .gpus) "cores" (int .cores) "memory_bytes" (include "fabrictune.bytes" .memory | int64)
    "cpu_flags" (ternary (list "avx512_bf16") list .bfloat16) -}}
- {name: FABRICTUNE_ENGINE_HARDWARE, value: {{ toJson $found | quote }}}
{{- end }}
{{- end }}

{{/* A quantity → bytes: 8Gi → 8589934592. A plain number would be printed as 1e+09. */}}
{{- define "fabrictune.bytes" -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $text := ternary . (printf "%d" (int64 .)) (kindIs "string" .) -}}
{{ mulf (regexFind "^[0-9.]+" $text | float64) (get $units (regexFind "[A-Za-z]*$" $text)) | int64 }}
{{- end }}
