{{/* Where calls from outside go: {"routes": [{path, service, port}]}, the longest path first. gRPC's paths are its services. */}}
{{- define "fabrictune.grpcRoutes" -}}
{{- $fullname := include "fabrictune.fullname" . }}
{{- $routes := list }}
{{- range $name, $_ := .Values.services }}
{{- $routes = append $routes (dict "path" (printf "/fabrictune.v1.%sService" (title $name)) "service" (printf "%s-%s" $fullname $name) "port" 8470) }}
{{- end -}}
{{ dict "routes" (append $routes (dict "path" "/" "service" $fullname "port" 8470)) | toJson }}
{{- end }}
