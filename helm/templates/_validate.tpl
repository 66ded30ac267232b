{{/* Faults across values. What one value may be, values.schema.json says. Each fault is one sentence: field, value, limit. */}}
{{- define "overfill.validate" -}}
{{- include "overfill.validate.models" . -}}
{{- include "overfill.validate.router" .root -}}
{{- include "overfill.validate.discovery" .root -}}
{{- include "overfill.validate.others" .root -}}
{{- range .computed.pools -}}
{{- include "overfill.validate.pool" (dict "root" $.root "pool" .) -}}
{{- include "overfill.validate.autoscaling" (dict "root" $.root "pool" .) -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.models" -}}
{{- $names := list -}}
{{- range .root.Values.models -}}
{{- if has .name $names -}}
{{- fail (printf "models: two entries have the name %q." .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if and .source.builtin (or .fullPath .decodePath) -}}
{{- fail (printf "models (%s): fullPath and decodePath have no meaning with source.builtin, whose paths are known." .name) -}}
{{- end -}}
{{- if and .source.image (semverCompare "<1.31.0-0" $.root.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "models (%s).source.image: image volumes need Kubernetes 1.31, and the cluster has %s." .name $.root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- $byRole := dict "prefill" (dict) "decode" (dict) -}}
{{- $keys := dict -}}
{{- $types := dict -}}
{{- range .computed.pools -}}
{{- $key := printf "%s/%s" .role .name -}}
{{- if hasKey $keys $key -}}
{{- fail (printf "%s.pools: two pools have the name %q." .role .name) -}}
{{- end -}}
{{- $_ := set $keys $key true -}}
{{- $_ := set (get $byRole .role) .model .name -}}
{{- $first := get $types .model -}}
{{- if and $first (ne $first.kvDtype .kvDtype) -}}
{{- fail (printf "%s.kvDtype: %q differs from %q of %s, and nodes of one model can't exchange KV of different types." .at .kvDtype $first.kvDtype $first.at) -}}
{{- end -}}
{{- if and (eq .kvTransport "nccl") (eq .device "cpu") -}}
{{- fail (printf "%s.kvTransport: nccl moves KV between GPUs, and the device is %q." .at .device) -}}
{{- end -}}
{{- $_ := set $types .model . -}}
{{- end -}}
{{- range $role, $other := dict "prefill" "decode" "decode" "prefill" -}}
{{- if empty (get $byRole $role) -}}
{{- fail (printf "%s.pools is empty: a request needs a prefill pool and a decode pool." $role) -}}
{{- end -}}
{{- range $model, $pool := get $byRole $other -}}
{{- if not (hasKey (get $byRole $role) $model) -}}
{{- fail (printf "%s.pools: no pool has the model %q, which %s pool %q needs as its partner." $role $model $other $pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $pools := .computed.pools -}}
{{- range $pool := $pools -}}
{{- $own := default "auto" $pool.kvTransport -}}
{{- $partner := false -}}
{{- range $pools -}}
{{- $other := default "auto" .kvTransport -}}
{{- /* auto is RDMA or TCP. */ -}}
{{- $common := or (eq $own $other) (and (has "auto" (list $own $other)) (not (has "nccl" (list $own $other)))) -}}
{{- if and (ne .role $pool.role) (eq .model $pool.model) $common }}{{ $partner = true }}{{ end -}}
{{- end -}}
{{- if not $partner -}}
{{- fail (printf "%s.kvTransport: %q is not a transport of any %s pool of the model %q." $pool.at $own (ternary "decode" "prefill" (eq $pool.role "prefill")) $pool.model) -}}
{{- end -}}
{{- end -}}
{{- $required := list -}}
{{- range .computed.pools -}}
{{- if eq .otherRole.placement "togetherRequired" }}{{ $required = append $required .role }}{{ end -}}
{{- end -}}
{{- if and (has "prefill" $required) (has "decode" $required) -}}
{{- fail "otherRole.placement: togetherRequired on prefill and on decode pools makes each wait for the other, so set it on one role only." -}}
{{- end -}}
{{- end -}}

{{- define "overfill.zero" -}}
{{- if has (toString .) (list "0" "0%") }}true{{ end -}}
{{- end -}}

{{/* What routers and pools share: (dict "at" ... "s" settings). */}}
{{- define "overfill.validate.workload" -}}
{{- if and (include "overfill.zero" .s.strategy.maxSurge) (include "overfill.zero" .s.strategy.maxUnavailable) -}}
{{- fail (printf "%s.strategy: maxSurge and maxUnavailable are both 0, so an update could replace no pod." .at) -}}
{{- end -}}
{{- if and .s.pdb.enabled (include "overfill.zero" .s.pdb.maxUnavailable) -}}
{{- fail (printf "%s.pdb.maxUnavailable: %v would block every drain of a machine; use at least 1, or pdb.enabled=false." .at .s.pdb.maxUnavailable) -}}
{{- end -}}
{{- if and .s.autoscaling.enabled (gt (int64 .s.autoscaling.minReplicas) (int64 .s.autoscaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling.minReplicas: %d is above maxReplicas, %d." .at (int64 .s.autoscaling.minReplicas) (int64 .s.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.pool" -}}
{{- $p := .pool -}}
{{- include "overfill.validate.workload" (dict "at" $p.at "s" $p) -}}
{{- if and $p.modelPath $p.pair.source.builtin -}}
{{- fail (printf "%s.modelPath has no meaning with source.builtin, whose paths are known." $p.at) -}}
{{- end -}}
{{- if and (int64 $p.gpu.count) (eq $p.device "cpu") -}}
{{- fail (printf "%s.device: cpu would leave the %d GPUs of gpu.count idle; set it to cuda:0." $p.at (int64 $p.gpu.count)) -}}
{{- end -}}
{{- if and (hasPrefix "int" $p.weights) (ne $p.device "cpu") -}}
{{- fail (printf "%s.weights: %s needs device cpu, not %s." $p.at $p.weights $p.device) -}}
{{- end -}}
{{- $claims := list -}}
{{- range $p.resourceClaims -}}
{{- if has .name $claims -}}
{{- fail (printf "%s.resourceClaims: two claims have the name %q." $p.at .name) -}}
{{- end -}}
{{- $claims = append $claims .name -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.autoscaling" -}}
{{- $p := .pool -}}
{{- $v := .root.Values -}}
{{- $a := $p.autoscaling -}}
{{- $at := printf "%s.autoscaling" $p.at -}}
{{- if $a.enabled -}}
{{- if lt (int64 $a.scaleDownStabilizationSeconds) (int64 $a.loadSeconds) -}}
{{- fail (printf "%s.scaleDownStabilizationSeconds: %d is shorter than loadSeconds, %d, so a pool would shrink before its new nodes are ready." $at (int64 $a.scaleDownStabilizationSeconds) (int64 $a.loadSeconds)) -}}
{{- end -}}
{{- if eq $a.kind "keda" -}}
{{- if not $v.monitoring.prometheus.serverAddress -}}
{{- fail (printf "%s.kind: keda needs monitoring.prometheus.serverAddress, the URL of Prometheus." $at) -}}
{{- end -}}
{{- if gt (int64 (default 0 $a.fallbackReplicas)) (int64 $a.maxReplicas) -}}
{{- fail (printf "%s.fallbackReplicas: %d is above maxReplicas, %d." $at (int64 $a.fallbackReplicas) (int64 $a.maxReplicas)) -}}
{{- end -}}
{{- if and (eq 0 (int64 $a.minReplicas)) (lt (float64 (default 60 $v.router.maxQueueSeconds)) (float64 $a.loadSeconds)) -}}
{{- fail (printf "%s.minReplicas: 0 makes requests wait %d seconds (loadSeconds) for a node, but router.maxQueueSeconds, %v, is shorter." $at (int64 $a.loadSeconds) (default 60 $v.router.maxQueueSeconds)) -}}
{{- end -}}
{{- else -}}
{{- if eq 0 (int64 $a.minReplicas) -}}
{{- fail (printf "%s.minReplicas: 0 needs kind keda, since a HorizontalPodAutoscaler never starts a pool that is at 0." $at) -}}
{{- end -}}
{{- if not (or $a.externalMetricName $v.monitoring.rules.enabled) -}}
{{- fail (printf "%s.kind: hpa needs monitoring.rules.enabled, whose recording rules compute its metric, or externalMetricName." $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.router" -}}
{{- $r := .Values.router -}}
{{- include "overfill.validate.workload" (dict "at" "router" "s" $r) -}}
{{- if eq (int $r.service.httpPort) (int $r.service.grpcPort) -}}
{{- fail (printf "router.service: httpPort and grpcPort are both %d." (int $r.service.httpPort)) -}}
{{- end -}}
{{- if and $r.autoscaling.enabled (not (dig "requests" "cpu" "" $r.resources)) -}}
{{- fail "router.autoscaling: the share of the requested CPU needs router.resources.requests.cpu." -}}
{{- end -}}
{{- if and $r.apiKeys.existingSecret $r.apiKeys.keys -}}
{{- fail "router.apiKeys: existingSecret and keys are both set; use one of them." -}}
{{- end -}}
{{- $names := list -}}
{{- range $r.apiKeys.keys -}}
{{- if has .name $names -}}
{{- fail (printf "router.apiKeys.keys: two keys have the name %q." .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if and .Values.tests.enabled $r.apiKeys.existingSecret (not .Values.tests.apiKeySecret.name) -}}
{{- fail "tests.apiKeySecret.name: helm test needs an API key, since router.apiKeys.existingSecret is set; name a Secret, or set tests.enabled=false." -}}
{{- end -}}
{{- if and (eq $r.serveTls.mode "secret") (not $r.serveTls.secretName) -}}
{{- fail "router.serveTls.secretName: mode secret needs the name of a Secret with tls.crt and tls.key." -}}
{{- end -}}
{{- if and (eq $r.serveTls.mode "certManager") (not $r.serveTls.certManager.issuerRef.name) -}}
{{- fail "router.serveTls.certManager.issuerRef: mode certManager needs the name of an issuer." -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.discovery" -}}
{{- $d := .Values.discovery -}}
{{- $x := $d.externalEtcd -}}
{{- if and (eq $d.mode "etcd") (ne 1 (int $d.etcd.replicas)) (not $d.etcd.persistence.enabled) -}}
{{- fail (printf "discovery.etcd.persistence.enabled: %d members need it, since a member without its data can't come back." (int $d.etcd.replicas)) -}}
{{- end -}}
{{- if eq $d.mode "externalEtcd" -}}
{{- if not $x.urls -}}
{{- fail "discovery.externalEtcd.urls: mode externalEtcd needs the URLs of its members." -}}
{{- end -}}
{{- if and $x.user (not $x.passwordSecretName) -}}
{{- fail (printf "discovery.externalEtcd.passwordSecretName: user %q needs the name of a Secret with the password." $x.user) -}}
{{- end -}}
{{- if and $x.clientCertificate (not $x.tlsSecretName) -}}
{{- fail "discovery.externalEtcd.tlsSecretName: clientCertificate needs the name of a Secret with tls.crt, tls.key and ca.crt." -}}
{{- end -}}
{{- range $x.urls -}}
{{- if and (hasPrefix "https://" .) (not $x.tlsSecretName) -}}
{{- fail (printf "discovery.externalEtcd.tlsSecretName: %s needs the name of a Secret with ca.crt." .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "overfill.validate.others" -}}
{{- $v := .Values -}}
{{- if and (eq $v.tls.mode "secret") (not $v.tls.secretName) -}}
{{- fail "tls.secretName: mode secret needs the name of a Secret with tls.crt, tls.key and ca.crt." -}}
{{- end -}}
{{- if and $v.monitoring.podMonitor.enabled $v.monitoring.serviceMonitor.enabled -}}
{{- fail "monitoring: podMonitor and serviceMonitor are both enabled, so all metrics would count twice." -}}
{{- end -}}
{{- range $way, $ingress := $v.ingress -}}
{{- if and $ingress.enabled (not $ingress.hosts) -}}
{{- fail (printf "ingress.%s.hosts is empty: an Ingress needs at least one." $way) -}}
{{- end -}}
{{- end -}}
{{- range $route, $settings := $v.gateway -}}
{{- if and $settings.enabled (not $settings.parentRefs) -}}
{{- fail (printf "gateway.%s.parentRefs is empty: a route needs a Gateway." $route) -}}
{{- end -}}
{{- end -}}
{{- $selecting := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "overfill/pool" -}}
{{- range $key, $_ := $v.commonLabels -}}
{{- if has $key $selecting -}}
{{- fail (printf "commonLabels: %s is the chart's own, since it selects pods." $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
