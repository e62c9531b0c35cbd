#!/usr/bin/env bash
# Quantizes a chat model, serves it, asks it one question, and stops the server.
#
#   bash examples/quantize_and_serve.sh                               Qwen2.5-0.5B-Instruct from the hub
#   bash examples/quantize_and_serve.sh MODEL OUT [FLAGS]             FLAGS go to `rotquant quantize`
#
# PORT (8000) and SERVE_FLAGS are variables of the environment. Calibrate on text that looks like the use:
# --calibration FILE among the FLAGS.
set -euo pipefail

model=${1:-Qwen/Qwen2.5-0.5B-Instruct}
out=${2:-qwen2.5-0.5b-w4}
port=${PORT:-8000}

rotquant quantize "$model" -o "$out" "${@:3}"

# shellcheck disable=SC2086 # several flags
vllm serve "$out" --quantization rotquant --port "$port" ${SERVE_FLAGS:-} &
server=$!
trap 'kill $server; wait $server || true' EXIT
until curl --silent --fail "localhost:$port/health" > /dev/null; do
    kill -0 "$server" || { echo "the server ended; its lines above say why" >&2; exit 1; }
    sleep 1
done

curl --silent --fail "localhost:$port/v1/chat/completions" -H 'Content-Type: application/json' -d "{
    \"model\": \"$out\", \"max_tokens\": 32, \"temperature\": 0,
    \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]}" |
    python3 -c 'import json, sys; print("\nanswer:", json.load(sys.stdin)["choices"][0]["message"]["content"])'
