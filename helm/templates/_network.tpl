{{/* Peers of a NetworkPolicy: this release's pods of some components. */}}
{{- define "overfill.peers" -}}
{{- range .components }}
- podSelector:
    matchLabels:
      {{- include "overfill.selector" (dict "root" $.root "component" .) | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "overfill.ports" -}}
{{- $protocols := default (list "TCP") .protocols -}}
{{- range $port := .ports }}
{{- range $protocols }}
- port: {{ int $port }}
  protocol: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Rules of a NetworkPolicy. An empty list of peers means everyone, and is left out. */}}
{{- define "overfill.rules" -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- $rule := deepCopy . -}}
{{- if and (hasKey $rule $.side) (empty (get $rule $.side)) }}{{ $_ := unset $rule $.side }}{{ end -}}
{{- range $rule.ports }}{{ if not .protocol }}{{ $_ := set . "protocol" "TCP" }}{{ end }}{{ end -}}
{{- $rules = append $rules $rule -}}
{{- end -}}
{{- toYaml $rules -}}
{{- end -}}

{{/* Port of a URL. */}}
{{- define "overfill.urlPort" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) $port -}}
{{- end -}}
