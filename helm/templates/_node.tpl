{{/* Affinity of a node's pod: the given one, and the term for the other role. */}}
{{- define "overfill.node.affinity" -}}
{{- $pool := .pool -}}
{{- $affinity := deepCopy $pool.affinity -}}
{{- $placement := $pool.otherRole.placement -}}
{{- if ne $placement "any" -}}
{{- $other := ternary "decode" "prefill" (eq $pool.role "prefill") -}}
{{- $term := dict "topologyKey" $pool.otherRole.topologyKey "labelSelector" (dict "matchLabels" (include "overfill.selector" (dict "root" .root "component" $other) | fromYaml)) -}}
{{- $kind := ternary "podAffinity" "podAntiAffinity" (hasPrefix "together" $placement) -}}
{{- $rule := "preferredDuringSchedulingIgnoredDuringExecution" -}}
{{- if hasSuffix "Required" $placement -}}
{{- $rule = "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- else -}}
{{- $term = dict "weight" 100 "podAffinityTerm" $term -}}
{{- end -}}
{{- $group := default dict (get $affinity $kind) -}}
{{- $_ := set $group $rule (append (default list (get $group $rule)) $term) -}}
{{- $_ := set $affinity $kind $group -}}
{{- end -}}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Resources of a node's container, with its devices and claims. */}}
{{- define "overfill.node.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- range $device := list .gpu .rdma -}}
{{- if int64 $device.count -}}
{{- range list "requests" "limits" -}}
{{- $_ := set $resources . (merge (dict $device.resource (int64 $device.count | toString)) (default dict (get $resources .))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .resourceClaims -}}
{{- $claims := list -}}
{{- range .resourceClaims }}{{ $claims = append $claims (dict "name" .name) }}{{ end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "overfill.node.securityContext" -}}
{{- $context := deepCopy .securityContext -}}
{{- if and (int64 .rdma.count) .rdma.ipcLock -}}
{{- $capabilities := default dict $context.capabilities -}}
{{- $_ := set $capabilities "add" (append (default list $capabilities.add) "IPC_LOCK" | uniq) -}}
{{- $_ := set $context "capabilities" $capabilities -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{/* Variables of a node, a list in YAML. Those without a value are left to the node's own default. */}}
{{- define "overfill.node.env" -}}
{{- $v := .root.Values -}}
{{- $pool := .pool -}}
{{- $host := $v.network.listenHost -}}
{{ include "overfill.env.common" (dict "root" .root "component" $pool.role) }}
- name: OVERFILL_MODEL
  value: {{ $pool.path | quote }}
- name: OVERFILL_SERVED_MODEL_NAME
  value: {{ $pool.served | quote }}
{{- with $pool.variantFlags }}
- name: OVERFILL_VARIANT
  value: {{ . | quote }}
{{- end }}
- name: OVERFILL_POOL
  value: {{ $pool.name | quote }}
- name: OVERFILL_NODE_ID
  value: $(POD_NAME)
- name: OVERFILL_ADVERTISE_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: OVERFILL_LISTEN
  value: {{ printf "%s:%d" $host $pool.grpcPort | quote }}
{{- if eq $pool.role "decode" }}
- name: OVERFILL_KV_LISTEN
  value: {{ printf "%s:50072" $host | quote }}
{{- end }}
- name: OVERFILL_ADMIN
  value: {{ printf "%s:9090" $host | quote }}
- name: OVERFILL_DRAIN_TIMEOUT_SECONDS
  value: {{ int64 $pool.drainTimeoutSeconds | toString | quote }}
{{- if eq $v.tls.mode "none" }}
- name: OVERFILL_ALLOW_INSECURE
  value: "true"
{{- end }}
{{- $flags := list "device" "weights" "kvDtype" "kvTransport" "kvRdmaDevice" "kvPoolTokens" "maxWaiting" "maxRunning" "stepTimeoutSeconds" -}}
{{- if eq $pool.role "prefill" }}{{ $flags = concat $flags (list "maxBatchTokens" "stepTargetSeconds") }}{{ end -}}
{{- range $flags }}
{{- $value := get $pool . }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
- name: OVERFILL_{{ . | snakecase | upper }}
  value: {{ include "overfill.number" $value | quote }}
{{- end }}
{{- end }}
{{- if $pool.allowPlainRdma }}
- name: OVERFILL_ALLOW_PLAIN_RDMA
  value: "true"
{{- end }}
{{- if $pool.allowPlainNccl }}
- name: OVERFILL_ALLOW_PLAIN_NCCL
  value: "true"
{{- end }}
- name: OVERFILL_DEFAULT_DEADLINE_SECONDS
  value: {{ int64 $v.router.defaultDeadlineSeconds | toString | quote }}
{{- end -}}

{{/* A value as a flag's text. Numbers of YAML are floats here: 1000000 would print as 1e+06. */}}
{{- define "overfill.number" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{/* Lets no node start before the release's Job has downloaded its model. */}}
{{- define "overfill.node.initContainers" -}}
{{- $pool := .pool -}}
{{- if or $pool.pair.source.hub $pool.initContainers }}
initContainers:
  {{- if $pool.pair.source.hub }}
  - name: wait-for-model
    image: {{ include "overfill.image" (dict "root" .root "component" "cli") }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    args:
      - pull
      - --wait-seconds
      - "86400"
      - --dir
      - {{ include "overfill.model.folder" $pool }}
      - {{ include "overfill.model.id" $pool | quote }}
    {{- with $pool.securityContext }}
    securityContext:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    resources:
      requests: {cpu: 10m, memory: 32Mi}
      limits: {memory: 128Mi}
    env:
      - name: HOME
        value: /tmp
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- include "overfill.model.mount" (dict "model" $pool.pair) | trim | nindent 6 }}
  {{- end }}
  {{- with $pool.initContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "overfill.node.claims" -}}
{{- $pool := .pool -}}
{{- $root := .root -}}
{{- with $pool.resourceClaims }}
resourceClaims:
  {{- range . }}
  - name: {{ .name }}
    {{- if .resourceClaimName }}
    resourceClaimName: {{ .resourceClaimName }}
    {{- else }}
    resourceClaimTemplateName: {{ default (include "overfill.node.claimTemplate" (dict "root" $root "pool" $pool "claim" .)) .resourceClaimTemplateName }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "overfill.node.claimTemplate" -}}
{{- include "overfill.object" (dict "root" .root "suffix" (printf "%s-%s-%s" .pool.role .pool.name .claim.name)) -}}
{{- end -}}

{{/* `spec` of a node's pod: (dict "root" $ "pool" ...). */}}
{{- define "overfill.node.podSpec" -}}
{{- $pool := .pool -}}
{{- $root := .root -}}
{{- $selector := include "overfill.selector" (dict "root" $root "component" $pool.role "pool" $pool.name) -}}
{{- include "overfill.pod.common" (dict "root" $root "settings" $pool "grace" $pool.grace) }}
{{- include "overfill.node.affinity" . }}
{{- include "overfill.pod.spread" (dict "constraints" $pool.topologySpreadConstraints "selector" $selector) }}
{{- include "overfill.node.claims" . }}
{{- include "overfill.node.initContainers" . }}
containers:
  - name: node
    image: {{ include "overfill.image" (dict "root" $root "component" $pool.role "override" $pool.image) }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- with $pool.extraArgs }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- include "overfill.env" (dict "text" (include "overfill.node.env" .) "extra" $pool.extraEnv) | nindent 4 }}
    {{- with $pool.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - name: grpc
        containerPort: {{ $pool.grpcPort }}
      {{- if eq $pool.role "decode" }}
      - name: kv
        containerPort: 50072
      {{- end }}
      - name: admin
        containerPort: 9090
    {{- include "overfill.probes" (dict "settings" $pool "port" "admin" "scheme" "HTTP") | nindent 4 }}
    {{- with include "overfill.lifecycle" $pool | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    resources:
      {{- include "overfill.node.resources" $pool | nindent 6 }}
    securityContext:
      {{- include "overfill.node.securityContext" $pool | nindent 6 }}
    volumeMounts:
      {{- include "overfill.mounts.common" (dict "root" $root) | nindent 6 }}
      {{- with include "overfill.model.mount" (dict "model" $pool.pair) | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- if $pool.sharedMemory.enabled }}
      - name: shm
        mountPath: /dev/shm
      {{- end }}
      {{- with $pool.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- with $pool.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  {{- include "overfill.volumes.common" (dict "root" $root "settings" $pool "component" $pool.role) | nindent 2 }}
  {{- with include "overfill.model.volume" (dict "root" $root "model" $pool.pair) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if $pool.sharedMemory.enabled }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $pool.sharedMemory.sizeLimit }}
  {{- end }}
  {{- with $pool.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Version of the resource API. What a cluster lists is no help: `helm template` has no cluster. */}}
{{- define "overfill.dra.version" -}}
{{- $kube := .Capabilities.KubeVersion.Version -}}
{{- if semverCompare ">=1.34.0-0" $kube }}resource.k8s.io/v1
{{- else if semverCompare ">=1.33.0-0" $kube }}resource.k8s.io/v1beta2
{{- else }}resource.k8s.io/v1beta1
{{- end -}}
{{- end -}}
