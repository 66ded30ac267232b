{{/* Secret with a service's certificate: (dict "root" $ "component" "router"). */}}
{{- define "overfill.tls.secret" -}}
{{- if eq .root.Values.tls.mode "secret" -}}
{{- .root.Values.tls.secretName -}}
{{- else -}}
{{- include "overfill.object" (dict "root" .root "suffix" (printf "%s-tls" .component)) -}}
{{- end -}}
{{- end -}}

{{/* Secret with the routers' certificate for clients. */}}
{{- define "overfill.serveTls.secret" -}}
{{- if eq .Values.router.serveTls.mode "certManager" -}}
{{- include "overfill.object" (dict "root" . "suffix" "serve-tls") -}}
{{- else -}}
{{- .Values.router.serveTls.secretName -}}
{{- end -}}
{{- end -}}

{{- define "overfill.apiKeys.secret" -}}
{{- if .Values.router.apiKeys.existingSecret -}}
{{- .Values.router.apiKeys.existingSecret -}}
{{- else if .Values.router.apiKeys.keys -}}
{{- include "overfill.object" (dict "root" . "suffix" "api-keys") -}}
{{- end -}}
{{- end -}}

{{/* Non-empty if the routers' client ports are neither encrypted nor need keys. */}}
{{- define "overfill.router.open" -}}
{{- if and (eq .Values.router.serveTls.mode "none") (not (include "overfill.apiKeys.secret" .)) }}true{{ end -}}
{{- end -}}

{{/* A certificate: (dict "root" $ "component" ... "issuer" ... "secret" ... "names" (list ...)). Its name is its secret's. */}}
{{- define "overfill.certificate" -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  {{- include "overfill.metadata" (dict "root" .root "component" .component "name" .secret) | nindent 2 }}
spec:
  secretName: {{ .secret }}
  duration: {{ .root.Values.tls.certManager.duration }}
  privateKey:
    algorithm: ECDSA
    size: 256
    rotationPolicy: Always
  usages:
    - digital signature
    - server auth
    - client auth
  dnsNames:
    {{- toYaml .names | nindent 4 }}
  issuerRef:
    group: {{ default "cert-manager.io" .issuer.group }}
    kind: {{ default "Issuer" .issuer.kind }}
    name: {{ .issuer.name }}
{{- end -}}
