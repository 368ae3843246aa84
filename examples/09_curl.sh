#!/bin/sh
# The protocol by hand: is it ready, what is there, ask, ask with no time. First: clockwork serve examples/models
set -eu
url=${1:-127.0.0.1:8000}
bits='{"inputs": [{"name": "bits", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]}]}'

echo "ready:   $(curl -s "$url/v2/health/ready")"
echo "models:  $(curl -s "$url/v2/models")"
echo "answer:  $(curl -s "$url/v2/models/mlp/infer" -H 'x-slo-ms: 1000' -d "$bits")"
echo "no time: $(curl -s "$url/v2/models/mlp/infer" -H 'x-slo-ms: 0.2' -d "$bits" -w ' (status %{http_code})')"
