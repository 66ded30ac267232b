{{/* Ports of the routers' Services. `appProtocol` tells gateways that gRPC is HTTP/2. */}}
{{- define "overfill.router.ports" -}}
{{- $s := .Values.router.service -}}
{{- $tls := ne .Values.router.serveTls.mode "none" -}}
- name: http
  port: {{ $s.httpPort }}
  targetPort: http
  appProtocol: {{ ternary "https" "http" $tls }}
- name: grpc
  port: {{ $s.grpcPort }}
  targetPort: grpc
  appProtocol: {{ ternary "https" "kubernetes.io/h2c" $tls }}
{{- end -}}

{{/* Addresses under which routers look for the nodes of a role, comma-separated. */}}
{{- define "overfill.router.dns" -}}
{{- $urls := list -}}
{{- range .pools -}}
{{- if eq .role $.role -}}
{{- $urls = append $urls (printf "%s://%s.%s.svc:%d" (include "overfill.scheme" $.root) .object $.root.Release.Namespace .grpcPort) -}}
{{- end -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}

{{- define "overfill.router.env" -}}
{{- $v := .root.Values -}}
{{- $host := $v.network.listenHost -}}
{{ include "overfill.env.common" (dict "root" .root "component" "router") }}
- name: OVERFILL_HTTP
  value: {{ printf "%s:8080" $host | quote }}
- name: OVERFILL_GRPC
  value: {{ printf "%s:50051" $host | quote }}
- name: OVERFILL_SERVED_MODEL
  value: {{ join "," .computed.servedNames | quote }}
{{- if eq $v.discovery.mode "dns" }}
- name: OVERFILL_PREFILL_DNS
  value: {{ include "overfill.router.dns" (dict "root" .root "pools" .computed.pools "role" "prefill") | quote }}
- name: OVERFILL_DECODE_DNS
  value: {{ include "overfill.router.dns" (dict "root" .root "pools" .computed.pools "role" "decode") | quote }}
- name: OVERFILL_DNS_INTERVAL_SECONDS
  value: {{ int64 $v.discovery.dnsIntervalSeconds | toString | quote }}
{{- end }}
{{- if include "overfill.apiKeys.secret" .root }}
- name: OVERFILL_API_KEYS
  value: /etc/overfill/api-keys/{{ ternary $v.router.apiKeys.existingSecretKey "keys.json" (not (empty $v.router.apiKeys.existingSecret)) }}
{{- end }}
{{- if ne $v.router.serveTls.mode "none" }}
- name: OVERFILL_SERVE_TLS_CERT
  value: /etc/overfill/serve-tls/tls.crt
- name: OVERFILL_SERVE_TLS_KEY
  value: /etc/overfill/serve-tls/tls.key
{{- end }}
{{- if include "overfill.router.open" .root }}
- name: OVERFILL_ALLOW_INSECURE
  value: "true"
{{- end }}
- name: OVERFILL_PAGE
  value: {{ $v.router.page | toString | quote }}
{{- range $name := list "allowedOrigins" "mode" "toolCallParser" "reasoningParser" }}
{{- with get $v.router $name }}
- name: OVERFILL_{{ $name | snakecase | upper }}
  value: {{ join "," . | quote }}
{{- end }}
{{- end }}
{{- with $v.router.watchShare }}
- name: OVERFILL_WATCH_SHARE
  value: {{ . | quote }}
{{- end }}
{{- if $v.router.trustRequestChatTemplate }}
- name: OVERFILL_TRUST_REQUEST_CHAT_TEMPLATE
  value: "true"
{{- end }}
{{- range list "defaultDeadlineSeconds" "drainTimeoutSeconds" "itlLimitSeconds" "maxQueueSeconds" "maxRunning" "maxWaiting" "maxBodyBytes" "maxConnections" "maxConnectionAgeSeconds" }}
{{- $value := get $v.router . }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
- name: OVERFILL_{{ . | snakecase | upper }}
  value: {{ include "overfill.number" $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* `spec` of a router's pod: (dict "root" $ "computed" ... "grace" N). */}}
{{- define "overfill.router.podSpec" -}}
{{- $root := .root -}}
{{- $r := $root.Values.router -}}
{{- $tls := ne $r.serveTls.mode "none" -}}
{{- $keys := include "overfill.apiKeys.secret" $root -}}
{{- $selector := include "overfill.selector" (dict "root" $root "component" "router") -}}
{{- include "overfill.pod.common" (dict "root" $root "settings" $r "grace" .grace) }}
{{- with $r.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- include "overfill.pod.spread" (dict "constraints" $r.topologySpreadConstraints "selector" $selector) }}
{{- with $r.initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: router
    image: {{ include "overfill.image" (dict "root" $root "component" "router") }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- with $r.extraArgs }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "overfill.env" (dict "text" (include "overfill.router.env" .) "extra" $r.extraEnv) | nindent 4 }}
    {{- with $r.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - name: http
        containerPort: 8080
      - name: grpc
        containerPort: 50051
    {{- include "overfill.probes" (dict "settings" $r "port" "http" "scheme" (ternary "HTTPS" "HTTP" $tls)) | nindent 4 }}
    {{- with include "overfill.lifecycle" $r | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    resources:
      {{- toYaml $r.resources | nindent 6 }}
    securityContext:
      {{- toYaml $r.securityContext | nindent 6 }}
    volumeMounts:
      {{- include "overfill.mounts.common" (dict "root" $root) | nindent 6 }}
      {{- if $keys }}
      - name: api-keys
        mountPath: /etc/overfill/api-keys
        readOnly: true
      {{- end }}
      {{- if $tls }}
      - name: serve-tls
        mountPath: /etc/overfill/serve-tls
        readOnly: true
      {{- end }}
      {{- with $r.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- with $r.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  {{- include "overfill.volumes.common" (dict "root" $root "settings" $r "component" "router") | nindent 2 }}
  {{- if $keys }}
  - name: api-keys
    secret:
      secretName: {{ $keys }}
      defaultMode: 288
  {{- end }}
  {{- if $tls }}
  - name: serve-tls
    secret:
      secretName: {{ include "overfill.serveTls.secret" $root }}
      defaultMode: 288
  {{- end }}
  {{- with $r.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
