{{/* A string as part of an object's name. Different strings stay different: what had to be changed gets a hash. */}}
{{- define "overfill.sanitize" -}}
{{- $clean := regexReplaceAll "[^a-z0-9-]+" (lower .) "-" | trimAll "-" -}}
{{- if eq $clean . }}{{ $clean }}{{ else }}{{ printf "%s-%s" $clean (sha256sum . | trunc 8) | trimPrefix "-" }}{{ end -}}
{{- end -}}

{{- define "overfill.name" -}}
{{- include "overfill.sanitize" (default .Chart.Name .Values.nameOverride) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The beginning of all names. It starts with a letter, since names of Services must. */}}
{{- define "overfill.base" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $release := include "overfill.sanitize" .Release.Name -}}
{{- $name := include "overfill.name" . -}}
{{- $base := ternary $release (printf "%s-%s" $release $name) (contains $name $release) -}}
{{- ternary $base (printf "overfill-%s" $base) (regexMatch "^[a-z]" $base) -}}
{{- end -}}
{{- end -}}

{{/* Name of an object: (dict "root" $ "suffix" "prefill-a" "limit" 63). A name that is too long is cut and gets a hash. */}}
{{- define "overfill.object" -}}
{{- $base := include "overfill.base" .root -}}
{{- $limit := int (default 63 .limit) -}}
{{- $full := ternary $base (printf "%s-%s" $base .suffix) (empty .suffix) -}}
{{- if le (len $full) $limit -}}
{{- $full -}}
{{- else -}}
{{- $hash := sha256sum $full | trunc 8 -}}
{{- $room := sub $limit (add (len .suffix) 10) | int -}}
{{- if and .suffix (ge $room 8) -}}
{{- printf "%s-%s-%s" (trunc $room $base | trimSuffix "-") $hash .suffix -}}
{{- else -}}
{{- printf "%s-%s" (trunc (int (sub $limit 9)) $full | trimSuffix "-") $hash -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "overfill.fullname" -}}
{{- include "overfill.object" (dict "root" . "suffix" "") -}}
{{- end -}}

{{- define "overfill.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "overfill.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods: (dict "root" $ "component" "prefill" "pool" "a"). They never change, so no version. */}}
{{- define "overfill.selector" -}}
app.kubernetes.io/name: {{ include "overfill.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
overfill/pool: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* `metadata` of an object without its first line: (dict "root" $ "name" ... "component" ... "pool" ... "labels" ... "annotations" ...). */}}
{{- define "overfill.metadata" -}}
{{- $labels := dict -}}
{{- range list .root.Values.commonLabels (default dict .labels) (include "overfill.selector" . | fromYaml) -}}
{{- range $k, $v := . }}{{ $_ := set $labels $k $v }}{{ end -}}
{{- end -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "overfill" -}}
{{- $_ := set $labels "app.kubernetes.io/version" (.root.Chart.AppVersion | replace "+" "_") -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- $annotations := dict -}}
{{- range list .root.Values.commonAnnotations (default dict .annotations) -}}
{{- range $k, $v := . }}{{ $_ := set $annotations $k $v }}{{ end -}}
{{- end -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- toYaml $labels | nindent 2 }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Labels of pods: common and given ones, then those that select. No version: a new chart alone restarts no pod. */}}
{{- define "overfill.podLabels" -}}
{{- $labels := dict -}}
{{- range list .root.Values.commonLabels (default dict .labels) (include "overfill.selector" . | fromYaml) -}}
{{- range $k, $v := . }}{{ $_ := set $labels $k $v }}{{ end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end -}}

{{/* An image: (dict "root" $ "component" "prefill" "override" pool.image). */}}
{{- define "overfill.image" -}}
{{- $image := index .root.Values.image .component -}}
{{- $o := default dict .override -}}
{{- $registry := default .root.Values.image.registry .root.Values.global.imageRegistry -}}
{{- $repository := default $image.repository $o.repository -}}
{{- /* A tag of the pool takes precedence over a digest of the role. */ -}}
{{- $digest := default (ternary "" $image.digest (not (empty $o.tag))) $o.digest -}}
{{- $tag := default (default (default .root.Chart.AppVersion .root.Values.image.tag) $image.tag) $o.tag -}}
{{- with $registry }}{{ . }}/{{ end }}{{ $repository }}{{ with $digest }}@{{ . }}{{ else }}:{{ $tag }}{{ end -}}
{{- end -}}

{{- define "overfill.pullSecrets" -}}
{{- $secrets := list -}}
{{- range concat .Values.global.imagePullSecrets .Values.image.pullSecrets -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with uniq $secrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
