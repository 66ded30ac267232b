{{/* Merges .from into .into: maps key by key, all else replaced, null removes. Changes .into and prints nothing.
     Sprig's mergeOverwrite would ignore false, 0 and empty lists. */}}
{{- define "overfill.merge" -}}
{{- $into := .into -}}
{{- range $k, $v := .from -}}
{{- if kindIs "invalid" $v -}}
{{- $_ := unset $into $k -}}
{{- else if and (kindIs "map" $v) (kindIs "map" (get $into $k)) -}}
{{- include "overfill.merge" (dict "into" (get $into $k) "from" $v) -}}
{{- else -}}
{{- $_ := set $into $k (deepCopy $v) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Puts into .into: models (by name), pools (all, with all settings and what follows from them), and servedNames. */}}
{{- define "overfill.compute" -}}
{{- $root := .root -}}
{{- $into := .into -}}
{{- $models := dict -}}
{{- range $root.Values.models -}}
{{- $_ := set $models .name . -}}
{{- end -}}
{{- $pools := list -}}
{{- $names := list -}}
{{- range $role := list "prefill" "decode" -}}
{{- range $i, $given := (index $root.Values $role).pools -}}
{{- $pool := deepCopy $root.Values.nodes -}}
{{- include "overfill.merge" (dict "into" $pool "from" (index $root.Values $role).defaults) -}}
{{- include "overfill.merge" (dict "into" $pool "from" $given) -}}
{{- $model := get $models $given.model -}}
{{- if not $model -}}
{{- fail (printf "%s.pools[%d].model: %q is not the name of an entry of models (%s)." $role $i $given.model (join ", " (keys $models | sortAlpha))) -}}
{{- end -}}
{{- $_ := set $pool "role" $role -}}
{{- $_ := set $pool "at" (printf "%s.pools[%d] (%s)" $role $i $given.name) -}}
{{- $_ := set $pool "pair" $model -}}
{{- $_ := set $pool "object" (include "overfill.object" (dict "root" $root "suffix" (printf "%s-%s" $role $given.name))) -}}
{{- $_ := set $pool "grpcPort" (ternary 50061 50071 (eq $role "prefill")) -}}
{{- $_ := set $pool "grace" (include "overfill.grace" (dict "at" $pool.at "settings" $pool "drain" $pool.drainTimeoutSeconds "drainName" "drainTimeoutSeconds") | int64) -}}
{{- if eq $role "prefill" -}}
{{- $_ := set $pool "served" (default (printf "%s-full" $model.name) $model.fullName) -}}
{{- else -}}
{{- $_ := set $pool "served" (default $model.name $pool.servedName) -}}
{{- $names = append $names $pool.served -}}
{{- $variants := list -}}
{{- if and $pool.variants $model.source.builtin -}}
{{- fail (printf "%s.variants: the built-in pair has no other decode models." $pool.at) -}}
{{- end -}}
{{- range $pool.variants -}}
{{- $names = append $names .servedName -}}
{{- $variants = append $variants (printf "%s=%s" .servedName (include "overfill.model.path" (merge (dict "modelPath" .modelPath) $pool))) -}}
{{- end -}}
{{- $_ := set $pool "variantFlags" (join "," $variants) -}}
{{- end -}}
{{- $_ := set $pool "path" (include "overfill.model.path" $pool) -}}
{{- /* The demo pair was trained and is compared in f32. */ -}}
{{- if $model.source.builtin -}}
{{- $_ := set $pool "weights" (default "f32" $pool.weights) -}}
{{- $_ := set $pool "kvDtype" (default "f32" $pool.kvDtype) -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- end -}}
{{- $_ := set $into "models" $models -}}
{{- $_ := set $into "pools" $pools -}}
{{- $_ := set $into "servedNames" (uniq $names) -}}
{{- end -}}

{{/* Grace period in seconds: (dict "at" ... "settings" ... "drain" N "drainName" ...). */}}
{{- define "overfill.grace" -}}
{{- $s := .settings -}}
{{- $needed := add $s.preStopSleepSeconds .drain $s.terminationMarginSeconds -}}
{{- if and $s.terminationGracePeriodSeconds (lt (int64 $s.terminationGracePeriodSeconds) $needed) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: %d is shorter than preStopSleepSeconds + %s + terminationMarginSeconds = %d + %d + %d = %d, so requests would be cut off." .at (int64 $s.terminationGracePeriodSeconds) .drainName (int64 $s.preStopSleepSeconds) (int64 .drain) (int64 $s.terminationMarginSeconds) $needed) -}}
{{- end -}}
{{- default $needed $s.terminationGracePeriodSeconds | int64 -}}
{{- end -}}

{{/* `spec.replicas` of a Deployment: (dict "root" $ "name" ... "settings" ...). Prints a line, or nothing.

     Whoever sets the number owns it. A number in the release that someone else has changed is a conflict for Helm 4 and
     is reset by Helm 3. A number that disappears from the release becomes 1. So:
     - the number is rendered if it is set here and nobody else has scaled;
     - otherwise the live number is rendered while the release still holds one, and nothing once it does not.
     Helm 4 applies on the server, where managedFields say who holds the field. For Helm 3, an annotation says whether
     the last release rendered one. */}}
{{- define "overfill.replicas" -}}
{{- $s := .settings -}}
{{- $wanted := ternary "" $s.replicas (or $s.autoscaling.enabled (kindIs "invalid" $s.replicas)) -}}
{{- $live := lookup "apps/v1" "Deployment" .root.Release.Namespace .name -}}
{{- $applied := false -}}
{{- $ours := false -}}
{{- $theirs := false -}}
{{- range dig "metadata" "managedFields" list $live -}}
{{- $holds := hasKey (dig "fieldsV1" "f:spec" dict .) "f:replicas" -}}
{{- if or (eq "scale" (default "" .subresource)) (hasPrefix "kubectl" .manager) -}}
{{- $theirs = or $theirs $holds -}}
{{- else -}}
{{- /* Helm, or a GitOps controller under its own name. */ -}}
{{- $ours = or $ours $holds -}}
{{- $applied = or $applied (and (eq .operation "Apply") (hasKey (dig "fieldsV1" "f:spec" dict .) "f:template")) -}}
{{- end -}}
{{- end -}}
{{- if and $live (or (kindIs "string" $wanted) (and $s.keepReplicas $theirs)) -}}
{{- $held := ternary $ours (eq "true" (dig "metadata" "annotations" "overfill/replicas-set" "" $live)) $applied -}}
{{- if $held -}}
replicas: {{ int64 $live.spec.replicas }}
{{- end -}}
{{- else if not (kindIs "string" $wanted) -}}
replicas: {{ int64 $wanted }}
{{- end -}}
{{- end -}}

{{/* Name of the release among all of the cluster. Routers use no nodes with another one, even if an address is reused. */}}
{{- define "overfill.cluster" -}}
{{- printf "%s/%s" .Release.Namespace .Release.Name -}}
{{- end -}}

{{/* URL scheme between services. */}}
{{- define "overfill.scheme" -}}
{{- ternary "http" "https" (eq .Values.tls.mode "none") -}}
{{- end -}}
