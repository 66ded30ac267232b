{{/* Path of a pool's model in its container. */}}
{{- define "overfill.model.path" -}}
{{- $source := .pair.source -}}
{{- $given := "" -}}
{{- if eq .role "prefill" -}}
{{- $given = default "" .pair.fullPath -}}
{{- else -}}
{{- $given = default (default "" .pair.decodePath) .modelPath -}}
{{- end -}}
{{- if $source.builtin -}}
{{- printf "/usr/share/overfill/demo/%s" (ternary "full" "decode" (eq .role "prefill")) -}}
{{- else if $source.hub -}}
{{- printf "%s/%s" (include "overfill.model.folder" .) $given | trimSuffix "/" -}}
{{- else -}}
{{- printf "/models/%s" $given | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* Object of a hub model: its claim, and the beginning of its Job's name. */}}
{{- define "overfill.model.object" -}}
{{- include "overfill.object" (dict "root" .root "suffix" (printf "model-%s" (include "overfill.sanitize" .model.name)) "limit" 54) -}}
{{- end -}}

{{- define "overfill.model.claim" -}}
{{- default (include "overfill.model.object" .) .model.source.hub.existingClaim -}}
{{- end -}}

{{/* The volume of a model: (dict "root" $ "model" ...). */}}
{{- define "overfill.model.volume" -}}
{{- $source := .model.source -}}
{{- with $source.pvc }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .claimName | quote }}
    readOnly: true
{{- end }}
{{- with $source.hostPath }}
- name: models
  hostPath:
    path: {{ .path | quote }}
    type: Directory
{{- end }}
{{- with $source.image }}
- name: models
  image:
    reference: {{ .reference | quote }}
    pullPolicy: {{ default "IfNotPresent" .pullPolicy }}
{{- end }}
{{- if $source.hub }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "overfill.model.claim" . | quote }}
{{- end }}
{{- end -}}

{{/* The mount of a model. */}}
{{- define "overfill.model.mount" -}}
{{- $source := .model.source -}}
{{- if not $source.builtin }}
- name: models
  mountPath: /models
  readOnly: true
  {{- with (default (dict) $source.pvc).subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Folder of a hub model that a node needs. It is named after the model: another model never meets the files of this one. */}}
{{- define "overfill.model.folder" -}}
{{- printf "/models/%s" (include "overfill.model.id" . | include "overfill.sanitize") -}}
{{- end -}}
{{- define "overfill.model.id" -}}
{{- if and (eq .role "decode") .pair.source.hub.decode }}{{ .pair.source.hub.decode }}{{ else }}{{ .pair.source.hub.full }}{{ end -}}
{{- end -}}

{{/* `spec` of the pod that downloads a model. The full model comes first; each folder gets its marker last. */}}
{{- define "overfill.download.podSpec" -}}
{{- $hub := .model.source.hub -}}
{{- include "overfill.pod.common" (dict "root" .root "settings" .settings) }}
restartPolicy: OnFailure
{{- if $hub.decode }}
initContainers:
  - {{ include "overfill.download.container" (dict "root" .root "hub" $hub "name" "full" "id" $hub.full) | nindent 4 | trim }}
{{- end }}
containers:
  {{- if $hub.decode }}
  - {{ include "overfill.download.container" (dict "root" .root "hub" $hub "name" "decode" "id" $hub.decode) | nindent 4 | trim }}
  {{- else }}
  - {{ include "overfill.download.container" (dict "root" .root "hub" $hub "name" "full" "id" $hub.full) | nindent 4 | trim }}
  {{- end }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: 1Gi
  - name: models
    persistentVolumeClaim:
      claimName: {{ .claim | quote }}
{{- end -}}

{{- define "overfill.download.container" -}}
{{- $hub := .hub -}}
name: {{ .name }}
image: {{ include "overfill.image" (dict "root" .root "component" "cli") }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - pull
  - --dir
  - /models/{{ include "overfill.sanitize" .id }}
  - {{ .id | quote }}
env:
  - name: HOME
    value: /tmp
  {{- with $hub.endpoint }}
  - name: HF_ENDPOINT
    value: {{ . | quote }}
  {{- end }}
  {{- with $hub.tokenSecret }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ .name }}
        key: {{ default "token" .key }}
  {{- end }}
  {{- with $hub.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- toYaml (default (dict "requests" (dict "cpu" "500m" "memory" "256Mi") "limits" (dict "memory" "2Gi")) $hub.resources) | nindent 2 }}
securityContext:
  {{- toYaml .root.Values.router.securityContext | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: models
    mountPath: /models
{{- end -}}
