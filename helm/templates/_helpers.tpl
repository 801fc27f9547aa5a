{{/* Names and labels */}}

{{- define "quire.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "quire.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "quire.labels" -}}
{{ include "quire.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quire.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "quire.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "quire.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default (printf "%s-%s" $.Chart.AppVersion .variant) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "quire.serveService" -}}
{{ include "quire.fullname" . }}-serve-svc
{{- end -}}

{{- define "quire.rayAuthSecret" -}}
{{ .Values.rayAuth.existingSecret | default (printf "%s-ray-auth" (include "quire.fullname" .)) }}
{{- end -}}

{{- define "quire.adminSecret" -}}
{{ .Values.admin.existingSecret | default (printf "%s-admin" (include "quire.fullname" .)) }}
{{- end -}}

{{- define "quire.apiKeySecret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "quire.fullname" .)) }}
{{- end -}}

{{/* A secret's value: the one that is in the cluster already, or a new one. Called with (list context, name, key). */}}
{{- define "quire.keptSecret" -}}
{{- $root := index . 0 -}}
{{- $found := lookup "v1" "Secret" $root.Release.Namespace (index . 1) -}}
{{- if and $found (hasKey ($found.data | default dict) (index . 2)) -}}
{{- index $found.data (index . 2) | b64dec -}}
{{- else -}}
{{- randAlphaNum 40 -}}
{{- end -}}
{{- end -}}

{{/* Models: each with the defaults below it and its place in the list, as {"models": [...]}. */}}

{{- define "quire.models" -}}
{{- $models := list -}}
{{- $names := dict -}}
{{- range $index, $given := .Values.models -}}
{{- if hasKey $names $given.name -}}
{{- fail (printf "models: the name %s is given twice" $given.name) -}}
{{- end -}}
{{- $_ := set $names $given.name true -}}
{{- $model := mergeOverwrite (deepCopy $.Values.modelDefaults) (deepCopy $given) -}}
{{- if mod $model.tp $model.podsPerReplica -}}
{{- fail (printf "models: %s: podsPerReplica %d must divide tp %d" $model.name (int $model.podsPerReplica) (int $model.tp)) -}}
{{- end -}}
{{- if and $model.prefillReplicas (ge (int $model.prefillReplicas) (int $model.replicas)) -}}
{{- fail (printf "models: %s: prefillReplicas %d: there must be more replicas (now %d)" $model.name (int $model.prefillReplicas) (int $model.replicas)) -}}
{{- end -}}
{{- if and $model.autoscaling.enabled (gt (int $model.autoscaling.minReplicas) (int $model.autoscaling.maxReplicas)) -}}
{{- fail (printf "models: %s: autoscaling.minReplicas is above maxReplicas" $model.name) -}}
{{- end -}}
{{- $models = append $models (merge (dict "adminPort" (add (int $.Values.admin.port) $index)) $model) -}}
{{- end -}}
{{- toJson (dict "models" $models) -}}
{{- end -}}

{{- define "quire.autoscales" -}}
{{- range (include "quire.models" . | fromJson).models -}}
{{- if .autoscaling.enabled -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* What every pod has */}}

{{/* Without the chart's version: another label on a pod is another cluster to KubeRay, and an upgrade of it. */}}
{{- define "quire.podMetadata" -}}
labels:
  {{- include "quire.selectorLabels" . | nindent 2 }}
  {{- with .Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  # Another application is another cluster to KubeRay, so that the admin ports know whose they are.
  quire/application: {{ include "quire.serveConfig" . | sha256sum }}
  {{- with .Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "quire.podCommon" -}}
serviceAccountName: {{ include "quire.serviceAccountName" . }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "quire.containerCommon" -}}
image: {{ include "quire.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
{{- end -}}

{{/* Called with (list context, more environment). */}}
{{- define "quire.env" -}}
{{- $root := index . 0 -}}
{{- $hub := $root.Values.hub -}}
{{- $env := list -}}
{{- with $hub.existingSecret -}}
{{- $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $hub.secretKey))) -}}
{{- end -}}
{{- if $hub.cacheClaim -}}
{{- $env = append $env (dict "name" "HF_HOME" "value" "/var/cache/huggingface") -}}
{{- end -}}
{{- if $hub.offline -}}
{{- $env = append $env (dict "name" "HF_HUB_OFFLINE" "value" "1") -}}
{{- end -}}
{{- with (concat $env (index . 1)) -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{- define "quire.adminTokenEnv" -}}
- name: QUIRE_ADMIN_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "quire.adminSecret" . }}, key: {{ .Values.admin.secretKey }}}
{{- end -}}

{{- define "quire.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: home, mountPath: /home/quire}
- {name: shared-mem, mountPath: /dev/shm}
{{- if not .Values.apiKeys.allowAnonymous }}
- {name: api-keys, mountPath: /etc/quire/api-keys, readOnly: true}
{{- end }}
{{- if .Values.hub.cacheClaim }}
- {name: hub-cache, mountPath: /var/cache/huggingface}
{{- end }}
{{- range $index, $claim := .Values.weights.claims }}
- name: weights-{{ $index }}
  mountPath: {{ $claim.mountPath }}
  readOnly: true
  {{- with $claim.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Called with (list context, size of /dev/shm, size of home). */}}
{{- define "quire.volumes" -}}
{{- $root := index . 0 -}}
- name: tmp
  emptyDir: {}
- name: ray-logs
  emptyDir: {}
- name: home
  emptyDir: {sizeLimit: {{ index . 2 }}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ index . 1 }}}
{{- if not $root.Values.apiKeys.allowAnonymous }}
- name: api-keys
  secret:
    secretName: {{ include "quire.apiKeySecret" $root }}
    defaultMode: 0440
    items:
      - {key: {{ $root.Values.apiKeys.secretKey }}, path: {{ $root.Values.apiKeys.secretKey }}}
{{- end }}
{{- with $root.Values.hub.cacheClaim }}
- name: hub-cache
  persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
{{- range $index, $claim := $root.Values.weights.claims }}
- name: weights-{{ $index }}
  persistentVolumeClaim: {claimName: {{ $claim.claimName }}, readOnly: true}
{{- end }}
{{- end -}}

{{/* Probes of a Ray node, as KubeRay would inject them, but without a shell. Called with (list context, path and port of readiness). */}}
{{- define "quire.probes" -}}
{{- $probes := (index . 0).Values.probes -}}
{{- $ready := index . 1 -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  {{- toYaml $probes.startup | nindent 2 }}
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  {{- toYaml $probes.liveness | nindent 2 }}
readinessProbe:
  httpGet: {path: {{ $ready.path }}, port: {{ $ready.port }}}
  {{- toYaml $probes.readiness | nindent 2 }}
{{- end -}}
