{{- define "overfill.validate" -}}
{{- end -}}
