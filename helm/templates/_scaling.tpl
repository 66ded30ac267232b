{{/* Load of a pool in PromQL. Each router reports its own queue, which adds up, and what it sees on the nodes, which
     all routers see alike. */}}
{{- define "overfill.load.query" -}}
{{- $metric := ternary "overfill_prefill_backlog_seconds" "overfill_decode_load_nodes" (eq .pool.role "prefill") -}}
{{- $labels := printf "namespace=%q,release=%q,pool=%q" .root.Release.Namespace .root.Release.Name .pool.name -}}
{{- printf "sum(%s{%s,source=\"router\"}) + max(%s{%s,source=\"nodes\"})" $metric $labels $metric $labels -}}
{{- end -}}

{{/* A number as a quantity: the API server would write 0.8 as 800m, and GitOps tools would see a difference. */}}
{{- define "overfill.quantity" -}}
{{- if contains "." . }}{{ mulf (float64 .) 1000 | int64 }}m{{ else }}{{ . }}{{ end -}}
{{- end -}}
