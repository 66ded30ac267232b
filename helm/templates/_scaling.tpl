{{/* Load of a pool in PromQL: (dict "root" $ "pool" ... "computed" ... "target" 0.8).

     Each router reports its own queue, which adds up, and what it sees on the nodes, which all routers see alike. A pool
     without nodes has neither: its load is 0, and requests that wait for the first node of a model wake one node. Without
     any router's metrics, the last term is missing and so is the sum: then the fallback counts. */}}
{{- define "overfill.load.query" -}}
{{- $metric := ternary "overfill_prefill_backlog_seconds" "overfill_decode_load_nodes" (eq .pool.role "prefill") -}}
{{- $release := printf "namespace=%q,release=%q" .root.Release.Namespace .root.Release.Name -}}
{{- $labels := printf "%s,pool=%q" $release .pool.name -}}
{{- $names := list -}}
{{- range .computed.pools -}}
{{- if and (eq .role "decode") (eq .model $.pool.model) (or (eq $.pool.role "prefill") (eq .served $.pool.served)) -}}
{{- $names = append $names (regexQuoteMeta .served) -}}
{{- end -}}
{{- end -}}
{{- $waiting := printf "%s,model_name=~%q" $release (join "|" (uniq $names)) -}}
{{- printf "(sum(%s{%s,source=\"router\"}) or vector(0)) + (max(%s{%s,source=\"nodes\"}) or vector(0)) + clamp_max(sum(overfill_requests_without_nodes{%s}), %s)" $metric $labels $metric $labels $waiting .target -}}
{{- end -}}

{{/* A number as a quantity: the API server would write 0.8 as 800m, and GitOps tools would see a difference. */}}
{{- define "overfill.quantity" -}}
{{- if contains "." . }}{{ mulf (float64 .) 1000 | int64 }}m{{ else }}{{ . }}{{ end -}}
{{- end -}}
