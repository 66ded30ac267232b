{{/* Fields of a pod that all workloads share: (dict "root" $ "settings" ... "grace" N). */}}
{{- define "overfill.pod.common" -}}
{{- $s := .settings -}}
serviceAccountName: {{ include "overfill.serviceAccountName" .root }}
automountServiceAccountToken: false
{{- /* Variables of Services would look like settings, for example OVERFILL_PORT. */}}
enableServiceLinks: false
{{- include "overfill.pullSecrets" .root }}
{{- with .grace }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with $s.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $s.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $s.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with $s.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $s.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $s.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Topology spread constraints; those without a selector get .selector. */}}
{{- define "overfill.pod.spread" -}}
{{- $selector := .selector -}}
{{- with .constraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $one := deepCopy . }}
  {{- if not $one.labelSelector }}
  {{- $_ := set $one "labelSelector" (dict "matchLabels" (fromYaml $selector)) }}
  {{- end }}
  - {{ toYaml $one | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Environment: .text is a list in YAML, .extra replaces variables of the same name. */}}
{{- define "overfill.env" -}}
{{- $names := list -}}
{{- range .extra }}{{ $names = append $names .name }}{{ end -}}
{{- $env := list -}}
{{- range fromYamlArray .text -}}
{{- if not (has .name $names) }}{{ $env = append $env . }}{{ end -}}
{{- end -}}
env:
  {{- toYaml (concat $env .extra) | nindent 2 }}
{{- end -}}

{{/* Variables of all services, a list in YAML: (dict "root" $ "component" ... "tls" true). */}}
{{- define "overfill.env.common" -}}
{{- $v := .root.Values -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: HOME
  value: /tmp
- name: OVERFILL_CLUSTER
  value: {{ include "overfill.cluster" .root | quote }}
- name: OVERFILL_LOG_FORMAT
  value: {{ $v.logs.format }}
- name: RUST_LOG
  value: {{ $v.logs.level | quote }}
{{- if ne $v.tls.mode "none" }}
- name: OVERFILL_TLS_CA
  value: /etc/overfill/tls/ca.crt
- name: OVERFILL_TLS_CERT
  value: /etc/overfill/tls/tls.crt
- name: OVERFILL_TLS_KEY
  value: /etc/overfill/tls/tls.key
- name: OVERFILL_TLS_NAME
  value: {{ $v.tls.name | quote }}
{{- end }}
{{- if ne $v.discovery.mode "dns" }}
{{ include "overfill.etcd.env" .root }}
{{- end }}
{{- with $v.telemetry.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_SERVICE_NAME
  value: overfill-{{ $.component }}
- name: OTEL_TRACES_SAMPLER
  value: {{ $v.telemetry.sampler }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ $v.telemetry.samplerRatio | toString | quote }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: {{ include "overfill.env.attributes" $.root | quote }}
{{- end }}
{{- end -}}

{{/* Values are encoded as in W3C Baggage, as the OpenTelemetry specification asks. */}}
{{- define "overfill.env.attributes" -}}
{{- $attributes := dict "k8s.namespace.name" .Release.Namespace "service.namespace" .Release.Name "service.version" .Chart.AppVersion -}}
{{- range $k, $v := .Values.telemetry.resourceAttributes }}{{ $_ := set $attributes $k $v }}{{ end -}}
{{- $list := list "k8s.pod.name=$(POD_NAME)" -}}
{{- range $k := keys $attributes | sortAlpha -}}
{{- $list = append $list (printf "%s=%s" $k (get $attributes $k | urlquery | replace "+" "%20")) -}}
{{- end -}}
{{- join "," $list -}}
{{- end -}}

{{/* Volumes that all services need: /tmp, certificates, etcd's secrets. */}}
{{- define "overfill.volumes.common" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .settings.tmpSizeLimit }}
{{- if ne $v.tls.mode "none" }}
- name: tls
  secret:
    secretName: {{ include "overfill.tls.secret" (dict "root" .root "component" .component) }}
    defaultMode: 288
{{- end }}
{{- if ne $v.discovery.mode "dns" }}
{{- include "overfill.etcd.volumes" .root }}
{{- end }}
{{- end -}}

{{- define "overfill.mounts.common" -}}
- name: tmp
  mountPath: /tmp
{{- if ne .root.Values.tls.mode "none" }}
- name: tls
  mountPath: /etc/overfill/tls
  readOnly: true
{{- end }}
{{- if ne .root.Values.discovery.mode "dns" }}
{{- include "overfill.etcd.mounts" .root }}
{{- end }}
{{- end -}}

{{/* Probes: (dict "settings" ... "port" "admin" "scheme" "HTTP"). */}}
{{- define "overfill.probes" -}}
{{- $p := .settings.probes -}}
{{- $port := .port -}}
{{- $scheme := .scheme -}}
startupProbe:
  httpGet: {path: /startup, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ div (add .settings.startupTimeoutSeconds (sub $p.periodSeconds 1)) $p.periodSeconds }}
livenessProbe:
  httpGet: {path: /live, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $p.livenessFailureThreshold }}
readinessProbe:
  httpGet: {path: /ready, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ $p.readinessFailureThreshold }}
{{- end -}}

{{/* The images have no shell, so the kubelet sleeps. Before Kubernetes 1.32, it refuses to sleep for 0 seconds. */}}
{{- define "overfill.lifecycle" -}}
{{- with int64 .preStopSleepSeconds }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ . }}
{{- end }}
{{- end -}}

{{/* `spec` of a pod as it is written out: .text in YAML, with .extra merged into it. */}}
{{- define "overfill.podSpec" -}}
{{- if .extra -}}
{{- $spec := fromYaml .text -}}
{{- include "overfill.merge" (dict "into" $spec "from" .extra) -}}
{{- toYaml $spec -}}
{{- else -}}
{{- .text -}}
{{- end -}}
{{- end -}}
