{{/* A serving revision: `prepare` brings the model and computes its reference, then vLLM serves it. (root) */}}
{{- define "fabrictune.engine" -}}
{{- $own := .Values.engine }}
{{- $part := dict "root" . "kind" "engine" "own" $own "component" "engine" -}}
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  replicas: 1
  strategy: {type: Recreate}
  progressDeadlineSeconds: {{ int $own.progressDeadlineSeconds }}
  selector:
    matchLabels: {fabrictune.dev/name: engine}
  template:
    metadata: {{- include "fabrictune.podMetadata" (merge (dict "labels" (dict "fabrictune.dev/kind" "engine" "fabrictune.dev/name" "engine")) $part) | nindent 6 }}
    spec:
      serviceAccountName: {{ include "fabrictune.serviceAccount" $part }}
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: {{ int $own.terminationGracePeriodSeconds }}
      {{- $lost := include "fabrictune.nodeLost" (int $own.nodeLostSeconds) | fromYamlArray }}
      {{- include "fabrictune.pod" (merge (dict "tolerations" $lost "selector" (include "fabrictune.selector" $part | fromYaml)) $part) | nindent 6 }}
      initContainers:
        - name: prepare
          {{- include "fabrictune.engine.container" (merge (dict "env" (include "fabrictune.env.store" .) "command" (list "python" "-m" "services.inference.prepare")) $part) | nindent 10 }}
      containers:
        - name: engine
          {{- include "fabrictune.engine.container" (merge (dict "command" (list "python" "-m" "vllm.entrypoints.openai.api_server")) $part) | nindent 10 }}
          {{- with $own.args }}
          args: {{- toYaml . | nindent 12 }}
          {{- end }}
          ports:
            - {name: http, containerPort: 8000}
          startupProbe: {httpGet: {path: /v1/models, port: http}, periodSeconds: 2, timeoutSeconds: 5, failureThreshold: {{ div (int $own.startSeconds) 2 }}}
          readinessProbe: {httpGet: {path: /health, port: http}, periodSeconds: 5, timeoutSeconds: 5}
        {{- /* Gives the engine its adapters, also while it runs. An engine that has no room for any comes without it. */}}
        - name: adapters
          {{- $beside := merge (dict "own" (set (omit $own "ephemeralStorage") "resources" $own.adapters.resources)) (omit $part "own") }}
          {{- include "fabrictune.engine.container" (merge (dict "env" (include "fabrictune.env.store" .) "command" (list "python" "-m" "services.inference.follow")) $beside) | nindent 10 }}
          readinessProbe: {exec: {command: [test, -f, /tmp/adapters-are-there]}, periodSeconds: 2}
      volumes:
        - name: models
          {{- toYaml ($own.modelsVolume | default (dict "emptyDir" dict)) | nindent 10 }}
        {{- include "fabrictune.work.volumes" $part | nindent 8 }}
{{- end }}

{{- define "fabrictune.engine.container" -}}
image: {{ include "fabrictune.image" (dict "root" .root "image" .own.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: {{- toYaml .command | nindent 2 }}
{{- with include "fabrictune.env" . | fromYamlArray }}
env: {{- toYaml . | nindent 2 }}
{{- end }}
resources: {{- include "fabrictune.resources" . | nindent 2 }}
securityContext: {{- include "fabrictune.securityContext" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - {name: models, mountPath: /models}
  {{- include "fabrictune.work.mounts" . | nindent 2 }}
{{- end }}

{{- define "fabrictune.engine.service" -}}
{{- $part := dict "root" . "kind" "engine" "own" .Values.engine "component" "engine" -}}
apiVersion: v1
kind: Service
metadata: {{- include "fabrictune.template.metadata" $part | nindent 2 }}
spec:
  selector: {fabrictune.dev/name: engine}
  ports:
    - {name: http, port: 8000, targetPort: http}
{{- end }}
