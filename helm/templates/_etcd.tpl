{{- define "overfill.etcd.object" -}}
{{- include "overfill.object" (dict "root" . "suffix" "etcd" "limit" 52) -}}
{{- end -}}

{{/* Secret with the certificate of etcd's members, or nothing if they speak plain HTTP. */}}
{{- define "overfill.etcd.secret" -}}
{{- if .Values.discovery.etcd.tlsSecretName -}}
{{- .Values.discovery.etcd.tlsSecretName -}}
{{- else if eq .Values.tls.mode "certManager" -}}
{{- include "overfill.object" (dict "root" . "suffix" "etcd-tls") -}}
{{- end -}}
{{- end -}}

{{- define "overfill.etcd.scheme" -}}
{{- ternary "https" "http" (not (empty (include "overfill.etcd.secret" .))) -}}
{{- end -}}

{{/* Host names of the members, comma-separated. */}}
{{- define "overfill.etcd.hosts" -}}
{{- $name := include "overfill.etcd.object" . -}}
{{- $hosts := list -}}
{{- range $i := until (int .Values.discovery.etcd.replicas) -}}
{{- $hosts = append $hosts (printf "%s-%d.%s.%s.svc" $name $i $name $.Release.Namespace) -}}
{{- end -}}
{{- join "," $hosts -}}
{{- end -}}

{{- define "overfill.etcd.urls" -}}
{{- if eq .Values.discovery.mode "externalEtcd" -}}
{{- join "," .Values.discovery.externalEtcd.urls -}}
{{- else -}}
{{- $urls := list -}}
{{- range splitList "," (include "overfill.etcd.hosts" .) -}}
{{- $urls = append $urls (printf "%s://%s:2379" (include "overfill.etcd.scheme" $) .) -}}
{{- end -}}
{{- join "," $urls -}}
{{- end -}}
{{- end -}}

{{/* Secret that services mount to reach etcd over TLS, or nothing. */}}
{{- define "overfill.etcd.clientSecret" -}}
{{- if eq .Values.discovery.mode "externalEtcd" -}}
{{- .Values.discovery.externalEtcd.tlsSecretName -}}
{{- else if eq .Values.tls.mode "none" -}}
{{- include "overfill.etcd.secret" . -}}
{{- end -}}
{{- end -}}

{{/* Folder of the files with which services reach etcd over TLS, or nothing. The bundled etcd and the services have the
     same authority, so services identify themselves by their own certificates, and none of them gets etcd's key. */}}
{{- define "overfill.etcd.clientFolder" -}}
{{- if include "overfill.etcd.clientSecret" . -}}
/etc/overfill/etcd-tls
{{- else if and (eq .Values.discovery.mode "etcd") (include "overfill.etcd.secret" .) -}}
/etc/overfill/tls
{{- end -}}
{{- end -}}

{{- define "overfill.etcd.env" -}}
{{- $external := .Values.discovery.externalEtcd -}}
- name: OVERFILL_ETCD_URL
  value: {{ include "overfill.etcd.urls" . | quote }}
- name: OVERFILL_ETCD_PREFIX
  value: {{ default (include "overfill.cluster" .) .Values.discovery.etcdPrefix | quote }}
- name: OVERFILL_ETCD_LEASE_SECONDS
  value: {{ .Values.discovery.etcdLeaseSeconds | toString | quote }}
{{- if and (eq .Values.discovery.mode "externalEtcd") $external.user }}
- name: OVERFILL_ETCD_USER
  value: {{ $external.user | quote }}
- name: OVERFILL_ETCD_PASSWORD_FILE
  value: /etc/overfill/etcd-password/{{ $external.passwordSecretKey }}
{{- end }}
{{- with include "overfill.etcd.clientFolder" . }}
- name: OVERFILL_ETCD_CA
  value: {{ . }}/ca.crt
{{- if or (eq $.Values.discovery.mode "etcd") $external.clientCertificate }}
- name: OVERFILL_ETCD_CERT
  value: {{ . }}/tls.crt
- name: OVERFILL_ETCD_KEY
  value: {{ . }}/tls.key
{{- end }}
{{- end }}
{{- end -}}

{{- define "overfill.etcd.volumes" -}}
{{- with include "overfill.etcd.clientSecret" . }}
- name: etcd-tls
  secret:
    secretName: {{ . }}
    defaultMode: 288
{{- end }}
{{- if and (eq .Values.discovery.mode "externalEtcd") .Values.discovery.externalEtcd.user }}
- name: etcd-password
  secret:
    secretName: {{ .Values.discovery.externalEtcd.passwordSecretName }}
    defaultMode: 288
{{- end }}
{{- end -}}

{{- define "overfill.etcd.mounts" -}}
{{- if include "overfill.etcd.clientSecret" . }}
- name: etcd-tls
  mountPath: /etc/overfill/etcd-tls
  readOnly: true
{{- end }}
{{- if and (eq .Values.discovery.mode "externalEtcd") .Values.discovery.externalEtcd.user }}
- name: etcd-password
  mountPath: /etc/overfill/etcd-password
  readOnly: true
{{- end }}
{{- end -}}
