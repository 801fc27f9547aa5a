{{/* What Ray Serve runs: the ingresses, and behind them a controller with replicas for each model. */}}

{{/* Pods of all models when each has the fewest replicas. */}}
{{- define "quire.fewestPods" -}}
{{- $pods := 0 -}}
{{- range (include "quire.models" . | fromJson).models -}}
{{- $pods = add $pods (include "quire.minPods" .) -}}
{{- end -}}
{{- $pods -}}
{{- end -}}

{{/* Whether ingresses run on the head: only when there may be no worker that could hold one. */}}
{{- define "quire.headServes" -}}
{{- eq (include "quire.fewestPods" .) "0" -}}
{{- end -}}

{{/* Ray namespace of a model. */}}
{{- define "quire.namespace" -}}
quire-{{ .name }}
{{- end -}}

{{- define "quire.serveConfig" -}}
{{- $headServes := eq (include "quire.headServes" .) "true" -}}
{{- $pods := ternary "1" (include "quire.fewestPods" .) $headServes -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.serve.port }}
logging_config:
  encoding: JSON
  log_level: INFO
applications:
  - name: quire
    route_prefix: /
    import_path: quire.deploy.serve_app:build
    deployments:
      - name: Ingress
        num_replicas: {{ .Values.serve.ingressReplicas | default ($pods | int) }}
        max_replicas_per_node: 1
        ray_actor_options:
          num_cpus: {{ ternary 0 0.5 $headServes }}
          {{- if $headServes }}
          resources: {"node:__internal_head__": 0.001} # not on a worker that goes when nobody asks
          {{- end }}
        user_config:
          models:
            {{- range (include "quire.models" . | fromJson).models }}
            - {{ include "quire.modelArgs" (list $ .) | nindent 14 | trim }}
            {{- end }}
          {{- $options := .Values.serve.options }}
          {{- if not .Values.apiKeys.allowAnonymous }}
          {{- $options = merge (dict "api-key-file" (printf "/etc/quire/api-keys/%s" .Values.apiKeys.secretKey)) $options }}
          {{- end }}
          options:
            {{- toYaml $options | nindent 12 }}
{{- end -}}

{{/* A model as the application's arguments. Called with (list context, model). */}}
{{- define "quire.modelArgs" -}}
{{- $model := index . 1 -}}
name: {{ $model.name }}
options:
  model: {{ $model.model }}
  device: {{ $model.device }}
  tp: {{ $model.tp }}
  replicas: {{ $model.replicas }}
  {{- if $model.prefillReplicas }}
  prefill-replicas: {{ $model.prefillReplicas }}
  {{- end }}
  {{- if gt (int $model.podsPerReplica) 1 }}
  span-nodes: true
  {{- end }}
  node-label: [quire-model={{ $model.name }}]
  {{- with $model.autoscaling }}
  {{- if .enabled }}
  autoscaler: {{ .policy }}
  min-replicas: {{ .minReplicas }}
  max-replicas: {{ .maxReplicas }}
  {{- end }}
  {{- end }}
  {{- with $model.options }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
