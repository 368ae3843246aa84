{{/* Names, labels, sizes, and what all pods have in common. */}}

{{- define "clockwork.name" -}}
{{- $usual := contains "clockwork" .Release.Name | ternary .Release.Name (printf "%s-clockwork" .Release.Name) -}}
{{- .Values.fullnameOverride | default $usual | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{- define "clockwork.labels" -}}
app.kubernetes.io/name: clockwork-serve
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* The labels by which a role's pods are found: root, role; kind where there are several. */}}
{{- define "clockwork.selector" -}}
app.kubernetes.io/name: clockwork-serve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- with .kind }}
clockwork-serve/kind: {{ . }}
{{- end }}
{{- end }}

{{- define "clockwork.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "clockwork.serviceAccount" -}}
{{- $made := .Values.serviceAccount.create | ternary (include "clockwork.name" .) "default" -}}
{{- .Values.serviceAccount.name | default $made -}}
{{- end }}

{{- define "clockwork.store" -}}
{{- .Values.store.url | default "/store" -}}
{{- end }}

{{- define "clockwork.storeClaim" -}}
{{- .Values.store.claim.existing | default (printf "%s-store" (include "clockwork.name" .)) -}}
{{- end }}

{{- define "clockwork.certificates" -}}
{{- .Values.certificates.secretName | default (printf "%s-cluster" (include "clockwork.name" .)) -}}
{{- end }}

{{/* The name that every certificate has. */}}
{{- define "clockwork.clusterName" -}}
{{- .Values.certificates.name | default (printf "%s.%s" (include "clockwork.name" .) .Release.Namespace) -}}
{{- end }}

{{/* Where gateways and workers find the controllers: each by the name that its pod keeps. */}}
{{- define "clockwork.controllers" -}}
{{- $name := include "clockwork.name" . -}}
{{- $addresses := list -}}
{{- range $number := until (int .Values.controller.replicas) -}}
{{- $addresses = append $addresses (printf "%s-controller-%d.%s-controllers:7000" $name $number $name) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end }}

{{/* A size in bytes: field, value. Settings write 256MiB or 1GB, Kubernetes 256Mi or 1G. */}}
{{- define "clockwork.bytes" -}}
{{- $text := .value | toString | trim | lower -}}
{{- if regexMatch "^[0-9.]+e[+][0-9]+$" $text -}}
{{- $text | float64 | int64 -}}
{{- else -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trim | trimSuffix "b" -}}
{{- $factors := dict "" 1 "k" 1000 "m" 1000000 "g" 1000000000 "t" 1000000000000 "ki" 1024 "mi" 1048576 "gi" 1073741824 "ti" 1099511627776 -}}
{{- if or (not $number) (not (hasKey $factors $unit)) -}}
{{- fail (printf "%s: expected a size such as 512MiB or 1Gi, found %q" .field (toString .value)) -}}
{{- end -}}
{{- mulf (float64 $number) (float64 (get $factors $unit)) | int64 -}}
{{- end -}}
{{- end }}

{{/* Bytes as a quantity of Kubernetes. */}}
{{- define "clockwork.quantity" -}}
{{- printf "%dMi" (div (add (int64 .) 1048575) 1048576) -}}
{{- end }}

{{/* A setting as the role has it: root, own, name, default. */}}
{{- define "clockwork.setting" -}}
{{- if hasKey (.own | default dict) .name -}}{{ get .own .name }}
{{- else if hasKey (.root.Values.settings | default dict) .name -}}{{ get .root.Values.settings .name }}
{{- else -}}{{ .default }}{{- end -}}
{{- end }}

{{/* A setting that is a size, in bytes: root, own, field, name, default. */}}
{{- define "clockwork.settingBytes" -}}
{{- include "clockwork.bytes" (dict "field" (printf "%s.settings.%s" .field .name) "value" (include "clockwork.setting" .)) -}}
{{- end }}

{{/* A role's file of settings, as TOML: root, own. Values of JSON are values of TOML. */}}
{{- define "clockwork.toml" -}}
{{- $all := dict -}}
{{- range $settings := list .root.Values.settings .own -}}
{{- range $name, $value := $settings -}}{{- $_ := set $all $name $value -}}{{- end -}}
{{- end -}}
{{- range $name := keys $all | sortAlpha }}
{{ $name }} = {{ get $all $name | toJson }}
{{- end }}
{{- end }}

{{/* Seconds that a pod has to end: root, own, more (what its role takes beside drain_s). */}}
{{- define "clockwork.grace" -}}
{{- $drain := include "clockwork.setting" (dict "root" .root "own" .own "name" "drain_s" "default" 10) -}}
{{- add (ceil (float64 $drain)) .more -}}
{{- end }}

{{/* Resources: field, given, need (bytes of memory), why, cpu, gpus. What is not given is what is needed. */}}
{{- define "clockwork.resources" -}}
{{- $given := deepCopy (.given | default dict) -}}
{{- $limits := $given.limits | default dict -}}
{{- $requests := $given.requests | default dict -}}
{{- if hasKey $limits "memory" -}}
{{- $field := printf "%s.resources.limits.memory" .field -}}
{{- if lt (include "clockwork.bytes" (dict "field" $field "value" $limits.memory) | int64) (int64 .need) -}}
{{- fail (printf "%s: expected at least %s, for %s; found %v; raise it, or lower what is named" $field (include "clockwork.quantity" .need) .why $limits.memory) -}}
{{- end -}}
{{- else -}}
{{- $_ := set $limits "memory" (include "clockwork.quantity" .need) -}}
{{- end -}}
{{- if not (hasKey $requests "memory") -}}{{- $_ := set $requests "memory" $limits.memory -}}{{- end -}}
{{- if not (or (hasKey $requests "cpu") (hasKey $limits "cpu")) -}}{{- $_ := set $requests "cpu" .cpu -}}{{- end -}}
{{- if and .gpus (not (hasKey $limits "nvidia.com/gpu")) -}}{{- $_ := set $limits "nvidia.com/gpu" .gpus -}}{{- end -}}
{{- toYaml (dict "limits" $limits "requests" $requests) -}}
{{- end }}

{{/* What a worker of a kind, or its builder, takes: root, kind, index (of the kind), field and given (resources). */}}
{{- define "clockwork.workerResources" -}}
{{- $settings := dict "root" .root "own" .kind.settings "field" (printf "workers[%d]" .index) -}}
{{- $scratch := include "clockwork.settingBytes" (merge (dict "name" "scratch_memory" "default" "1280MiB") $settings) | int64 -}}
{{- $io := div $scratch 5 -}}
{{- $threads := include "clockwork.setting" (merge (dict "name" "threads" "default" 1) $settings) | int -}}
{{- $devices := int (.kind.devices | default 1) -}}
{{- $each := 0 -}}
{{- $why := "" -}}
{{- $gpus := 0 -}}
{{- if eq .kind.device "cuda" -}}
{{- $host := include "clockwork.settingBytes" (merge (dict "name" "host_memory" "default" "1GiB") $settings) | int64 -}}
{{- $each = add $host (mul 2 $io) 2147483648 -}}
{{- $why = "host_memory, two fifths of scratch_memory and 2Gi for each device" -}}
{{- $gpus = $devices -}}
{{- else if hasPrefix "emulated" .kind.device -}}
{{- $each = add (mul 2 $io) 268435456 -}}
{{- $why = "two fifths of scratch_memory and 256Mi for each device" -}}
{{- else -}}
{{- $memory := include "clockwork.settingBytes" (merge (dict "name" "device_memory" "default" "1GB") $settings) | int64 -}}
{{- $each = add $memory $scratch $io 536870912 -}}
{{- $why = "device_memory, six fifths of scratch_memory and 512Mi for each device" -}}
{{- end -}}
{{- $shared := include "clockwork.bytes" (dict "field" "sharedMemory" "value" .root.Values.sharedMemory) | int64 -}}
{{- include "clockwork.resources" (dict "field" .field "given" .given "need" (add (mul $devices $each) $shared) "why" (printf "%s, and sharedMemory" $why) "cpu" (mul $devices $threads) "gpus" $gpus) -}}
{{- end }}

{{/* The beginning of every pod's specification: root, spec (the role's values), selector, grace. */}}
{{- define "clockwork.pod" -}}
enableServiceLinks: false # a Service called clockwork-http would set CLOCKWORK_HTTP_PORT=tcp://...
automountServiceAccountToken: false
serviceAccountName: {{ include "clockwork.serviceAccount" .root }}
terminationGracePeriodSeconds: {{ .grace }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .spec.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if .selector }}
topologySpreadConstraints:
  {{- with .spec.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- .selector | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The beginning of every container: root, store (whether it reads or writes that). */}}
{{- define "clockwork.container" -}}
image: {{ include "clockwork.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext: {{- toYaml .root.Values.securityContext | nindent 2 }}
env:
  - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
  - {name: HOME, value: /tmp}
  - {name: CLOCKWORK_REPOSITORY, value: ""} # the image's; what is served is in the store
{{- if and .store .root.Values.store.secretName }}
envFrom:
  - secretRef: {name: {{ .root.Values.store.secretName }}}
{{- end }}
{{- end }}

{{- define "clockwork.clusterArgs" -}}
- --cluster-certificate=/certificates/tls.crt
- --cluster-key=/certificates/tls.key
- --cluster-ca=/certificates/ca.crt
- --cluster-name={{ include "clockwork.clusterName" . }}
{{- end }}

{{/* Mounts and volumes: root, file (of settings), certificates, keys, store ("ro", "rw" or none), cache (a volume). */}}
{{- define "clockwork.mounts" -}}
- {name: settings, mountPath: /etc/clockwork, readOnly: true}
- {name: tmp, mountPath: /tmp} # the folder of sockets, and the journal
- {name: shm, mountPath: /dev/shm}
{{- if .certificates }}
- {name: certificates, mountPath: /certificates, readOnly: true}
{{- end }}
{{- if and .keys .root.Values.gateway.apiKeys.secretName }}
- {name: keys, mountPath: /keys, readOnly: true}
{{- end }}
{{- if .cache }}
- {name: cache, mountPath: /cache}
{{- end }}
{{- if and .store (not .root.Values.store.url) }}
- {name: store, mountPath: /store, readOnly: {{ eq .store "ro" }}}
{{- end }}
{{- end }}

{{- define "clockwork.volumes" -}}
- name: settings
  configMap:
    name: {{ include "clockwork.name" .root }}
    items: [{key: {{ .file }}, path: clockwork.toml}]
- {name: tmp, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.sharedMemory }}}}
{{- if .certificates }}
- name: certificates
  secret: {secretName: {{ include "clockwork.certificates" .root }}, defaultMode: 0440}
{{- end }}
{{- if and .keys .root.Values.gateway.apiKeys.secretName }}
- name: keys
  secret: {secretName: {{ .root.Values.gateway.apiKeys.secretName }}, defaultMode: 0440}
{{- end }}
{{- with .cache }}
- name: cache
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and .store (not .root.Values.store.url) }}
- name: store
  persistentVolumeClaim: {claimName: {{ include "clockwork.storeClaim" .root }}}
{{- end }}
{{- end }}
