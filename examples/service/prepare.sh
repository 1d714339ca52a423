#!/usr/bin/env bash
# A model in, its bundle out, with curl alone:
#
#   prepare.sh MODEL.onnx CALIBRATION.npz BUNDLE.zip [EXTERNAL_DATA...]
#
# Environment: ONNX_QAT_SERVER (default: http://127.0.0.1:8000), ONNX_QAT_RECIPE (JSON, default: {}),
# ONNX_QAT_API_KEY (where the service asks for one).
set -euo pipefail

model=$1 calibration=$2 bundle=$3
external_data=("${@:4}")
server=${ONNX_QAT_SERVER:-http://127.0.0.1:8000}
recipe=${ONNX_QAT_RECIPE:-'{}'}

# The service's answer; an error of it, a JSON document with `code` and `detail`, is shown and ends the script.
api() {
    local answer
    answer=$(curl --silent --show-error --fail-with-body --location --retry 3 \
        ${ONNX_QAT_API_KEY:+--header "Authorization: Bearer $ONNX_QAT_API_KEY"} "$@") || {
        echo "$answer" >&2
        return 1
    }
    echo "$answer"
}

# A field of a JSON document: `field bundle.sha256 <<<"$document"`.
field() {
    python3 -c 'import functools, json, sys
value = functools.reduce(lambda inner, name: inner[name], sys.argv[1].split("."), json.load(sys.stdin))
print(value if isinstance(value, str) else json.dumps(value))' "$1"
}

form=(--form "model=@$model" --form "calibration=@$calibration" --form-string "recipe=$recipe")
for file in "${external_data[@]}"; do form+=(--form "external_data=@$file"); done

# With the key curl may repeat the request without there being two jobs.
key=$(cat /proc/sys/kernel/random/uuid)
job=$(api --header "Idempotency-Key: $key" "${form[@]}" "$server/v1/prepare")
id=$(field id <<<"$job")
echo "job $id"

state=queued
while [[ $state == queued || $state == running ]]; do
    sleep 1
    job=$(api "$server/v1/jobs/$id")
    state=$(field state <<<"$job")
done
if [[ $state != succeeded ]]; then
    echo "$state: $(field failure <<<"$job")" >&2
    exit 1
fi

# Under a temporary name until it is whole and is what the job says it is.
api --output "$bundle.part" "$server/v1/jobs/$id/bundle"
echo "$(field bundle.sha256 <<<"$job")  $bundle.part" | sha256sum --check --quiet
mv "$bundle.part" "$bundle"
echo "$bundle"
