{{/* Names, labels, images. app.kubernetes.io/instance is the full name, since servers find their own Jobs by it. */}}

{{- define "fabrictune.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "fabrictune.fullname" -}}
{{- $name := include "fabrictune.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{ .Values.fullnameOverride | default $full | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* (dict root component) → what pods are found by */}}
{{- define "fabrictune.selector" -}}
app.kubernetes.io/name: {{ include "fabrictune.name" .root }}
app.kubernetes.io/instance: {{ include "fabrictune.fullname" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* (list map …) → one map as YAML; later maps win, key by key. sprig's merge cannot set false or 0. */}}
{{- define "fabrictune.merge" -}}
{{- $all := dict }}
{{- range . }}{{ range $key, $value := . }}{{ $_ := set $all $key $value }}{{ end }}{{ end -}}
{{ toYaml $all }}
{{- end }}

{{/* (dict root component [own] [annotations] [suffix] [name]) → metadata of an object of the release. own has labels and
     annotations. It is called {fullname}-{suffix}; the suffix is the component unless another or none is given. */}}
{{- define "fabrictune.metadata" -}}
{{- $own := .own | default dict -}}
{{- $suffix := ternary .suffix .component (hasKey . "suffix") -}}
name: {{ .name | default (printf "%s-%s" (include "fabrictune.fullname" .root) $suffix | trimSuffix "-") }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- $selector := include "fabrictune.selector" . | fromYaml }}
  {{- $standard := dict "app.kubernetes.io/version" .root.Chart.AppVersion "app.kubernetes.io/managed-by" .root.Release.Service
      "helm.sh/chart" (printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_")) }}
  {{- include "fabrictune.merge" (list .root.Values.commonLabels $own.labels $selector $standard) | nindent 2 }}
{{- with include "fabrictune.merge" (list .root.Values.commonAnnotations $own.annotations .annotations) | fromYaml }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (dict root component own [labels] [annotations]) → metadata of a pod template */}}
{{- define "fabrictune.podMetadata" -}}
{{- $pods := .root.Values.pods -}}
labels:
  {{- $selector := include "fabrictune.selector" . | fromYaml }}
  {{- include "fabrictune.merge" (list .root.Values.commonLabels $pods.labels .own.podLabels .labels $selector) | nindent 2 }}
{{- with include "fabrictune.merge" (list .root.Values.commonAnnotations $pods.annotations .own.podAnnotations .annotations) | fromYaml }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (dict root image [home]) → registry/repository:tag@digest; home is the registry of an image that is not ours */}}
{{- define "fabrictune.image" -}}
{{- $registry := .image.registry | default .root.Values.image.registry | default .home -}}
{{- $tag := .image.tag | default .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{ with $registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image.repository }}:{{ $tag }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* (dict root own component) → the ServiceAccount that the pods of a part use */}}
{{- define "fabrictune.serviceAccount" -}}
{{ .own.serviceAccount.name | default (printf "%s-%s" (include "fabrictune.fullname" .root) .component) }}
{{- end }}

{{/* (dict root name [port]) → host:port of a server inside the cluster */}}
{{- define "fabrictune.address" -}}
{{ include "fabrictune.fullname" .root }}-{{ .name }}.{{ .root.Release.Namespace }}.svc:{{ .port | default 8470 }}
{{- end }}

{{/* What proxies are told of a gRPC port. */}}
{{- define "fabrictune.grpcProtocol" -}}
{{ ternary "kubernetes.io/h2c" "https" (eq .Values.tls.mode "off") }}
{{- end }}
