{{/* The head's group. Called with (list context, models, whether Ray's autoscaler runs beside it). */}}
{{- define "quire.head" -}}
{{- $root := index . 0 -}}
{{- $head := $root.Values.head -}}
serviceType: ClusterIP
rayStartParams:
  num-cpus: "0"
  dashboard-host: "0.0.0.0"
  disable-usage-stats: "true"
  object-store-memory: "200000000"
  {{- with $head.rayStartParams }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
template:
  metadata:
    {{- include "quire.podMetadata" $root | nindent 4 }}
  spec:
    {{- include "quire.podCommon" $root | nindent 4 }}
    automountServiceAccountToken: {{ index . 2 }}
    terminationGracePeriodSeconds: {{ add $root.Values.drain.stopSeconds 30 }}
    {{- with (include "quire.scheduling" $head) }}
    {{- . | nindent 4 }}
    {{- end }}
    containers:
      - name: ray-head
        {{- include "quire.containerCommon" $root | nindent 8 }}
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: agent, containerPort: 52365}
          - {name: client, containerPort: 10001}
          - {name: metrics, containerPort: 8080}
          - {name: serve, containerPort: {{ $root.Values.serve.port }}}
          # Of the containers beside it: KubeRay's Service of the head has the ports of this one only.
          {{- range index . 1 }}
          - {name: admin-{{ sub .adminPort $root.Values.admin.port }}, containerPort: {{ .adminPort }}}
          {{- end }}
        {{- with (include "quire.env" (list $root $head.env)) }}
        env:
          {{- . | nindent 10 }}
        {{- end }}
        resources:
          {{- toYaml $head.resources | nindent 10 }}
        {{- include "quire.probes" (list $root (dict "path" "/api/healthz" "port" "agent")) | nindent 8 }}
        volumeMounts:
          {{- include "quire.volumeMounts" $root | nindent 10 }}
      {{- range index . 1 }}
      - name: admin-{{ .name }}
        {{- include "quire.containerCommon" $root | nindent 8 }}
        command: [quire, admin]
        args:
          - --ray-address=127.0.0.1:6379
          - --namespace={{ include "quire.namespace" . }}
          - --admin-host=0.0.0.0
          - --admin-port={{ .adminPort }}
        env:
          {{- include "quire.adminTokenEnv" $root | nindent 10 }}
          {{- if eq $root.Values.rayAuth.mode "token" }}
          - {name: RAY_AUTH_MODE, value: token}
          - name: RAY_AUTH_TOKEN
            valueFrom:
              secretKeyRef: {name: {{ include "quire.rayAuthSecret" $root }}, key: auth_token}
          {{- end }}
        resources:
          {{- toYaml $root.Values.admin.resources | nindent 10 }}
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - {name: ray-logs, mountPath: /tmp/ray}
          - {name: home, mountPath: /home/quire}
          - {name: shared-mem, mountPath: /dev/shm}
      {{- end }}
    volumes:
      {{- include "quire.volumes" (list $root $head.sharedMemory "5Gi") | nindent 6 }}
{{- end -}}

{{/* The worker group of a model: a pod, or podsPerReplica of them, for each replica. Called with (list context, model). */}}
{{- define "quire.workers" -}}
{{- $root := index . 0 -}}
{{- $model := index . 1 -}}
{{- $ranks := div $model.tp $model.podsPerReplica -}}
{{- $pods := mul $model.replicas $model.podsPerReplica -}}
groupName: {{ $model.name }}
replicas: {{ $pods }}
minReplicas: {{ include "quire.minPods" $model }}
maxReplicas: {{ ternary (mul $model.autoscaling.maxReplicas $model.podsPerReplica) $pods $model.autoscaling.enabled }}
{{- if $model.autoscaling.enabled }}
idleTimeoutSeconds: {{ $model.autoscaling.idleTimeoutSeconds }}
{{- end }}
labels:
  quire-model: {{ $model.name }}
rayStartParams:
  disable-usage-stats: "true"
  object-store-memory: "200000000"
  {{- with $model.rayStartParams }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
template:
  metadata:
    {{- include "quire.podMetadata" $root | nindent 4 }}
  spec:
    {{- include "quire.podCommon" $root | nindent 4 }}
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: {{ add (ternary $root.Values.drain.timeoutSeconds 0 $root.Values.drain.enabled) $root.Values.drain.stopSeconds }}
    {{- with $model.runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- with (include "quire.scheduling" $model) }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $model.topologySpreadConstraints }}
    topologySpreadConstraints:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: ray-worker
        {{- include "quire.containerCommon" $root | nindent 8 }}
        ports:
          - {name: agent, containerPort: 52365}
          - {name: metrics, containerPort: 8080}
          - {name: serve, containerPort: {{ $root.Values.serve.port }}}
        env:
          {{- include "quire.adminTokenEnv" $root | nindent 10 }}
          {{- with (include "quire.env" (list $root $model.env)) }}
          {{- . | nindent 10 }}
          {{- end }}
        {{- if $root.Values.drain.enabled }}
        lifecycle:
          preStop:
            exec:
              command:
                - /bin/sh
                - -c
                - exec quire drain --node "$HOSTNAME" --wait-s {{ $root.Values.drain.timeoutSeconds }} --admin-url "http://$FQ_RAY_IP:{{ $model.adminPort }}"
        {{- end }}
        resources:
          {{- include "quire.workerResources" (list $model $ranks) | nindent 10 }}
        {{- include "quire.probes" (list $root (dict "path" "/-/healthz" "port" "serve")) | nindent 8 }}
        volumeMounts:
          {{- include "quire.volumeMounts" $root | nindent 10 }}
    volumes:
      {{- include "quire.volumes" (list $root $model.sharedMemory $model.home) | nindent 6 }}
{{- end -}}

{{/* Pods of a model when it has the fewest replicas. */}}
{{- define "quire.minPods" -}}
{{- mul (ternary .autoscaling.minReplicas .replicas .autoscaling.enabled) .podsPerReplica -}}
{{- end -}}

{{- define "quire.workerResources" -}}
{{- $model := index . 0 -}}
{{- $ranks := index . 1 -}}
{{- $cpus := $model.resources.limits.cpu | toString -}}
{{- if or (hasSuffix "m" $cpus) (lt (float64 $cpus) (addf $ranks 1)) -}}
{{- fail (printf "models: %s: resources.limits.cpu: must be whole and at least %d: one for each of the %d ranks of a pod, one for the rest (got %s)" $model.name (add $ranks 1) $ranks $cpus) -}}
{{- end -}}
{{- $gpus := ternary (dict $model.gpuResource (toString $ranks)) dict (eq $model.device "cuda") -}}
requests:
  {{- toYaml (merge $gpus $model.resources.requests) | nindent 2 }}
limits:
  {{- toYaml (merge $gpus $model.resources.limits) | nindent 2 }}
{{- end -}}

{{- define "quire.scheduling" -}}
{{- with .priorityClassName -}}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
